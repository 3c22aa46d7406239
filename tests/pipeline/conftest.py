"""Provides fixtures to tests that compare steps."""

from tests.training.conftest import reference

__all__ = ["reference"]
