"""Computes sizes of launches; Triton's own functions take microseconds outside of kernels."""


def ceil_div(x: int, divisor: int) -> int:
    """Returns x / divisor, rounded up."""
    return -(-x // divisor)


def next_power_of_2(x: int) -> int:
    """Returns the smallest power of two that is not below `x`, a positive number."""
    return 1 << (x - 1).bit_length()
