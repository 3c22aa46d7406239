"""Tests that each sample occurs once per epoch although the data change between restarts."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.data.order.positions import StreamPosition
from beit3_ds.data.order.resuming import continue_stream, new_position
from beit3_ds.data.order.source_matching import FoundSource
from beit3_ds.data.order.stored_position import position_from_json
from beit3_ds.data.order.stream import StreamOrder, order_from_start

Names = list[str]


class SimulatedRun:
    """Simulates a stream over lists of names; stores its position as JSON and resumes from it."""

    def __init__(self, sources: dict[str, Names], weights: Sequence[float] | None = None, samples: int = 3) -> None:
        self.sources = {path: list(names) for path, names in sources.items()}
        self.weights, self.samples, self.seed = weights, samples, 1
        self.position = new_position("images", self.seed, samples, weights, self.found())
        self.seen: list[tuple[int, str, str]] = []
        """Epoch, path and name of all samples so far, in order."""

    def found(self) -> list[FoundSource]:
        return [FoundSource(path=path, size=len(n), digest=_digest_of(n)) for path, n in self.sources.items()]

    def take(self, steps: int) -> None:
        """Takes the samples of some steps and stores the position."""
        order = StreamOrder(self.position)
        names = [(path, name) for path, names in self.sources.items() for name in names]
        for step in range(steps):
            epochs, numbers = order(np.arange(step * self.samples, (step + 1) * self.samples))
            self.seen += [(e, *names[i]) for e, i in zip(epochs.tolist(), numbers.tolist(), strict=True)]
        self.position = _through_json(self.position.advanced(steps * self.samples))

    def restart(self) -> list[str]:
        """Resumes with the current settings; returns the described changes."""
        self.position, changes = continue_stream(self.position, self.seed, self.samples, self.weights, self.found())
        self.position = _through_json(self.position)
        return changes

    def check_no_repeats(self) -> None:
        repeated = [sample for sample, count in Counter(self.seen).items() if count > 1]
        assert not repeated, repeated[:5]


def _digest_of(names: Names):  # type: ignore[no-untyped-def]
    return lambda count: hashlib.sha256(repr(names[:count]).encode()).hexdigest()


def _through_json(position: StreamPosition) -> StreamPosition:
    return position_from_json(position.stream, json.loads(json.dumps(position.to_json())))


def _names(path: str, first: int, last: int) -> Names:
    return [f"{path}{number}" for number in range(first, last)]


def _sources(**sizes: int) -> dict[str, Names]:
    return {path: _names(path, 0, size) for path, size in sizes.items()}


def test_unchanged_data_continue_as_if_never_stopped() -> None:
    for weights in (None, (1.0, 2.0)):
        stopped, undisturbed = (SimulatedRun(_sources(a=11, b=7), weights) for _ in range(2))
        for steps in (1, 3, 4, 9):
            stopped.take(steps)
            assert stopped.restart() == []
        undisturbed.take(17)
        assert stopped.seen == undisturbed.seen
        # and as runs did before positions were stored
        epochs, numbers = order_from_start(1, "images", (11, 7), weights)(np.arange(51))
        assert [epoch for epoch, *_ in undisturbed.seen] == epochs.tolist()
        names = [*_names("a", 0, 11), *_names("b", 0, 7)]
        assert [name for *_, name in undisturbed.seen] == [names[i] for i in numbers]


@pytest.mark.parametrize("weights", [None, (1.0, 2.0)])
def test_another_batch_takes_the_same_samples(weights: Sequence[float] | None) -> None:
    changed, undisturbed = (SimulatedRun(_sources(a=11, b=7), weights) for _ in range(2))
    changed.take(3)
    changed.samples = 5
    assert changed.restart() == ["data.images: samples_per_step 3 -> 5: every source continues there"]
    changed.take(6)
    undisturbed.take(13)
    assert changed.seen == undisturbed.seen  # catches a position that is counted in steps


def test_a_grown_source_shows_remaining_and_new_samples() -> None:
    run = SimulatedRun(_sources(a=10, b=20))
    run.take(4)
    run.sources["a"] += _names("a", 10, 16)
    changes = run.restart()
    assert changes == ["data.images: source 'a' grew from 10 to 16 samples: the 6 new ones join its epoch"]
    run.take(8)
    first_epoch = [sample for sample in run.seen if sample[0] == 0]
    assert len(run.seen) == 36
    assert sorted(first_epoch) == sorted((0, name[0], name) for name in [*_names("a", 0, 16), *_names("b", 0, 20)])
    late = [name for _, _, name in run.seen[12:] if name in _names("a", 10, 16)]
    assert late != sorted(late)  # catches new samples that come in a row
    run.take(12)
    assert {epoch for epoch, *_ in run.seen[36:]} == {1}
    run.check_no_repeats()


def test_other_weights_let_each_source_continue_in_its_epoch() -> None:
    run = SimulatedRun(_sources(a=10, b=20), (1, 1))
    run.take(4)
    run.weights = (5, 1)
    assert run.restart() == ["data.images: weights 1:1 -> 5:1: each source continues in its own epoch"]
    run.take(40)
    run.check_no_repeats()
    counts = Counter((epoch, path) for epoch, path, _ in run.seen)
    last = {path: max(epoch for epoch, of, _ in run.seen if of == path) for path in "ab"}
    for (epoch, path), count in counts.items():
        assert count == len(run.sources[path]) or epoch == last[path]
    assert abs(sum(path == "a" for _, path, _ in run.seen[12:]) - 100) <= 1  # catches assignments by the old weights


def test_a_renumbered_source_begins_its_next_epoch_and_says_so() -> None:
    run = SimulatedRun(_sources(a=10, b=10))
    run.take(2)
    run.sources["a"].insert(3, "between")
    (change,) = run.restart()
    assert "source 'a' has 11 samples instead of 10, which are numbered differently" in change
    assert "repeats of samples from this epoch cannot be excluded" in change
    run.take(14)
    run.check_no_repeats()
    assert {path for epoch, path, _ in run.seen[6:] if epoch == 0} == {"b"}
    assert len([name for epoch, _, name in run.seen if epoch == 1]) == 21


def test_sources_are_matched_by_path_or_by_content() -> None:
    run = SimulatedRun(_sources(a=10, b=10))
    run.take(3)
    run.sources = {"b": run.sources["b"], "moved": run.sources["a"]}
    changes = run.restart()
    assert any("source 'a' is now 'moved'" in line for line in changes)
    assert any("come in another order" in line for line in changes)
    run.take(4)
    assert len({name for epoch, _, name in run.seen if epoch == 0}) == 20
    assert Counter(name for epoch, _, name in run.seen if epoch == 0).most_common(1)[0][1] == 1


def test_a_removed_source_may_come_back() -> None:
    run = SimulatedRun(_sources(a=30, b=30))
    run.take(5)
    a = run.sources.pop("a")
    (change,) = run.restart()
    assert "source 'a' is no longer in the config" in change
    run.take(3)
    assert {path for _, path, _ in run.seen[15:]} == {"b"}
    run.sources["a"] = a
    assert any("source 'a' is back and continues where it was" in line for line in run.restart())
    run.take(12)
    assert len({name for epoch, _, name in run.seen if epoch == 0}) == 60
    run.check_no_repeats()


ACTIONS = st.one_of(
    st.tuples(st.just("take"), st.integers(1, 12)),
    st.tuples(st.just("grow"), st.integers(0, 9)),
    st.tuples(st.just("add"), st.integers(1, 9)),
    st.tuples(st.just("remove"), st.integers(0, 9)),
    st.tuples(st.just("return"), st.integers(0, 9)),
    st.tuples(st.just("reorder"), st.integers(0, 9)),
    st.tuples(st.just("insert"), st.integers(0, 9)),
    st.tuples(st.just("weigh"), st.integers(0, 3)),
    st.tuples(st.just("batch"), st.integers(1, 7)),
    st.tuples(st.just("seed"), st.integers(1, 3)),
    st.tuples(st.just("none"), st.just(0)),
)


def _act(run: SimulatedRun, removed: dict[str, Names], action: str, number: int, count: int) -> None:
    """Makes one change to the sources; `count` makes new names unique."""
    paths = list(run.sources)
    path = paths[number % len(paths)]
    match action:
        case "grow":
            run.sources[path] += _names(f"{path}grown{count}-", 0, number + 1)
        case "add":
            run.sources[f"new{count}-"] = _names(f"new{count}-", 0, number)
        case "remove" if len(paths) > 1:
            removed[path] = run.sources.pop(path)
        case "return" if removed:
            back = list(removed)[number % len(removed)]
            run.sources[back] = removed.pop(back)
        case "reorder":
            run.sources = {p: run.sources[p] for p in [*paths[number % len(paths) :], *paths[: number % len(paths)]]}
        case "insert":
            run.sources[path].insert(0, f"{path}inserted{count}")
        case "batch":
            run.samples = number
        case "seed":
            run.seed = number
    weighs = run.weights is not None if action != "weigh" else number > 0
    run.weights = [1 + (number * i) % 4 for i in range(len(run.sources))] if weighs else None


@settings(max_examples=120, deadline=None)
@given(st.lists(ACTIONS, min_size=1, max_size=14), st.booleans())
def test_no_sample_is_repeated_in_an_epoch(actions: list[tuple[str, int]], weighted: bool) -> None:
    """Catches mistakes in the remaining samples of an epoch: filters, joins, shifted numbers and epoch counts."""
    run = SimulatedRun(_sources(a=7, b=13), (1, 2) if weighted else None)
    removed: dict[str, Names] = {}
    for count, (action, number) in enumerate(actions):
        if action == "take":
            run.take(number)
        else:
            _act(run, removed, action, number, count)
            run.restart()
    run.take(4)
    run.check_no_repeats()


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["grow", "batch", "seed", "reorder", "none"])), max_size=8),
    st.booleans(),
)
def test_every_sample_comes_once_an_epoch(changes: list[tuple[int, str]], weighted: bool) -> None:
    """Checks that every finished epoch has all samples that existed at its end, unless a source was removed."""
    run = SimulatedRun(_sources(a=7, b=13), (1, 2) if weighted else None)
    ended: dict[tuple[int, str], set[str]] = {}
    for count, (number, action) in enumerate([*changes, (30, "none")]):
        run.take(number)
        for number_of_source, (path, names) in enumerate(run.sources.items()):
            for epoch in range(run.position.sets[number_of_source if weighted else 0].epoch):
                ended.setdefault((epoch, path), set(names))
        _act(run, {}, action, max(number, 1), count)
        run.restart()
    for (epoch, path), names in ended.items():
        assert {name for e, of, name in run.seen if (e, of) == (epoch, path)} == names
    run.check_no_repeats()


def test_very_many_changes_in_an_epoch_end_it() -> None:
    """Catches a checkpoint entry, and a search for samples, that grow without limit."""
    run = SimulatedRun(_sources(a=1000), samples=1)
    said: list[str] = []
    for count in range(120):
        run.take(1)
        run.sources["a"].append(f"more{count}")
        said += run.restart()
    assert any("was changed 100 times and ends here; repeats cannot be excluded" in line for line in said)
    assert len(json.dumps(run.position.to_json())) < 20_000
    run.take(3)
    run.check_no_repeats()
