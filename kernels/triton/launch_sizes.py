"""Computes sizes for kernel launches. Triton's own functions for this purpose are slow outside kernels."""


def ceil_div(x: int, divisor: int) -> int:
    """Returns x / divisor, rounded up to an integer."""
    return -(-x // divisor)


def next_power_of_2(x: int) -> int:
    """Returns the smallest power of two that is at least `x`; `x` must be positive."""
    return 1 << (x - 1).bit_length()
