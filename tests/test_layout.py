"""Tests that some sequences of a packed batch form a packed batch with the same rows."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.layout import SequenceLayout

LENGTHS = st.lists(st.integers(1, 9), max_size=4).map(tuple)


@given(st.data(), st.integers(0, 4), LENGTHS, LENGTHS, st.integers(2, 6))
def test_kept_sequences_are_the_same_rows(
    data: st.DataObject, images: int, captions: tuple[int, ...], texts: tuple[int, ...], image_length: int
) -> None:
    layout = SequenceLayout(images, captions, texts, image_length, causal_captions=bool(images % 2))
    total = len(layout.sequence_ranges)
    flags = data.draw(st.lists(st.booleans(), min_size=total, max_size=total))
    kept = layout.keep(flags)
    expected = [ranges for ranges, keep in zip(layout.sequence_ranges, flags, strict=True) if keep]
    assert len(kept.rows) == kept.layout.num_rows
    assert kept.layout.causal_captions == layout.causal_captions
    assert torch.equal(kept.rows, kept.rows.unique()), "ascending, each row once"
    for new_ranges, old_ranges in zip(kept.layout.sequence_ranges, expected, strict=True):
        for (start, stop), old in zip(new_ranges, old_ranges, strict=True):
            assert kept.rows[start:stop].tolist() == list(range(*old))
    for experts in (("shared",), ("vision", "language"), ("vision", "vision_language", "language")):
        new, old = kept.layout.expert_slices(experts), layout.expert_slices(experts)
        for (start, stop), (first, last) in zip(new, old, strict=True):
            assert all(first <= row < last for row in kept.rows[start:stop].tolist())


@given(st.integers(0, 4), LENGTHS, LENGTHS, st.integers(2, 6))
def test_first_rows_are_those_of_the_ranges(
    images: int, captions: tuple[int, ...], texts: tuple[int, ...], image_length: int
) -> None:
    layout = SequenceLayout(images, captions, texts, image_length)
    starts = [[start for start, _ in ranges] for ranges in layout.sequence_ranges]
    pairs = starts[images : images + len(captions)]
    by_part = [
        [start for (start,) in starts[:images]],
        [first for first, _ in pairs],
        [second for _, second in pairs],
        [start for (start,) in starts[images + len(captions) :]],
    ]
    for parts in ((1,), (0, 3), (0, 1, 2, 3)):
        picked = layout.first_rows(*parts)
        assert picked.rows.tolist() == [row for part in parts for row in by_part[part]]
        assert picked.counts == tuple(len(by_part[part]) if part in parts else 0 for part in range(4))


@given(st.integers(0, 3), LENGTHS, LENGTHS, st.sampled_from(["shared", "modality", "fused"]))
def test_experts_cover_all_rows(images: int, captions: tuple[int, ...], texts: tuple[int, ...], kind: str) -> None:
    """Checks that an expert without rows may be absent, and that a missing expert with rows is an error."""
    layout = SequenceLayout(images, captions, texts, 2)
    a, b, c, end = layout.boundaries
    slices = {
        "shared": {"shared": (0, end)},
        "modality": {"vision": (0, b), "language": (b, end)},
        "fused": {"vision": (0, a), "vision_language": (a, c), "language": (c, end)},
    }[kind]
    for count in range(1, len(slices) + 1):
        for experts in itertools.combinations(slices, count):
            fused = "vision_language" in experts or kind != "fused"
            rows = slices if fused else {"vision": (0, b), "language": (b, end)}
            if sum(stop - start for start, stop in map(rows.__getitem__, experts)) == end:
                assert layout.expert_slices(experts) == [rows[expert] for expert in experts]
            else:
                with pytest.raises(AssertionError, match="need the expert"):
                    layout.expert_slices(experts)
