"""Times whole training steps with DeepSpeed's engine, including the update of the weights."""

import importlib
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from beit3_ds.benchmarks.certify.device_kind import kind_of
from beit3_ds.benchmarks.certify.recorder import Recorder
from beit3_ds.benchmarks.certify.steps import Model, models, timed_batch
from beit3_ds.benchmarks.peak_memory import peak_bytes
from beit3_ds.benchmarks.step.worker import train_ours
from beit3_ds.benchmarks.turns import device_of_turns

_STEPS = {"cuda": 10, "cpu": 1, "dry": 1}


def measure(recorder: Recorder) -> None:
    """Records the speed of training steps with DeepSpeed's engine, for the first model of `steps.models`."""
    importlib.import_module("deepspeed")  # if missing, the section reports this
    device = device_of_turns()
    model = models(device)[0]
    recorder.measure(f"{model.name}: DeepSpeed's engine, ZeRO stage 0", partial(_measure, model, device))


def _measure(model: Model, device: torch.device) -> dict[str, Any]:
    config = model._replace(has_small_vocabularies=False).config()  # the tokenizers set the vocabularies
    if kind_of(device) != "cpu":
        config = replace(config, deepspeed={**config.deepspeed, "bf16": {"enabled": True}})
    batch = timed_batch(config, torch.device("cpu"))
    step, _ = train_ours(config)(batch)
    first = step()
    times = []
    for _ in range(_STEPS[kind_of(device)]):
        start = time.perf_counter()
        loss = step()  # waits until the loss is computed
        times.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated() if kind_of(device) != "cpu" else peak_bytes()
    ms = statistics.median(times)
    figures = {"rows": batch.num_rows, "ms": ms, "tokens_per_s": batch.num_rows / ms * 1e3, "peak_gib": peak / 2**30}
    return {**figures, "first_loss": first, "last_loss": loss, "passed": loss == loss}
