"""Exchanges values in host memory between ranks, such as counts, decisions, names and batches."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_ds.parallel.host_value import allocate_tensors, as_bytes, pack, unpack

_FIRST_BYTES = 1024
"""Size in bytes of a value's first message. A short value needs no second message."""
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class HostGroup:
    """Exchanges values in host memory between ranks over gloo. A group of one rank sends nothing.

    Values in host memory need their own process group, because NCCL rejects CPU tensors. In each process, `Mesh.host`
    is the `HostGroup` of all ranks. `Mesh.host.among` returns subgroups for the axes of the mesh. The main thread uses
    these groups. A background thread that communicates needs its own group (`build_host_group`).

    Messages follow binomial trees. A sum over P ranks takes 2 log2(P) consecutive messages, such as 18 for 512 ranks,
    and connects each rank to at most log2(P) others. In contrast, gloo's all-reduce takes 2 P messages in a ring and
    connects all pairs. Sums are bitwise equal on all ranks.

    All ranks of a group must call the methods in the same order. Values must be of the types that `host_value.pack`
    accepts; nothing is pickled. An operation that exceeds the group's timeout raises gloo's RuntimeError.
    """

    group: dist.ProcessGroup | None = None
    """Gloo process group that sends the messages; None for a single process."""
    ranks: tuple[int, ...] = (0,)
    """Members of this `HostGroup`, as ranks of the process group `group`. Methods number the members from 0 in this
    order."""
    rank: int = 0
    """Number of this rank within this group."""

    @property
    def size(self) -> int:
        """Returns the number of ranks in this group."""
        return len(self.ranks)

    def among(self, ranks: Iterable[int]) -> "HostGroup":
        """Returns the subgroup of the given ranks, which must include this rank. Sends nothing.

        Args:
            ranks: members of the subgroup, by their ranks in this group. Their ranks in the subgroup count from 0, in
                the order of this argument.
        """
        chosen = tuple(ranks)
        return HostGroup(self.group, tuple(self.ranks[rank] for rank in chosen), chosen.index(self.rank))

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of a CPU tensor over all ranks. Shapes and dtypes must be equal on all ranks."""
        _check_host(values)
        total = values.clone(memory_format=torch.contiguous_format)
        if self.size > 1 and total.numel():
            self._reduce(total)
            self._spread(as_bytes(total))
        return total

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks in rank order, on every rank."""
        if self.size == 1:
            return [value]
        return list(self.broadcast(self.collect(value)))

    def collect(self, value: Any) -> list[Any] | None:
        """Returns the values of all ranks in rank order on rank 0, and None on other ranks."""
        held: list[Any] = [value]
        for distance in self._distances():
            if self.rank & distance:
                self._send_value(held, self.rank - distance)
                return None
            if self.rank + distance < self.size:
                held += self._receive_value(self.rank + distance)
        return held

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """Returns the value of rank `src`, on every rank."""
        if self.size == 1:
            return value
        src %= self.size
        number = (self.rank - src) % self.size
        header, tensors = pack(value) if number == 0 else (b"", [])
        for distance in reversed(self._distances()):
            if number % (2 * distance) == distance:
                header, tensors = self._receive_parts((self.rank - distance) % self.size)
            elif number % (2 * distance) == 0 and number + distance < self.size:
                self._send_parts(header, tensors, (self.rank + distance) % self.size)
        return value if number == 0 else unpack(header, tensors)

    def barrier(self) -> None:
        """Waits until all ranks of the group have called this method."""
        self.sum(torch.zeros(1, dtype=torch.uint8))

    def _distances(self) -> list[int]:
        """Returns the distance between communicating ranks in each round of a binomial tree: 1, 2, 4, and so on."""
        return [1 << number for number in range((self.size - 1).bit_length())]

    def _reduce(self, total: Tensor) -> None:
        """Sums the tensors of all ranks into rank 0's tensor, and overwrites other ranks' tensors with partial sums."""
        arriving = torch.empty_like(total)
        for distance in self._distances():
            if self.rank & distance:
                self._send(as_bytes(total), self.rank - distance)
                return
            if self.rank + distance < self.size:
                self._receive(as_bytes(arriving), self.rank + distance)
                total += arriving

    def _spread(self, values: Tensor) -> None:
        """Overwrites each rank's tensor with rank 0's tensor. All ranks pass tensors of the same shape and dtype."""
        for distance in reversed(self._distances()):
            if self.rank % (2 * distance) == distance:
                self._receive(values, self.rank - distance)
            elif self.rank % (2 * distance) == 0 and self.rank + distance < self.size:
                self._send(values, self.rank + distance)

    def _send_value(self, value: Any, dst: int) -> None:
        self._send_parts(*pack(value), dst)

    def _receive_value(self, src: int) -> Any:
        return unpack(*self._receive_parts(src))

    def _send_parts(self, header: bytes, tensors: list[Tensor], dst: int) -> None:
        start = len(header).to_bytes(_LENGTH_BYTES, "little") + header[: _FIRST_BYTES - _LENGTH_BYTES]
        self._send(torch.frombuffer(bytearray(start.ljust(_FIRST_BYTES, b" ")), dtype=torch.uint8), dst)
        if rest := header[_FIRST_BYTES - _LENGTH_BYTES :]:
            self._send(torch.frombuffer(bytearray(rest), dtype=torch.uint8), dst)
        for tensor in tensors:
            if tensor.numel():
                self._send(as_bytes(tensor), dst)

    def _receive_parts(self, src: int) -> tuple[bytes, list[Tensor]]:
        first = torch.empty(_FIRST_BYTES, dtype=torch.uint8)
        self._receive(first, src)
        start = first.numpy().tobytes()
        length, header = int.from_bytes(start[:_LENGTH_BYTES], "little"), start[_LENGTH_BYTES:]
        if length > len(header):
            rest = torch.empty(length - len(header), dtype=torch.uint8)
            self._receive(rest, src)
            header += rest.numpy().tobytes()
        header = header[:length]
        tensors = allocate_tensors(header)
        for tensor in tensors:
            if tensor.numel():
                self._receive(as_bytes(tensor), src)
        return header, tensors

    def _send(self, values: Tensor, dst: int) -> None:
        dist.send(values, group=self.group, group_dst=self.ranks[dst])

    def _receive(self, values: Tensor, src: int) -> None:
        dist.recv(values, group=self.group, group_src=self.ranks[src])


def build_host_group(timeout: timedelta) -> HostGroup:
    """Builds a `HostGroup` over all ranks of the default process group. All ranks must call this function.

    Args:
        timeout: maximum time that an operation may wait.
    """
    if dist.get_world_size() == 1:
        return HostGroup()
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return HostGroup(group, tuple(range(group.size())), group.rank())


def _check_host(values: Tensor) -> None:
    assert values.device.type == "cpu", f"a tensor on {values.device} is not a host value"
