"""Trains BEiT-3 (Wang et al., 2022, arXiv:2208.10442) with DeepSpeed, fine-tunes it, and uses its weights."""
