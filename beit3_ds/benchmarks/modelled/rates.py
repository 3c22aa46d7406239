"""States the rates that kernels are assumed to reach on each GPU, from which times are modelled."""

from typing import NamedTuple

from beit3_ds.benchmarks.kernels.roofline import GPU, find_gpu


class Rates(NamedTuple):
    """Holds the shares of a GPU's peak rates that kernels are assumed to reach."""

    gpu: GPU
    """Peak rates from the vendor's data sheet."""
    architecture: int
    """Architecture of the kernels, 80 or 90."""
    library: float
    """Share of the peak that products of cuBLAS reach in half precision."""
    triton: float
    """Share of the peak that our products reach."""
    with_gelu: float
    """Share of the peak that our up projection reaches, which computes GELU while the product is in registers."""
    with_norm: float
    """Share of the peak that our out projection reached that normalised its input inside the product."""
    attention_forward: float
    """Share of the peak FLOP/s that the forward pass of attention reaches."""
    attention_backward: float
    """Share of the peak FLOP/s that FlashAttention-2's backward pass, with five products, reaches."""
    own_attention_backward: float
    """Share of the peak FLOP/s that our backward pass reaches. It has seven products, of which five count as work."""
    float32: float
    """Share of the peak that products in float32 without tensor cores reach."""
    bandwidth: float
    """Share of the memory bandwidth that passes over rows reach."""

    def product_seconds(self, flops: float, share: float) -> float:
        """Returns the seconds of a product in half precision that reaches a share of the peak."""
        return flops / (share * self.gpu.half_flops)

    def pass_seconds(self, num_bytes: float) -> float:
        """Returns the seconds of a pass that reads and writes this many bytes."""
        return num_bytes / (self.bandwidth * self.gpu.bandwidth)


_HOPPER = (90, 0.73, 0.54, 0.42, 0.34, 0.35, 0.28, 0.20, 0.82, 0.9)
RATES = {
    "a100-80gb": Rates(find_gpu("a100-80gb"), 80, 0.80, 0.72, 0.66, 0.42, 0.45, 0.38, 0.27, 0.82, 0.9),
    "h100-sxm": Rates(find_gpu("h100-sxm"), *_HOPPER),
    "h200-sxm": Rates(find_gpu("h200-sxm"), *_HOPPER),
}
"""Assumed rates by GPU. Nothing of this project ran on a GPU."""

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
"""Sources of the assumed rates."""
