"""Compares accuracy and consistency with direct implementations of their definitions."""

from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.tasks.nlvr2.score import JudgedStatement, score_statements

STATEMENTS = st.lists(st.builds(JudgedStatement, st.sampled_from("abc"), st.booleans(), st.booleans()), min_size=1)


@given(STATEMENTS)
def test_equals_the_definition(statements: list[JudgedStatement]) -> None:
    right = [statement.label == statement.prediction for statement in statements]
    groups = {statement.group for statement in statements}
    consistent = [
        group
        for group in groups
        if all(is_right for statement, is_right in zip(statements, right, strict=True) if statement.group == group)
    ]
    expected = {"accuracy": sum(right) / len(right), "consistency": len(consistent) / len(groups)}
    assert score_statements(statements) == expected
    assert score_statements(statements[::-1]) == expected


def test_nothing_scores_nothing() -> None:
    assert score_statements([]) == {"accuracy": 0.0, "consistency": 0.0}
