"""Tokenizes the texts of a run before training, with many processes on one or several machines."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from beit3_ds.config import ConfigError, DataConfig
from beit3_ds.cores import count_cores
from beit3_ds.data.files.patterns import expand_patterns
from beit3_ds.data.text.paragraphs import BrokenLines, TextPiece, cut_into_pieces
from beit3_ds.data.text.sentences import ParagraphCutter
from beit3_ds.data.text.sequence_borders import write_borders
from beit3_ds.data.text.sequences import texts_folder
from beit3_ds.data.text.token_files import (
    TokenPiece,
    find_token_pieces,
    read_token_piece,
    remove_other_pieces,
    token_path,
    write_tokens,
)
from beit3_ds.data.workers.pool import Preparation, prepare_in_any_order
from beit3_ds.data.workers.waiting import WaitLimits
from beit3_ds.tokenizers.text import TextTokenizer

_MAX_DIGITS = 9  # maximum digits of the number of shares
_PIECE_BYTES = 64 << 20  # about ten seconds of work, which is lost at an interruption


@dataclass(frozen=True, kw_only=True)
class WorkShare:
    """Identifies one of several equal shares of the texts, for example for one job of a Slurm array (`--part`)."""

    number: int = 1
    """Number of this share, counted from 1."""
    count: int = 1
    """Total number of shares."""

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ConfigError(f"--part {self.number}/{self.count}: part I of N needs 1 <= I <= N, for example 1/8.")

    @classmethod
    def parse(cls, text: str) -> "WorkShare":
        """Parses a share from a text of the form I/N, such as "1/8".

        Raises:
            ConfigError: if the text has another form, or I is not in [1, N].
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and max(len(number), len(count)) <= _MAX_DIGITS):
            raise ConfigError(f"--part {text[:40]}: write I/N, for example 1/8.")
        return cls(number=int(number), count=int(count))


@dataclass(frozen=True, kw_only=True)
class TextPreparation:
    """Holds the result of `prepare_texts` for one share of the texts."""

    pieces_written: int
    """Number of pieces (`TextPiece`) that `prepare_texts` tokenized."""
    pieces_kept: int
    """Number of pieces (`TextPiece`) whose token files were already up to date."""
    num_tokens: int
    """Number of tokens in the pieces that `pieces_written` and `pieces_kept` count."""
    broken: tuple[str, ...]
    """Skipped lines in the pieces that `pieces_written` and `pieces_kept` count. Each entry names the file, the line
    number and the reason."""
    files_left: int
    """Number of text files that are not completely tokenized yet. Their missing pieces belong to other shares of the
    work (`WorkShare`)."""


def prepare_texts(
    data: DataConfig,
    tokenizer: TextTokenizer,
    share: WorkShare | None = None,
    processes: int | None = None,
    piece_bytes: int = _PIECE_BYTES,
) -> TextPreparation:
    """Tokenizes the training, validation and test texts of a run into `data.cache_dir`.

    Files are cut into pieces of `piece_bytes` bytes. The pieces are divided among shares, and a share's pieces among
    processes. No share waits for another one. Token files that exist and are up to date are not written again. When all
    pieces of a text file are tokenized, their tokens are divided into sequences of at most `data.text_length` tokens.

    Args:
        data: data section of the run's config.
        tokenizer: the run's text tokenizer.
        share: share of the pieces to tokenize; None tokenizes all pieces.
        processes: number of processes; None starts one per core.
        piece_bytes: bytes per piece; must be equal for all shares.

    Raises:
        ConfigError: if `data.cache_dir` is not set, if a file cannot be read, or if more than `data.max_broken_records`
            lines are broken.
    """
    if data.cache_dir is None:
        raise ConfigError("data.cache_dir is not set: name the folder for the token files in the config.")
    folder, share = texts_folder(data.cache_dir), share or WorkShare()
    folder.mkdir(parents=True, exist_ok=True)
    texts = _text_files(data)
    pieces = [cut_into_pieces(text, piece_bytes) for text in texts]
    remove_other_pieces(folder, pieces)
    own = [piece for pieces_of_text in pieces for piece in pieces_of_text][share.number - 1 :: share.count]
    separator = data.document_separator
    kept = [done for piece in own if (done := _finished(folder, piece, tokenizer, separator))]
    finished = {done.piece for done in kept}
    todo = [piece for piece in own if piece not in finished]
    broken = BrokenLines(data.max_broken_records)
    broken.extend([line for done in kept for line in done.broken])
    num_tokens = sum(done.num_tokens for done in kept)
    write = partial(
        write_tokens, folder, tokenizer=tokenizer, budget=data.max_broken_records, document_separator=separator
    )
    finished_now = _write_all(todo, write, processes, data.timeout_seconds)
    for done in _with_progress(finished_now, todo):
        broken.extend(list(done.broken))
        num_tokens += done.num_tokens
    cutter = ParagraphCutter(tokenizer)
    left = [text for text in texts if not _cut_into_sequences(folder, text, tokenizer, data, cutter)]
    return TextPreparation(
        pieces_written=len(todo),
        pieces_kept=len(kept),
        num_tokens=num_tokens,
        broken=tuple(broken.lines),
        files_left=len(left),
    )


