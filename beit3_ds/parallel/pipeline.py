"""The stages of a pipeline and the messages between neighbours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from beit3_ds.parallel.host_group import HostGroup

ChannelKey = tuple[bool, bool]
"""Whether activations (not gradients) travel, and whether to a stage of a higher number."""


@dataclass(frozen=True)
class PipelineParallel:
    """This rank's place among the stages that hold different layers. A pipeline of one is valid and silent.

    Messages travel in rings: activations to the next stage, and from the last to the first where layers are
    interleaved; gradients the other way. Each kind and direction has a process group of its own, so two neighbours that
    send to each other at the same time never wait for each other's receive: within a group a pair sends one way only.
    """

    ranks: tuple[int, ...] = (0,)
    """Their global ranks, in order."""
    rank: int = 0
    """This rank's stage."""
    channels: Mapping[ChannelKey, dist.ProcessGroup] = field(default_factory=dict)
    """Process groups of the messages, which are device tensors."""
    host: HostGroup = field(default_factory=HostGroup)
    """The stages, in order, for host values."""

    @property
    def size(self) -> int:
        """Stages."""
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        """True on the stage that embeds."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """True on the stage that holds the heads."""
        return self.rank == self.size - 1

    def send(self, x: Tensor, *, forward: bool) -> "Message":
        """Starts to send an activation to the next stage, or a gradient to the one before; returns at once."""
        work = dist.isend(x, group=self._channel(forward, self.rank, self._next(forward)), dst=self._peer(forward))
        return Message(x, work)

    def receive(self, x: Tensor, *, forward: bool) -> "Message":
        """Starts to fill `x` with the activation of the stage before, or the gradient of the next one."""
        source = self._next(not forward)
        work = dist.irecv(x, group=self._channel(forward, source, self.rank), src=self.ranks[source])
        return Message(x, work)

    def _next(self, forward: bool) -> int:
        return (self.rank + (1 if forward else -1)) % self.size

    def _peer(self, forward: bool) -> int:
        return self.ranks[self._next(forward)]

    def _channel(self, forward: bool, source: int, target: int) -> dist.ProcessGroup:
        return self.channels[forward, source < target]


@dataclass(frozen=True)
class Message:
    """A tensor on its way."""

    tensor: Tensor
    """What is sent, kept alive until it is; or where it arrives."""
    work: Any

    def has_left(self) -> bool:
        """Whether the tensor is known to have left, so that it need not be kept; gloo only knows after `wait`."""
        return bool(self.work.is_completed())

    def wait(self) -> Tensor:
        """Waits until the tensor has left or arrived, and returns it."""
        self.work.wait()
        return self.tensor


def build_pipeline_parallel(
    rows: Tensor, rank: int, host: HostGroup, own_group: Callable[[Tensor], dist.ProcessGroup]
) -> PipelineParallel:
    """Makes the groups of all pipelines; all ranks call it.

    Args:
        rows: global ranks of one pipeline a row, by stage.
        rank: this rank's stage.
        host: all ranks, for host values.
        own_group: builds the groups of rows and returns the group of this rank.
    """
    if rows.shape[1] == 1:
        return PipelineParallel()
    (own,) = (row for row in rows.tolist() if dist.get_rank() in row)
    channels = {(forward, upwards): own_group(rows) for forward in (True, False) for upwards in (True, False)}
    return PipelineParallel(tuple(own), rank, channels, host.among(own))
