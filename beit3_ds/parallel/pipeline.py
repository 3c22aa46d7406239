"""Sends activations and gradients between neighbouring pipeline stages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from beit3_ds.parallel.host_group import HostGroup

ChannelKey = tuple[bool, bool]
"""Kind and direction of a message. The first value is True for an activation and False for a gradient. The second value
is True if the receiving stage has a higher number than the sending stage."""


@dataclass(frozen=True)
class PipelineParallel:
    """Describes this rank's pipeline stage and the process groups between stages. A single stage sends nothing.

    The stages form a ring. Activations go from each stage to the next one. With several model chunks per stage, they
    also go from the last stage to the first. Gradients go in the opposite direction. With several stages, these
    messages use four process groups. Activations and gradients use different groups. Messages to a higher stage number
    and messages to a lower stage number also use different groups. Two neighbours can therefore send to each other at
    the same time.
    """

    ranks: tuple[int, ...] = (0,)
    """Global rank of each stage, in order."""
    rank: int = 0
    """Stage of this rank, from 0."""
    channels: Mapping[ChannelKey, dist.ProcessGroup] = field(default_factory=dict)
    """Process group for each kind and direction of message. The groups accept device tensors only."""
    host: HostGroup = field(default_factory=HostGroup)
    """Group of this pipeline's stages, in order, for values in host memory."""

    @property
    def size(self) -> int:
        """Returns the number of stages."""
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        """Returns whether this is the first stage, which holds the embeddings."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Returns whether this is the last stage, which holds the head."""
        return self.rank == self.size - 1

    def send(self, x: Tensor, *, forward: bool) -> "Message":
        """Starts sending an activation to the next stage (`forward`) or a gradient to the previous stage."""
        work = dist.isend(x, group=self._channel(forward, self.rank, self._next(forward)), dst=self._peer(forward))
        return Message(x, work)

    def receive(self, x: Tensor, *, forward: bool) -> "Message":
        """Starts receiving into `x`: the previous stage's activation (`forward`) or the next stage's gradient."""
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
    """Holds a tensor that is being sent or received."""

    tensor: Tensor
    """Tensor to send, or tensor to receive into. It must exist until the transfer is complete."""
    work: Any

    def is_complete(self) -> bool:
        """Returns whether the tensor has been transferred and may be freed. With gloo, True only after `wait`."""
        return bool(self.work.is_completed())

    def wait(self) -> Tensor:
        """Waits until the tensor has been sent or received, and returns it."""
        self.work.wait()
        return self.tensor


def build_pipeline_parallel(
    rows: Tensor, rank: int, host: HostGroup, own_group: Callable[[Tensor], dist.ProcessGroup]
) -> PipelineParallel:
    """Builds this rank's pipeline and its process groups. All ranks must call this function.

    Args:
        rows: global ranks of each pipeline, one pipeline per row, in the order of stages.
        rank: index of this rank within its pipeline, from 0; equal to the index of its stage.
        host: group of all ranks for values in host memory.
        own_group: function that builds one process group per row and returns this rank's group.
    """
    if rows.shape[1] == 1:
        return PipelineParallel()
    (own,) = (row for row in rows.tolist() if dist.get_rank() in row)
    channels = {(forward, upwards): own_group(rows) for forward in (True, False) for upwards in (True, False)}
    return PipelineParallel(tuple(own), rank, channels, host.among(own))
