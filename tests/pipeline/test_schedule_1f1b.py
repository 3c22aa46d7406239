"""Tests the 1F1B order: complete, matching between stages, free of deadlocks, and lean in memory and time."""

from collections import defaultdict, deque
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.pipeline.schedule_1f1b import Action, schedule_1f1b

Channel = tuple[bool, int, int]
"""True for activations and False for gradients; sending stage; receiving stage."""


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[int, int, int]:
    """Draws a valid number of micro-batches, stages, and model chunks per stage."""
    stages, chunks = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    if stages == 1 or chunks == 1:
        return draw(st.integers(stages, 4 * stages)), stages, 1
    return stages * draw(st.integers(1, 4)), stages, chunks


class Stage:
    """Simulates a stage of `Schedule`, which begins to receive the next action's tensor before it computes."""

    def __init__(self, stage: int, sizes: tuple[int, int, int], channels: dict[Channel, deque[Any]]) -> None:
        micro_batches, self.num_stages, self.num_chunks = sizes
        self.stage, self.channels = stage, channels
        self.actions = deque(schedule_1f1b(micro_batches, stage, self.num_stages, self.num_chunks))
        self.asked = self.source(self.actions[0])
        self.in_flight = self.most_in_flight = 0

    def chunk(self, action: Action) -> int:
        """Returns the index of the action's model chunk among the chunks of all stages."""
        return action.chunk * self.num_stages + self.stage

    def source(self, action: Action) -> Channel | None:
        """Returns the channel on which an action's tensor arrives, or None; messages of a channel arrive in order."""
        if self.chunk(action) == (0 if action.forward else self.num_stages * self.num_chunks - 1):
            return None
        return action.forward, (self.stage + (-1 if action.forward else 1)) % self.num_stages, self.stage

    def work(self) -> bool:
        """Runs the next action if its tensor has arrived; returns whether it ran."""
        if not self.actions or (self.asked is not None and not self.channels[self.asked]):
            return False
        action = self.actions.popleft()
        if self.asked is not None:
            message = self.channels[self.asked].popleft()
            assert message == (action.micro_batch, self.chunk(action)), f"stage {self.stage}: {message} for {action}"
        self.asked = self.source(self.actions[0]) if self.actions else None
        self.in_flight += 1 if action.forward else -1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        following = self.chunk(action) + (1 if action.forward else -1)
        if 0 <= following < self.num_stages * self.num_chunks:
            target = (self.stage + (1 if action.forward else -1)) % self.num_stages
            self.channels[action.forward, self.stage, target].append((action.micro_batch, following))
        return True


@settings(deadline=None)
@given(pipelines())
def test_every_pass_once_and_forward_first(sizes: tuple[int, int, int]) -> None:
    micro_batches, num_stages, num_chunks = sizes
    for stage in range(num_stages):
        actions = schedule_1f1b(micro_batches, stage, num_stages, num_chunks)
        expected = {Action(f, m, r) for f in (True, False) for m in range(micro_batches) for r in range(num_chunks)}
        assert len(actions) == len(expected) and set(actions) == expected
        place = {action: i for i, action in enumerate(actions)}
        for action in expected:
            if action.forward:
                assert place[action] < place[action._replace(forward=False)]
                if action.chunk:
                    assert place[action._replace(chunk=action.chunk - 1)] < place[action]


@settings(deadline=None)
@given(pipelines(), st.integers(0, 2**32))
def test_stages_never_wait_for_each_other_in_a_circle(sizes: tuple[int, int, int], seed: int) -> None:
    """Checks that stages of any speed never deadlock, and that messages of a channel arrive in the expected order."""
    random, channels = Random(seed), defaultdict(deque)
    stages = [Stage(stage, sizes, channels) for stage in range(sizes[1])]
    while any(stage.actions for stage in stages):
        order = random.sample(stages, len(stages))
        assert any(stage.work() for stage in order), f"stuck before {[stage.actions[0] for stage in stages]}"
    assert not any(channels.values()), "messages that nobody took"
    assert all(stage.in_flight == 0 for stage in stages)


@settings(deadline=None)
@given(pipelines())
def test_activations_in_flight(sizes: tuple[int, int, int]) -> None:
    """Checks that a stage keeps activations of at most warm-up + 1 passes of model chunks (Narayanan et al., 2021)."""
    micro_batches, num_stages, num_chunks = sizes
    channels: dict[Channel, deque[Any]] = defaultdict(deque)
    stages = [Stage(stage, sizes, channels) for stage in range(num_stages)]
    while any(stage.work() for stage in stages):
        pass
    for stage in stages:
        behind = num_stages - stage.stage - 1
        warm_up = behind if num_chunks == 1 else 2 * behind + (num_chunks - 1) * num_stages
        assert stage.most_in_flight == min(micro_batches * num_chunks, warm_up + 1)


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(1, 4))
def test_time_that_stages_idle(num_stages: int, groups: int) -> None:
    """Checks that the bubble is 2 (stages - 1) units if each pass takes one unit; a wrong order makes it larger."""
    sizes = (groups * num_stages, num_stages, 1)
    channels: dict[Channel, deque[Any]] = defaultdict(deque)
    stages = [Stage(stage, sizes, channels) for stage in range(num_stages)]
    units = 0
    while any(stage.actions for stage in stages):
        # All stages that can work with messages from before this unit work in parallel.
        able = [stage for stage in stages if stage.actions and (stage.asked is None or channels[stage.asked])]
        for stage in able:
            stage.work()
        units += 1
    assert units == 2 * sizes[0] + 2 * (num_stages - 1)
