"""Tokenizes a run's texts once, by many processes and machines."""

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

_MAX_DIGITS = 9  # of the number of parts
_PIECE_BYTES = 64 << 20  # some ten seconds' work: what an interruption costs, and what processes share out


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of several shares of the work, for example those of a Slurm array."""

    number: int = 1
    """Which share, from 1."""
    count: int = 1
    """How many shares there are."""

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ConfigError(f"--part {self.number}/{self.count}: part I of N needs 1 <= I <= N, for example 1/8.")

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Reads I/N.

        Raises:
            ConfigError: for anything else.
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and max(len(number), len(count)) <= _MAX_DIGITS):
            raise ConfigError(f"--part {text[:40]}: write I/N, for example 1/8.")
        return cls(number=int(number), count=int(count))


@dataclass(frozen=True, kw_only=True)
class TextPreparation:
    """What `prepare_texts` did."""

    pieces_written: int
    """Pieces that were tokenized now."""
    pieces_kept: int
    """Pieces of this part that were there."""
    num_tokens: int
    """Tokens of both."""
    broken: tuple[str, ...]
    """Lines of both that were left out: file, line number and reason."""
    sources_left: int
    """Source files of which other parts have pieces to do."""


def prepare_texts(
    data: DataConfig,
    tokenizer: TextTokenizer,
    part: Part | None = None,
    processes: int | None = None,
    piece_bytes: int = _PIECE_BYTES,
) -> TextPreparation:
    """Tokenizes the training and validation texts of a run into `data.cache_dir`.

    Files are cut into pieces, which are divided over parts and processes; nobody waits for anybody. A piece that is
    there and up to date is not done again, so an interrupted preparation goes on where it was. Whoever finds all pieces
    of a file done also cuts it into sequences of `data.text_length`.

    Args:
        data: the data of a run.
        tokenizer: the run's text tokenizer.
        part: this share of the pieces; all if None.
        processes: how many tokenize; as many as cores if None.
        piece_bytes: bytes of a piece; all parts must use the same.

    Raises:
        ConfigError: without `data.cache_dir`, for files that cannot be read, or for more broken lines than
            `data.max_broken_records`.
    """
    if data.cache_dir is None:
        raise ConfigError("data.cache_dir is not set: name the folder for the token files in the config.")
    folder, part = texts_folder(data.cache_dir), part or Part()
    folder.mkdir(parents=True, exist_ok=True)
    sources = _text_sources(data)
    pieces = [cut_into_pieces(source, piece_bytes) for source in sources]
    remove_other_pieces(folder, pieces)
    share = [piece for pieces_of_source in pieces for piece in pieces_of_source][part.number - 1 :: part.count]
    separator = data.document_separator
    kept = [done for piece in share if (done := _finished(folder, piece, tokenizer, separator))]
    finished = {done.piece for done in kept}
    todo = [piece for piece in share if piece not in finished]
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
    left = [s for s in sources if not _cut_into_sequences(folder, s, tokenizer, data, cutter)]
    return TextPreparation(
        pieces_written=len(todo),
        pieces_kept=len(kept),
        num_tokens=num_tokens,
        broken=tuple(broken.lines),
        sources_left=len(left),
    )


def _text_sources(data: DataConfig) -> list[str]:
    """All text files of a run; one that is both trained on and held out counts once."""
    sources = (data.texts.train, data.texts.validation)
    return list(dict.fromkeys(file for part in sources for file in expand_patterns([source.path for source in part])))


def _finished(folder: Path, piece: TextPiece, tokenizer: TextTokenizer, document_separator: bool) -> TokenPiece | None:
    """The token file of a piece if it need not be written again."""
    with suppress(ConfigError):  # missing or damaged
        done = read_token_piece(token_path(folder, piece))
        made_with = (done.piece, done.tokenizer, done.document_separator)
        if made_with == (piece, tokenizer.fingerprint, document_separator) and done.fits(os.stat(piece.path)):
            return done
    return None


def _write_all(
    pieces: Sequence[TextPiece], write: Callable[[TextPiece], TokenPiece], processes: int | None, timeout_seconds: float
) -> Iterator[TokenPiece]:
    """Yields the token files as they are finished."""
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
    """Shows the bytes that are done and the tokens a second, where standard error is a terminal."""
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
    folder: Path, source: str, tokenizer: TextTokenizer, data: DataConfig, cutter: ParagraphCutter
) -> bool:
    """Writes the borders of a source file, or returns False if some of its pieces are still to be done."""
    try:
        pieces = find_token_pieces(folder, source, tokenizer, data.document_separator)
    except ConfigError:
        return False
    write_borders(folder, source, pieces, data.text_length, cutter)
    return True
