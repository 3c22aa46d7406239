"""Reads a run's ZeRO stage, offloading and data types from its DeepSpeed keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Precision = Literal["fp32", "bf16"]
"""Supported data types, as DeepSpeed names them."""


@dataclass(frozen=True)
class DeepSpeedOptions:
    """Reads the run's options from its DeepSpeed keys; missing keys take DeepSpeed's defaults."""

    keys: Mapping[str, Any]
    """The DeepSpeed keys of the run's file, after `read_deepspeed_keys` has checked them."""

    @property
    def zero(self) -> Mapping[str, Any]:
        """Returns the section `zero_optimization`, or an empty mapping if the file has no such section."""
        section: Mapping[str, Any] = self.keys.get("zero_optimization", {})
        return section

    @property
    def zero_stage(self) -> int:
        """Returns the ZeRO stage, 0 to 3."""
        return int(self.zero.get("stage", 0))

    @property
    def is_bf16(self) -> bool:
        """Returns whether parameters and activations are bf16; if not, they are float32."""
        return bool(self.keys.get("bf16", {}).get("enabled", False))

    @property
    def precision(self) -> Precision:
        """Returns the data type of parameters and activations, "fp32" or "bf16"."""
        return "bf16" if self.is_bf16 else "fp32"

    @property
    def grad_accum_dtype(self) -> Precision:
        """Returns the data type in which gradients of micro-batches are summed; the default is the parameters' type."""
        dtype: Precision = self.keys.get("data_types", {}).get("grad_accum_dtype", self.precision)
        return dtype

    @property
    def communication_data_type(self) -> Precision:
        """Returns the data type in which data-parallel ranks exchange gradients; by default the parameters' type."""
        dtype: Precision = self.keys.get("communication_data_type", self.precision)
        return dtype

    @property
    def offloads_parameters(self) -> bool:
        """Returns whether parameters are offloaded to host memory."""
        return self._is_offloaded("offload_param")

    @property
    def offloads_optimizer(self) -> bool:
        """Returns whether the optimizer state is offloaded to host memory."""
        return self._is_offloaded("offload_optimizer")

    def _is_offloaded(self, section: str) -> bool:
        return bool(self.zero.get(section, {}).get("device", "none") != "none")
