"""Trains a deep and narrow model on one rank, with or without ZeRO-3, one step per request."""

import os
import socket
import sys
from typing import Any

from beit3_ds.benchmarks.step.batches import STREAMS, build_batch
from beit3_ds.benchmarks.step.worker import train_ours
from beit3_ds.benchmarks.turns import serve_turns
from beit3_ds.config import RunConfig, build_run_config

NUM_LAYERS = 40


def deep_config(zero_stage: int) -> RunConfig:
    """Returns a run config with 40 layers of width 48, and one image, one pair and one text per step."""
    stream = {"train": ["none.tar"], "samples_per_step": 1}
    mapping: dict[str, Any] = {
        "gradient_clipping": 3.0,
        "zero_optimization": {"stage": zero_stage},
        "steps_per_print": 1_000_000_000,
        "beit3_ds": {
            "model": {
                "num_layers": NUM_LAYERS,
                "hidden_size": 48,
                "ffn_hidden_size": 192,
                "num_attention_heads": 3,
                "patch_size": 16,
                "image_size": 32,
                "text_vocab_size": 130,
                "visual_vocab_size": 32,
            },
            "data": dict.fromkeys(STREAMS, stream),
            "tokenizers": {
                "text": {"path": "none.spm", "vocab_size": 120},
                "visual": {"path": "none.safetensors", "image_size": 32, "patch_size": 16, "codebook_size": 32},
            },
            "training": {"output_dir": "none", "total_steps": 100, "warmup_steps": 1, "learning_rate": 1e-4},
        },
    }
    return build_run_config(mapping)


def serve(zero_stage: int, descriptor: int) -> None:
    """Trains one step per line of standard input, and writes the figures of each step to a file descriptor."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = deep_config(zero_stage)
    prepare = train_ours(config)
    serve_turns(lambda number: prepare(build_batch(config, 0)), sys.stdin, os.fdopen(descriptor, "w"))


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
