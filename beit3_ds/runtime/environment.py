"""Checks environment variables before libraries read them, so that an invalid value gives a clear error message."""

import re
import socket
from collections.abc import Mapping

from beit3_ds.config import ConfigError

# DeepSpeed's names of accelerators. Its import raises an error for any other name.
_ACCELERATORS = ("cuda", "cpu", "xpu", "npu", "mps", "hpu", "mlu", "sdaa", "supa", "klxpu")
_THREADS = re.compile(r"\s*0*[1-9][0-9]{0,5}\s*(,\s*0*[1-9][0-9]{0,5}\s*)*")


def check_variables(environment: Mapping[str, str]) -> None:
    """Checks OMP_NUM_THREADS and DS_ACCELERATOR for values that are invalid on every machine.

    Raises:
        ConfigError: if a value is invalid. The message contains the variable, the value and the rule.
    """
    threads = environment.get("OMP_NUM_THREADS")
    if threads is not None and not _THREADS.fullmatch(threads):
        raise ConfigError(
            f"environment: OMP_NUM_THREADS={threads!r} is not a whole number of at least 1. Correct or unset it; by "
            "default, the ranks of a host divide its cores."
        )
    accelerator = environment.get("DS_ACCELERATOR")
    if accelerator is not None and accelerator not in _ACCELERATORS:
        raise ConfigError(
            f"environment: DS_ACCELERATOR={accelerator!r} is none of DeepSpeed's accelerators: "
            f"{', '.join(_ACCELERATORS)}. Correct or unset it."
        )


def check_this_machine(environment: Mapping[str, str]) -> None:
    """Checks that this machine has the network interfaces and the device that environment variables name.

    Raises:
        ConfigError: if a network interface or the device is missing. The message contains the variable and the value,
            and for a network interface also the available interfaces.
    """
    present = [name for _, name in socket.if_nameindex()]
    for name in filter(None, environment.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in present:
            raise ConfigError(
                f"environment: GLOO_SOCKET_IFNAME names {name!r}, but the network interfaces of host "
                f"{socket.gethostname()} are {', '.join(present)}. Name one of them, or unset the variable."
            )
    if environment.get("DS_ACCELERATOR") == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                f"environment: DS_ACCELERATOR=cuda, but host {socket.gethostname()} has no CUDA device that torch can "
                "use. Set DS_ACCELERATOR=cpu, or unset it."
            )
