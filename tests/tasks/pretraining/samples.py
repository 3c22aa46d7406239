"""Opens the samples of pretraining like one rank of a run."""

import functools

from beit3_ds.config import RunConfig
from beit3_ds.config.prefetch import plan_prefetch
from beit3_ds.data import StepDataset, ValidationBatches, build_validation_batches
from beit3_ds.tasks.pretraining.packing import image_shape, pack
from beit3_ds.tasks.pretraining.samples import build_evaluation_streams, build_train_streams
from beit3_ds.tokenizers import TextTokenizer


def open_steps(config: RunConfig, tokenizer: TextTokenizer | None, rank: int, size: int) -> StepDataset:
    prefetch = plan_prefetch(config, size)
    streams = build_train_streams(config, tokenizer)
    return StepDataset(config, streams, functools.partial(pack, shape=image_shape(config)), rank, size, prefetch)


def open_validation_batches(
    config: RunConfig, tokenizer: TextTokenizer | None, rank: int, size: int
) -> ValidationBatches:
    streams = build_evaluation_streams(config, tokenizer)
    return build_validation_batches(config, streams, functools.partial(pack, shape=image_shape(config)), rank, size)
