"""Combines BEiT-3 with the heads of pretraining; `beit3 export` writes this model."""

from collections.abc import Sequence

from beit3_ds.config import ActivationCheckpointing, ModelConfig
from beit3_ds.model import TaskModel
from beit3_ds.parallel import TensorParallel
from beit3_ds.tasks.pretraining.heads import MaskedModelingHeads


class PretrainingModel(TaskModel):
    """Adds a MIM head and an MLM head to BEiT-3; the heads read the output of the last layer."""

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
        """Builds the given layers like `BEiT3`, and also the heads if the last layer is among them."""
        super().__init__(
            MaskedModelingHeads,
            config,
            tensor,
            layers,
            activation_checkpointing,
            fp32_residual_connection=fp32_residual_connection,
        )
