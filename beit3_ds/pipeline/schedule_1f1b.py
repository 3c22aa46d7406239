"""In which order a stage of a pipeline works: a pure function of sizes."""

from typing import NamedTuple


class Action(NamedTuple):
    """The forward or backward pass of one micro-batch through one of a stage's runs of layers."""

    forward: bool
    micro_batch: int
    run: int
    """Number among the stage's own runs, from 0."""


def schedule_1f1b(num_micro_batches: int, stage: int, num_stages: int, num_runs: int = 1) -> list[Action]:
    """The order of 1F1B, interleaved if a stage holds several runs (Narayanan et al., 2021, arXiv:2104.04473, 2.2).

    After a warm-up of forward passes every forward is followed by a backward, so a stage keeps the activations of as
    few micro-batches as it can. One stage does one forward, one backward.

    Args:
        num_micro_batches: of one step; a multiple of `num_stages` if there are several runs.
        stage: whose order is wanted.
        num_stages: of the pipeline.
        num_runs: runs of layers that each stage holds.
    """
    assert num_runs == 1 or num_micro_batches % num_stages == 0, "interleaving needs a multiple of the stages"
    total = num_micro_batches * num_runs
    warm_up = num_stages - stage - 1
    if num_runs > 1:
        warm_up = 2 * warm_up + (num_runs - 1) * num_stages
    warm_up = min(total, warm_up)
    forwards = [_action(True, k, num_stages, num_runs) for k in range(total)]
    backwards = [_action(False, k, num_stages, num_runs) for k in range(total)]
    steady = [action for pair in zip(forwards[warm_up:], backwards, strict=False) for action in pair]
    return forwards[:warm_up] + steady + backwards[total - warm_up :]


def _action(forward: bool, k: int, num_stages: int, num_runs: int) -> Action:
    """The k-th pass of its direction: groups of as many micro-batches as there are stages go through run after run."""
    if num_runs == 1:
        return Action(forward, k, 0)
    group, place = divmod(k, num_stages * num_runs)
    run, micro_batch = divmod(place, num_stages)
    return Action(forward, group * num_stages + micro_batch, run if forward else num_runs - 1 - run)