def _text_files(data: DataConfig) -> list[str]:
    """Returns the paths of a run's training, validation and test text files, without duplicates.

    Skips sources in a task's own format.
    """
    sources = (data.texts.train, data.texts.validation, data.texts.test)
    paths = [[source.path for source in split if not source.has_task_format] for split in sources]
    return list(dict.fromkeys(file for split in paths for file in expand_patterns(split)))


def _finished(folder: Path, piece: TextPiece, tokenizer: TextTokenizer, document_separator: bool) -> TokenPiece | None:
    """Returns the token file of a piece if that file exists and is up to date, otherwise None."""
    with suppress(ConfigError):  # missing or damaged
        done = read_token_piece(token_path(folder, piece))
        made_with = (done.piece, done.tokenizer, done.document_separator)
        if made_with == (piece, tokenizer.fingerprint, document_separator) and done.fits(os.stat(piece.path)):
            return done
    return None


def _write_all(
    pieces: Sequence[TextPiece], write: Callable[[TextPiece], TokenPiece], processes: int | None, timeout_seconds: float
) -> Iterator[TokenPiece]:
    """Tokenizes pieces in several processes; yields the description of each token file once it is finished."""
    processes = min(processes or count_cores(), len(pieces))
    if processes <= 1:
        yield from map(write, pieces)
        return
    limits = WaitLimits(seconds=timeout_seconds, where="beit3 prepare texts")
    work = partial(_write_in_worker, write=write)
    preparation = Preparation(work=work, describe=_name_piece, limits=limits, preload=__name__)
    yield from prepare_in_any_order(preparation, pieces, processes)


def _write_in_worker(
    piece: TextPiece, note: Callable[[str], None], write: Callable[[TextPiece], TokenPiece]
) -> TokenPiece:
    note(_name_piece(piece))
    return write(piece)


def _name_piece(piece: TextPiece) -> str:
    return f"{piece.path}, bytes {piece.start} to {piece.stop}"


def _with_progress(finished: Iterable[TokenPiece], pieces: Sequence[TextPiece]) -> Iterator[TokenPiece]:
    """Yields the token files in `finished`, and shows a progress bar on a terminal.

    The bar shows two rates: bytes per second and tokens per second.
    """
    num_bytes = sum(piece.stop - piece.start for piece in pieces)
    num_tokens = 0
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        for done in finished:
            num_tokens += done.num_tokens
            rate = num_tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update(done.piece.stop - done.piece.start)
            yield done


def _cut_into_sequences(
    folder: Path, text: str, tokenizer: TextTokenizer, data: DataConfig, cutter: ParagraphCutter
) -> bool:
    """Finds the sequence starts of a text file and writes them; returns False if parts of the file are not yet
    tokenized.
    """
    try:
        pieces = find_token_pieces(folder, text, tokenizer, data.document_separator)
    except ConfigError:
        return False
    write_borders(folder, text, pieces, data.text_length, cutter)
    return True
