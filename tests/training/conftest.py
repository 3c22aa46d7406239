"""Builds the fixtures of tests that compare steps."""

import pytest

from tests.training.steps import MODELS, Reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Returns the steps of every model in one process."""
    return Reference(tmp_path_factory.mktemp("reference")).prepare(MODELS)
