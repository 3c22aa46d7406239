"""Lists the sections of `beit3 certify`, the most important first."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Section:
    """Describes one section of `beit3 certify`: a group of measurements that runs in its own process."""

    name: str
    """Name of the section, one word."""
    title: str
    """Heading of the section in the report; says what the section shows."""
    module: str
    """Module of the section, with a function `measure(recorder)`."""
    seconds: int
    """Estimated seconds on one GPU, if Triton's cache contains all kernels."""
    limit: int
    """Time limit in seconds, after which the section is killed. Results recorded before are kept."""


_ROOM = "beit3_ds.benchmarks.certify"

MACHINE = Section(name="machine", title="This machine", module=f"{_ROOM}.machine", seconds=5, limit=120)
"""Section that describes the machine; it runs first in every call."""

PLAN = (
    Section(
        name="ceilings",
        title="Highest rates of products and copies, beside the data sheet's",
        module=f"{_ROOM}.ceilings",
        seconds=10,
        limit=60,
    ),
    Section(
        name="correctness",
        title="Every op and variant beside its reference in float64, and twice for equal bits",
        module=f"{_ROOM}.correctness",
        seconds=60,
        limit=300,
    ),
    Section(
        name="operators",
        title="Every op by every implementation, with work queued beforehand",
        module=f"{_ROOM}.operators",
        seconds=90,
        limit=300,
    ),
    Section(
        name="steps",
        title="Training steps beside torchscale and beside SDPA with torch.compile",
        module=f"{_ROOM}.steps",
        seconds=120,
        limit=300,
    ),
    Section(
        name="profile",
        title="Kernels of a training step, and the share of time in which the GPU is idle",
        module=f"{_ROOM}.profile",
        seconds=30,
        limit=120,
    ),
    Section(
        name="parity",
        title="Gradients of a training step beside float64",
        module=f"{_ROOM}.parity",
        seconds=45,
        limit=180,
    ),
    Section(
        name="engine",
        title="Training steps with DeepSpeed's engine",
        module=f"{_ROOM}.engine",
        seconds=45,
        limit=180,
    ),
    Section(
        name="layouts",
        title="A training on one GPU, and the same divided over all GPUs",
        module=f"{_ROOM}.layouts",
        seconds=120,
        limit=900,
    ),
    Section(
        name="tests",
        title="Tests marked `gpu`",
        module=f"{_ROOM}.device_tests",
        seconds=600,
        limit=1800,
    ),
)
"""All sections except `MACHINE`, the most important first."""
