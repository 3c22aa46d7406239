"""Times attention, forward and backward, with different ways to batch sequences of unequal length."""

import statistics
import time

import numpy as np
import torch

from beit3_ds.kernels.ops.attention_plan import AttentionPlan, Ranges, bucket_by_length, build_plan
from beit3_ds.kernels.ops.bucket_attention import attend

_HEADS, _HEAD_SIZE, _IMAGE_LENGTH = 12, 64, 197
_ROUNDS = 7
_ALLOWANCES = {
    "equal lengths only (1)": 1.0,
    "1.1": 1.1,
    "1.25": 1.25,
    "1.5": 1.5,
    "2": 2.0,
    "one padded batch": float("inf"),
}


def benchmark_attention() -> str:
    """Times attention of the base size with each way to batch sequences, and returns a table.

    The table has one row per mix of samples, and one column per way to batch. A time is the median of forward plus
    backward. The ways in one row take turns during the measurement, but rows are measured one after the other. So
    compare times only within a row.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = ["one call per sequence", *_ALLOWANCES]
    lines = [
        f"attention forward + backward, ms, median of {_ROUNDS}; {_HEADS} heads of {_HEAD_SIZE}, fp32, {device.type}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        "| images + pairs + texts | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for mix in ((4, 4, 4), (16, 16, 16), (0, 0, 32)):
        ranges = _draw_ranges(*mix)
        plans = [build_plan(ranges, [[i] for i in range(len(ranges))], device)]
        plans += [build_plan(ranges, bucket_by_length(ranges, a, None), device) for a in _ALLOWANCES.values()]
        medians = _time_in_turn(plans, ranges, device)
        lines.append(f"| {' + '.join(map(str, mix))} | " + " | ".join(f"{m * 1e3:.1f}" for m in medians) + " |")
    return "\n".join(lines)


def _draw_ranges(num_images: int, num_pairs: int, num_texts: int) -> Ranges:
    """Draws sequences and returns their row ranges.

    Images have 197 rows, captions have 8 to 32 tokens, and texts have 16 to 128 tokens.
    """
    rng = np.random.default_rng(0)
    caption_lengths, text_lengths = rng.integers(8, 33, num_pairs), rng.integers(16, 129, num_texts)
    images = [(i * _IMAGE_LENGTH, (i + 1) * _IMAGE_LENGTH) for i in range(num_images + num_pairs)]
    stops = np.concatenate([caption_lengths, text_lengths]).cumsum() + len(images) * _IMAGE_LENGTH
    starts = stops - np.concatenate([caption_lengths, text_lengths])
    texts = list(zip(starts.tolist(), stops.tolist(), strict=True))
    pairs = list(zip(images[num_images:], texts[:num_pairs], strict=True))
    return tuple([(image,) for image in images[:num_images]] + pairs + [(text,) for text in texts[num_pairs:]])


def _time_in_turn(plans: list[AttentionPlan], ranges: Ranges, device: torch.device) -> list[float]:
    num_rows = max(stop for sequence in ranges for _, stop in sequence)
    shape = (num_rows, _HEADS, _HEAD_SIZE)
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(3))
    times: list[list[float]] = [[] for _ in plans]
    for _ in range(_ROUNDS + 1):  # the first round warms up
        for plan, plan_times in zip(plans, times, strict=True):
            start = time.perf_counter()
            gradient = torch.autograd.grad(attend(q, k, v, plan).sum(), (q, k, v))
            gradient[0][0, 0, 0].item()  # waits for the device
            plan_times.append(time.perf_counter() - start)
    return [statistics.median(plan_times[1:]) for plan_times in times]
