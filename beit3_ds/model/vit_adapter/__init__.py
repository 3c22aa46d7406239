"""Implements ViT-Adapter, which adapts a plain Vision Transformer to dense prediction (arXiv:2205.08534)."""

from beit3_ds.model.vit_adapter.adapter import ViTAdapter
from beit3_ds.model.vit_adapter.config import AdapterConfig
from beit3_ds.model.vit_adapter.initialization import adapter_initial_value

__all__ = ["AdapterConfig", "ViTAdapter", "adapter_initial_value"]
