"""Adds the heads of masked modeling to BEiT-3; pretraining trains this model and `beit3 export` writes it."""

from collections.abc import Sequence

from beit3_ds.config import ActivationCheckpointing, ModelConfig
from beit3_ds.model import TaskModel
from beit3_ds.parallel import TensorParallel
from beit3_ds.tasks.pretraining.heads import MaskedModelingHeads


class PretrainingModel(TaskModel):
    """Extends BEiT-3 with the MIM head and the MLM head, which read the output of the last layer."""

    heads: MaskedModelingHeads | None

    def __init__(
        self,
        config: ModelConfig,
        tensor: TensorParallel | None = None,
        layers: Sequence[range] | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
        *,
        fp32_residual_connection: bool = False,
    ) -> None:
        """Builds the layers as `BEiT3` does, and the heads if the last layer is among them."""
        super().__init__(
            MaskedModelingHeads,
            config,
            tensor,
            layers,
            activation_checkpointing,
            fp32_residual_connection=fp32_residual_connection,
        )
