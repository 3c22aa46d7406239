"""Tests that every format needs few file calls per sample."""

from beit3_ds.benchmarks.data.call_counts import count_calls, describe_calls, time_opening


def test_calls_per_sample() -> None:
    rows = {(row.source, row.order, row.open_shards): row for row in count_calls()}
    for what in ("images", "pairs"):
        for order in ("shuffled", "shard_sequential"):
            row = rows[f"tar, {what}", order, 64]
            # catches an open per record, an index that is read, and a pair whose halves are read one by one
            assert row.opens <= 2 * 64 / 2048 + 0.01 and row.reads <= 1.01, row
        few = {order: rows[f"tar, {what}", order, 8].opens for order in ("shuffled", "shard_sequential")}
        assert few["shuffled"] > 0.8 and few["shard_sequential"] < 0.15, few
    assert rows["folder, pairs", "shuffled", 64].opens <= 2.01  # an image and a caption are two files
    assert rows["coco, pairs", "shuffled", 64].opens <= 1.01  # captions are mapped
    assert rows["texts, prepared", "shuffled", 64].reads < 0.01
    assert len(describe_calls(list(rows.values())).splitlines()) == 3 + len(rows)


def test_opening_shards_is_timed() -> None:
    assert time_opening(20).startswith("opening 20 prepared shards: ")
