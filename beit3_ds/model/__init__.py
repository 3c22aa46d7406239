"""The Multiway Transformer on packed batches: plain modules that know neither ranks nor DeepSpeed."""

from beit3_ds.model.beit3 import BEiT3, Logits, LossOutput
from beit3_ds.model.features import Features
from beit3_ds.model.initialization import initial_value, initialize_parameters
from beit3_ds.model.pretrained import PretrainedWeights

__all__ = [
    "BEiT3",
    "Features",
    "Logits",
    "LossOutput",
    "PretrainedWeights",
    "initial_value",
    "initialize_parameters",
]
