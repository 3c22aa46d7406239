"""Prints the measured tables of docs/traffic_and_memory.md.

Usage: python -m tests.planner.table
"""

from beit3_ds.config import RunConfig
from beit3_ds.planner import rank_memory, step_traffic
from tests.planner import test_memory, test_traffic
from tests.planner.cells import SeenMemory, SeenTraffic, measure_memory, measure_traffic, rank_model_of, workloads_of
from tests.ranks import run_ranks

TRAFFIC = [
    (1, test_traffic.ONE_RANK),
    (2, test_traffic.TWO_RANKS | test_traffic.WIDE_TWO_RANKS),
    (4, test_traffic.WIDE_FOUR_RANKS),
    (8, test_traffic.EIGHT_RANKS),
]
MEMORY = [
    (1, test_memory.CELLS[1]),
    (2, test_memory.CELLS[2] | test_memory.WIDE[2]),
    (4, test_memory.CELLS[4] | test_memory.WIDE[4]),
    (8, test_memory.CELLS[8]),
]
PARTS = ("parameters", "gradients", "optimizer", "buckets", "gathered", "activations")


def main() -> None:
    """Measures every layout and prints two Markdown tables."""
    print("| layout | calls and bytes of the first rank | formula |\n|---|---|---|")
    for ranks, cells in TRAFFIC:
        ordered = pipelines_last(cells)
        for (name, config), seen in zip(ordered.items(), run(measure_traffic, ranks, ordered), strict=True):
            print_traffic(name, config, ranks, seen[0])
    print("\n| layout | " + " | ".join(PARTS) + " |\n" + "|---" * (1 + len(PARTS)) + "|")
    for ranks, cells in MEMORY:
        ordered = pipelines_last(cells)
        for (name, config), seen in zip(ordered.items(), run(measure_memory, ranks, ordered), strict=True):
            print_memory(name, config, ranks, seen[0])


def pipelines_last(cells: dict[str, RunConfig]) -> dict[str, RunConfig]:
    """Returns the layouts in an order that one set of ranks can run; see `cells._measure`."""
    return dict(sorted(cells.items(), key=lambda item: item[1].parallel.pipeline_parallel_size))


def run(measure, ranks: int, cells: dict[str, RunConfig]) -> list[tuple]:  # type: ignore[no-untyped-def]
    """Returns the observations of every rank for each layout."""
    return list(zip(*run_ranks(measure, ranks, list(cells.values()), timeout=580), strict=True))


def print_traffic(name: str, config: RunConfig, ranks: int, seen: SeenTraffic) -> None:
    """Prints the traffic of the first rank, in one line per layout."""
    volumes = step_traffic(rank_model_of(config, ranks, seen.coords), workloads_of(config, seen.coords.data)).volumes
    counted = {key: volume for key, volume in seen.traffic.items() if key[0] != "host"}
    texts = [f"{axis} {kind} {calls}, {size:,}" for (axis, kind), (calls, size) in sorted(counted.items())]
    equal = counted == {key: tuple(volume) for key, volume in volumes.items()}
    print(f"| {name} | {'; '.join(texts) or 'nothing'} | {'equal' if equal else 'NOT EQUAL'} |")


def print_memory(name: str, config: RunConfig, ranks: int, seen: SeenMemory) -> None:
    """Prints the memory of the first rank, in one line per layout.

    The formula's difference is printed if it is at least 0.01%.
    """
    memory = rank_memory(
        rank_model_of(config, ranks, seen.coords), workloads_of(config, seen.coords.data), seen.coords.data
    )
    measured = seen.states | {"buckets": seen.buckets, "gathered": seen.gathered, "activations": seen.activations}
    texts = []
    for part in PARTS:
        counted, modelled = measured.get(part, 0), getattr(memory, part)
        share = (modelled - counted) / max(counted, 1)
        off = f" ({share:+.2%})" if abs(share) >= 1e-4 else ""
        texts.append(f"{counted:,}{off}")
    print(f"| {name} | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    main()
