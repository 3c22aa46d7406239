"""Opens the samples of pretraining as one rank does."""

from beit3_ds.config import RunConfig
from beit3_ds.data import StepDataset, ValidationBatches
from beit3_ds.tasks import RankShare
from beit3_ds.tasks.pretraining.task import open_train_steps, open_validation
from beit3_ds.tokenizers import TextTokenizer


def share_of(rank: int, size: int, *, embeds: bool = True, predicts: bool = True) -> RankShare:
    return RankShare(data_parallel_rank=rank, data_parallel_size=size, embeds=embeds, predicts=predicts, reads=True)


def open_steps(config: RunConfig, tokenizer: TextTokenizer | None, rank: int, size: int) -> StepDataset:
    return open_train_steps(config, tokenizer, share_of(rank, size))


def open_validation_batches(
    config: RunConfig, tokenizer: TextTokenizer | None, rank: int, size: int
) -> ValidationBatches:
    return open_validation(config, tokenizer, share_of(rank, size))
