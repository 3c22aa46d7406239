"""What ranks tell each other from host memory: counts, verdicts, names, batches; never tensors of a device."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_ds.parallel.host_value import as_bytes, pack, unpack, unpack_tensors

_FIRST_BYTES = 1024
"""What the first message of a value holds of it, at least its length: a short value is one message."""
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class HostGroup:
    """Ranks that exchange values of their hosts' memory over gloo. A group of one is valid and silent.

    Groups of devices serve one type of device: NCCL refuses tensors of the CPU. So what the host knows goes through
    this group, and device tensors never do. A process has one such group over all ranks, `Mesh.host`; the axes of the
    mesh see parts of it (`among`), which costs no process group. Threads beside the main one need a group of their own
    (`build_host_group`): the messages of one group arrive in the order in which they are sent.

    Everything is a message between two ranks, along binomial trees: a sum over P ranks takes 2 log2(P) messages after
    another, 18 with 512 ranks, and a rank connects to log2(P) others. (gloo's own all-reduce is a ring of 2 P messages,
    and a group that is not lazy connects each rank to all others.) Sums are equal on all ranks to the bit.

    All ranks of a group call its methods, in the same order. What they exchange are numbers, strings, tensors, and
    lists, tuples and dicts of these (`host_value.pack`); nothing is pickled. An operation fails with gloo's
    RuntimeError after the group's time-out.
    """

    group: dist.ProcessGroup | None = None
    """gloo's group that carries the messages; None for a process alone."""
    ranks: tuple[int, ...] = (0,)
    """The ranks that take part, by their numbers in `group`; methods number them from 0."""
    rank: int = 0
    """This rank's number among them."""

    @property
    def size(self) -> int:
        """Ranks that take part."""
        return len(self.ranks)

    def among(self, ranks: Iterable[int]) -> "HostGroup":
        """A part of this group that this rank is in; sends nothing.

        Args:
            ranks: their numbers in this group, in the order of their new numbers.
        """
        chosen = tuple(ranks)
        return HostGroup(self.group, tuple(self.ranks[rank] for rank in chosen), chosen.index(self.rank))

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of `values`, of one shape and type on all ranks, on the CPU."""
        _check_host(values)
        total = values.clone(memory_format=torch.contiguous_format)
        if self.size > 1 and total.numel():
            self._reduce(total)
            self._spread(as_bytes(total))
        return total

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in order, on all of them."""
        if self.size == 1:
            return [value]
        return list(self.broadcast(self.collect(value)))

    def collect(self, value: Any) -> list[Any] | None:
        """Returns the values of all ranks, in order, on the first one, and None on the others."""
        held: list[Any] = [value]
        for distance in self._distances():
            if self.rank & distance:
                self._send_value(held, self.rank - distance)
                return None
            if self.rank + distance < self.size:
                held += self._receive_value(self.rank + distance)
        return held

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Returns the value that rank `source` of this group brings, on all of its ranks."""
        if self.size == 1:
            return value
        source %= self.size
        number = (self.rank - source) % self.size
        header, tensors = pack(value) if number == 0 else (b"", [])
        for distance in reversed(self._distances()):
            if number % (2 * distance) == distance:
                header, tensors = self._receive_parts((self.rank - distance) % self.size)
            elif number % (2 * distance) == 0 and number + distance < self.size:
                self._send_parts(header, tensors, (self.rank + distance) % self.size)
        return value if number == 0 else unpack(header, tensors)

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        self.sum(torch.zeros(1, dtype=torch.uint8))

    def _distances(self) -> list[int]:
        """1, 2, 4 and so on: how far from each other the ranks of each round of a tree are."""
        return [1 << number for number in range((self.size - 1).bit_length())]

    def _reduce(self, total: Tensor) -> None:
        """Adds up tensors on rank 0, in place; the others' become partial sums."""
        arriving = torch.empty_like(total)
        for distance in self._distances():
            if self.rank & distance:
                self._send(as_bytes(total), self.rank - distance)
                return
            if self.rank + distance < self.size:
                self._receive(as_bytes(arriving), self.rank + distance)
                total += arriving

    def _spread(self, values: Tensor) -> None:
        """Overwrites a tensor, of one size on all ranks, by that of rank 0."""
        for distance in reversed(self._distances()):
            if self.rank % (2 * distance) == distance:
                self._receive(values, self.rank - distance)
            elif self.rank % (2 * distance) == 0 and self.rank + distance < self.size:
                self._send(values, self.rank + distance)

    def _send_value(self, value: Any, to: int) -> None:
        self._send_parts(*pack(value), to)

    def _receive_value(self, source: int) -> Any:
        return unpack(*self._receive_parts(source))

    def _send_parts(self, header: bytes, tensors: list[Tensor], to: int) -> None:
        start = len(header).to_bytes(_LENGTH_BYTES, "little") + header[: _FIRST_BYTES - _LENGTH_BYTES]
        self._send(torch.frombuffer(bytearray(start.ljust(_FIRST_BYTES, b" ")), dtype=torch.uint8), to)
        if rest := header[_FIRST_BYTES - _LENGTH_BYTES :]:
            self._send(torch.frombuffer(bytearray(rest), dtype=torch.uint8), to)
        for tensor in tensors:
            if tensor.numel():
                self._send(as_bytes(tensor), to)

    def _receive_parts(self, source: int) -> tuple[bytes, list[Tensor]]:
        first = torch.empty(_FIRST_BYTES, dtype=torch.uint8)
        self._receive(first, source)
        start = first.numpy().tobytes()
        length, header = int.from_bytes(start[:_LENGTH_BYTES], "little"), start[_LENGTH_BYTES:]
        if length > len(header):
            rest = torch.empty(length - len(header), dtype=torch.uint8)
            self._receive(rest, source)
            header += rest.numpy().tobytes()
        header = header[:length]
        tensors = unpack_tensors(header)
        for tensor in tensors:
            if tensor.numel():
                self._receive(as_bytes(tensor), source)
        return header, tensors

    def _send(self, values: Tensor, to: int) -> None:
        dist.send(values, group=self.group, group_dst=self.ranks[to])

    def _receive(self, values: Tensor, source: int) -> None:
        dist.recv(values, group=self.group, group_src=self.ranks[source])


def build_host_group(timeout: timedelta) -> HostGroup:
    """Makes a group over all ranks of the initialised process group; all ranks call it.

    Args:
        timeout: how long its operations wait.
    """
    if dist.get_world_size() == 1:
        return HostGroup()
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return HostGroup(group, tuple(range(group.size())), group.rank())


def _check_host(values: Tensor) -> None:
    assert values.device.type == "cpu", f"a tensor on {values.device} is no value of the host"
