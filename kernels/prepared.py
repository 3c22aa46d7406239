"""Divides a GPU operator into two parts: preparation, which depends only on dtypes and sizes, and the work of each
call.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any


class Prepared:
    """Decorator for a function that prepares an operator. Calling the decorated name prepares and runs the operator.

    The decorated function (`prepare`) takes the operator's arguments, and returns a second function, which runs the
    operator. The second function takes the same positional arguments. Later calls of the second function may pass new
    tensors, but only with the same dtypes, sizes and device. Arguments that are not tensors must stay equal.
    `MeasuredOp` keeps the second function for later layers and batches.
    """

    def __init__(self, prepare: Callable[..., Callable[..., Any]]) -> None:
        """Stores `prepare`, the decorated function."""
        self.prepare = prepare
        """Function that returns a function that runs the operator."""
        update_wrapper(self, prepare)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Prepares and runs the operator once. The options affect the preparation only."""
        return self.prepare(*arguments, **options)(*arguments)
