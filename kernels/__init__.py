"""Operations of the multiway model, installed as `beit3_ds.kernels`; plain tensors in, plain tensors out."""
