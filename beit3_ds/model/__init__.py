"""The Multiway Transformer on packed batches: plain modules that know neither ranks nor DeepSpeed."""

from beit3_ds.model.beit3 import BEiT3, Logits, LossOutput
from beit3_ds.model.initialization import initial_value, initialize_parameters

__all__ = ["BEiT3", "Logits", "LossOutput", "initial_value", "initialize_parameters"]
