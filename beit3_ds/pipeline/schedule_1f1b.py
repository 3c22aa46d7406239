"""Computes the order of a pipeline stage's forward and backward passes, as a pure function of sizes."""

from typing import NamedTuple


class Action(NamedTuple):
    """Describes one forward or backward pass of a micro-batch through a model chunk."""

    forward: bool
    micro_batch: int
    chunk: int
    """Index of the model chunk within the stage, from 0."""


def schedule_1f1b(num_micro_batches: int, stage: int, num_stages: int, num_chunks: int = 1) -> list[Action]:
    """Returns the order of a stage's passes in the 1F1B schedule, interleaved if stages have several model chunks.

    After a warm-up of forward passes, forward and backward passes alternate, so few activations are kept (Narayanan et
    al., 2021, arXiv:2104.04473, section 2.2).

    Args:
        num_micro_batches: number of micro-batches per step; must be a multiple of `num_stages` if `num_chunks` exceeds
            1.
        stage: index of the stage, from 0.
        num_stages: number of pipeline stages.
        num_chunks: number of model chunks per stage.
    """
    assert num_chunks == 1 or num_micro_batches % num_stages == 0, "interleaving needs a multiple of the stages"
    total = num_micro_batches * num_chunks
    warm_up = num_stages - stage - 1
    if num_chunks > 1:
        warm_up = 2 * warm_up + (num_chunks - 1) * num_stages
    warm_up = min(total, warm_up)
    forwards = [_action(True, k, num_stages, num_chunks) for k in range(total)]
    backwards = [_action(False, k, num_stages, num_chunks) for k in range(total)]
    steady = [action for pair in zip(forwards[warm_up:], backwards, strict=False) for action in pair]
    return forwards[:warm_up] + steady + backwards[total - warm_up :]


def _action(forward: bool, k: int, num_stages: int, num_chunks: int) -> Action:
    """Returns the k-th forward or backward pass of a pipeline stage, with k from 0.

    With several model chunks, micro-batches form groups of `num_stages`. A group passes through one model chunk
    completely before it enters the next model chunk.
    """
    if num_chunks == 1:
        return Action(forward, k, 0)
    group, place = divmod(k, num_stages * num_chunks)
    chunk, micro_batch = divmod(place, num_stages)
    return Action(forward, group * num_stages + micro_batch, chunk if forward else num_chunks - 1 - chunk)
