"""beit3_ds: pretraining of BEiT-3 (Wang et al., 2022, arXiv:2208.10442) with DeepSpeed."""
