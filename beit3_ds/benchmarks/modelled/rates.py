"""Lists assumed rates of kernels on each GPU. Modelled times are computed from these rates."""

from typing import NamedTuple

from beit3_ds.benchmarks.kernels.roofline import GPU, find_gpu


class Rates(NamedTuple):
    """Holds the assumed rates of kernels on one GPU, as shares of the GPU's peak rates."""

    gpu: GPU
    """Peak rates from the vendor's data sheet."""
    architecture: int
    """Compute capability for which kernels are compiled: 80 or 90."""
    library: float
    """Share of the peak FLOP/s that cuBLAS's products reach in half precision."""
    triton: float
    """Share of the peak FLOP/s that our Triton kernels reach in half-precision matrix products."""
    with_gelu: float
    """Share of the peak FLOP/s that our up projection reaches. The projection's kernel also computes GELU."""
    with_norm: float
    """Share of the peak FLOP/s that our old output projection reached. The projection's kernel also normalised the
    input."""
    attention_forward: float
    """Share of the peak FLOP/s that attention's forward pass reaches."""
    attention_backward: float
    """Share of the peak FLOP/s that FlashAttention-2's backward pass reaches. The pass computes five products."""
    own_attention_backward: float
    """Share of the peak FLOP/s that our attention's backward pass reaches. The pass computes seven products, but only
    the FLOPs of five are counted."""
    float32: float
    """Share of the peak float32 FLOP/s (`GPU.float32_flops`) that float32 products reach. Tensor cores are not used."""
    bandwidth: float
    """Fraction of the peak memory bandwidth that is reached by kernels without matrix products."""

    def product_seconds(self, flops: float, share: float) -> float:
        """Returns the seconds of a half-precision product at a share of the peak FLOP/s."""
        return flops / (share * self.gpu.half_flops)

    def pass_seconds(self, num_bytes: float) -> float:
        """Returns the seconds of a pass over memory that reads and writes `num_bytes` bytes in total."""
        return num_bytes / (self.bandwidth * self.gpu.bandwidth)


_HOPPER = (90, 0.73, 0.54, 0.42, 0.34, 0.35, 0.28, 0.20, 0.82, 0.9)
RATES = {
    "a100-80gb": Rates(find_gpu("a100-80gb"), 80, 0.80, 0.72, 0.66, 0.42, 0.45, 0.38, 0.27, 0.82, 0.9),
    "h100-sxm": Rates(find_gpu("h100-sxm"), *_HOPPER),
    "h200-sxm": Rates(find_gpu("h200-sxm"), *_HOPPER),
}
"""Assumed rates by GPU."""

SOURCES = (
    "H100 and H200, products: cuBLAS 720 TFLOP/s; ours 500 to 560, from the machine code (wgmma, but no TMA, few "
    "programs per multiprocessor).",
    "H100 and H200, the up and out projections before: 750 to 880 us and 840 to 1,170 us, where cuBLAS and one pass "
    "take 625 and 535 us.",
    "A100, products: cuBLAS 250 TFLOP/s; ours 90% of it, an assumption. The out projection with a norm issued 883 "
    "instructions per step and warp, the plain one 159. So a scheduler needed 1,766 cycles for 1,024 of the tensor "
    "cores.",
    "Attention at 200 to 320 rows per sequence: assumptions, below the published rate of FlashAttention-3 for long "
    "sequences (740 TFLOP/s).",
    "Passes over rows: 90% of the bandwidth, which a copy on an H200 reached (4.3 of 4.8 TB/s).",
    "float32 products: 82% of the peak.",
)
"""Sources of the assumed rates, as sentences for the report."""
