"""Chooses the largest number of ranks that a run can use on the available hosts."""

from collections.abc import Callable, Sequence

from beit3_ds.cluster.hostfile import HostSlots


def largest_fit(
    hosts: Sequence[HostSlots], fits: Callable[[int], bool], *, equal_slots: bool, min_ranks: int = 1
) -> list[HostSlots] | None:
    """Chooses hosts and slots for the largest number of ranks that a run can use.

    Args:
        hosts: available hosts, in the order of their ranks.
        fits: function that returns whether the run can use a given number of ranks.
        equal_slots: whether all chosen hosts must have the same number of ranks.
        min_ranks: minimum number of ranks.

    Returns:
        The chosen hosts in order, each with the number of slots to use; None if no number of ranks fits. With
        `equal_slots`, as few hosts as possible are chosen. Without `equal_slots`, every chosen host except the last
        uses all of its slots.
    """
    for world_size in range(sum(host.slots for host in hosts), min_ranks - 1, -1):
        if fits(world_size) and (chosen := _choose(hosts, world_size, equal_slots)):
            return chosen
    return None


def _choose(hosts: Sequence[HostSlots], world_size: int, equal_slots: bool) -> list[HostSlots] | None:
    if not equal_slots:
        chosen, left = [], world_size
        for host in hosts:
            if left > 0:
                chosen.append(HostSlots(host.name, min(host.slots, left)))
                left -= host.slots
        return chosen
    for count in range(1, len(hosts) + 1):
        slots, rest = divmod(world_size, count)
        large_enough = [host for host in hosts if host.slots >= slots]
        if rest == 0 and len(large_enough) >= count:
            return [HostSlots(host.name, slots) for host in large_enough[:count]]
    return None
