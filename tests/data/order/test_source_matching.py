"""Tests that a run's sources are recognised by path, or otherwise by content."""

from beit3_ds.data.order.positions import StreamPosition
from beit3_ds.data.order.resuming import new_position
from beit3_ds.data.order.source_matching import FoundSource, describe_changes, match_sources


def _found(path: str, content: str) -> FoundSource:
    return FoundSource(path=path, size=len(content), digest=lambda count: content[:count])


def _stored() -> StreamPosition:
    return new_position("texts", 1, 4, None, [_found("a", "abc"), _found("b", "defg"), _found("c", "hi")])


def test_each_source_is_the_same_grown_renumbered_or_new() -> None:
    sources = [_found("new", "xyz"), _found("c", "hi"), _found("a", "abcd"), _found("b", "dxfg")]
    matched = match_sources(_stored(), sources)
    assert [(match.kind, match.id) for match in matched] == [("new", 3), ("same", 2), ("grown", 0), ("renumbered", 4)]


def test_a_moved_source_is_found_by_its_content() -> None:
    matched = match_sources(_stored(), [_found("moved", "defg"), _found("a", "abc"), _found("c", "hi")])
    assert [(match.kind, match.id) for match in matched] == [("same", 1), ("same", 0), ("same", 2)]
    lines = describe_changes(_stored(), 1, 4, None, matched)
    assert any("source 'b' is now 'moved'" in line for line in lines)
    assert any("another order" in line for line in lines)


def test_what_did_not_change_is_not_told() -> None:
    matched = match_sources(_stored(), [_found("a", "abc"), _found("b", "defg"), _found("c", "hi")])
    assert describe_changes(_stored(), 1, 4, None, matched) == []
    (line,) = describe_changes(_stored(), 2, 4, None, matched)
    assert "training.seed 1 -> 2" in line
