"""Computes NLVR2's metrics accuracy and consistency (Suhr et al., 2019, arXiv:1811.00491, section 5)."""

from collections.abc import Iterable
from typing import NamedTuple


class JudgedStatement(NamedTuple):
    """Holds a statement's group and label, and the model's answer."""

    group: str
    """Name of the statement's group; statements of one group have the same sentence."""
    label: bool
    """Whether the statement is true."""
    prediction: bool
    """Whether the model judges the statement to be true."""


def score_statements(statements: Iterable[JudgedStatement]) -> dict[str, float]:
    """Returns `accuracy`, the share of right answers, and `consistency`, the share of groups with right answers only.

    Without statements, `accuracy` and `consistency` are 0.
    """
    num_right, num_statements = 0, 0
    consistent: dict[str, bool] = {}
    for statement in statements:
        is_right = statement.label == statement.prediction
        num_right, num_statements = num_right + is_right, num_statements + 1
        consistent[statement.group] = consistent.get(statement.group, True) and is_right
    return {
        "accuracy": num_right / max(1, num_statements),
        "consistency": sum(consistent.values()) / max(1, len(consistent)),
    }
