"""Computes NLVR2's metrics, accuracy and consistency, of judged statements (Suhr et al., 2019, section 5)."""

from collections.abc import Iterable
from typing import NamedTuple


class JudgedStatement(NamedTuple):
    """Holds the group and the label of a statement, and the model's answer."""

    group: str
    """Name of the statement's group; statements of one group have the same sentence."""
    label: bool
    """Whether the statement is true."""
    prediction: bool
    """Whether the model judged the statement to be true."""


def score_statements(statements: Iterable[JudgedStatement]) -> dict[str, float]:
    """Returns shares from 0 to 1: `accuracy` over statements and `consistency` over groups.

    A group is consistent if all its statements are judged right. Both shares are 0 if there are no statements.
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
