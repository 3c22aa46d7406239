"""Trains and reads the text tokenizer, a SentencePiece model with the ids of the released BEiT-3.

XLMRobertaTokenizer is not used, because in transformers >= 5 it encodes every piece of this SentencePiece model as
<unk>.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config import ConfigError, RunConfig, TextTokenizerConfig
from beit3_ds.regular_file import read_regular

_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3
_SENTENCEPIECE_SPECIALS = ("<unk>", "<s>", "</s>")  # SentencePiece's own ids 0 to 2
_SPACE = "\u2581"  # SentencePiece writes a space as this character
_MAX_LINE_BYTES = 1 << 16  # SentencePiece silently skips longer paragraphs; its default limit is 4192
_MAX_MODEL_BYTES = 1 << 27  # a million pieces take 30 MB
_ERRORS_ONLY = 2  # SentencePiece's log level; lower levels print a page during training


class WordBorders(NamedTuple):
    """Marks the token ids that start or end a word, based on the white space in the tokenizer's pieces."""

    starts: NDArray[np.bool_]
    """For each id, whether a word certainly starts there, (vocab_size,). True for BOS, padding and EOS.

    In a SentencePiece model that writes white space before words (`▁dog`), pieces that begin with white space are True
    too. All other ids are False. In a model that writes white space after words (`dog▁`), True only for BOS, padding
    and EOS. In such a model, use `ends`: a word starts after a piece that ends with white space.
    """
    ends: NDArray[np.bool_]
    """For each id, whether a word certainly ends there, (vocab_size,). If True, the id that follows in a text starts a
    word. True for BOS, padding and EOS.

    In a SentencePiece model that writes white space after words (`dog▁`), pieces that end with white space are True
    too. All other ids are False. In a model that writes white space before words (`▁dog`), True only for BOS, padding
    and EOS. In such a model, `starts` tells where words start.
    """

    def mark_word_starts(self, ids: NDArray[np.generic]) -> NDArray[np.bool_]:
        """Returns whether each id of a sequence starts a word, (ids,).

        An id starts a word if `starts` is true for the id itself, or `ends` is true for the id before it.

        Args:
            ids: consecutive token ids, (ids,).
        """
        begins = self.starts[ids]
        begins[1:] |= self.ends[ids[:-1]]
        return begins


class TextTokenizer:
    """Converts texts to token ids and back, with the ids of the released BEiT-3.

    Ids 0 to 3 are `<s>` (BOS, also the CLS token of a text), `<pad>`, `</s>` (EOS) and `<unk>`. The id of any other
    piece is its SentencePiece id + 1. `<mask>` is the last id, for example 64001 with 64000 pieces. A pickled copy
    contains the SentencePiece model, so unpickling reads no file.

    Attributes:
        bos_id: id of `<s>`.
        pad_id: id of `<pad>`.
        eos_id: id of `</s>`.
        unk_id: id of `<unk>`.
        mask_id: id of `<mask>`.
        vocab_size: number of ids, `mask_id` + 1.
        fingerprint: digest of the SentencePiece model. Tokenizers with equal digests encode every text to equal ids.
    """

    bos_id = 0
    pad_id = 1
    eos_id = 2
    unk_id = 3

    def __init__(self, path: str | Path) -> None:
        """Reads a SentencePiece model from a file.

        Raises:
            ConfigError: if the file is missing or not a SentencePiece model, or its ids of `<unk>`, `<s>` and `</s>`
                are not 0, 1 and 2.
        """
        self._sentencepiece = _load_sentencepiece(Path(path))
        self.mask_id: int = self._sentencepiece.vocab_size() + 1
        self.vocab_size: int = self.mask_id + 1
        model = self._sentencepiece.serialized_model_proto()
        self.fingerprint: str = hashlib.blake2b(model, digest_size=16).hexdigest()

    @property
    def num_pieces(self) -> int:
        """Returns the number of SentencePiece pieces, including special pieces (`tokenizers.text.vocab_size`)."""
        return self.mask_id - 1

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without BOS and EOS; characters that no piece contains become `unk_id`.

        Raises:
            TypeError: if `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}, but encode takes one string; encode_batch takes several")
        return [self._from_sentencepiece(piece) for piece in self._sentencepiece.encode(text)]

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Encodes several texts to NumPy arrays, without BOS and EOS; faster than `encode` for many texts.

        Returns:
            The ids of all texts, concatenated, (ids,) int32, and the number of ids per text, (texts,) int64.
        """
        encoded = self._sentencepiece.encode(list(texts), return_type="numpy", num_threads=1)
        ids = np.concatenate(encoded) if encoded else np.empty(0, dtype=np.int32)
        ids += 1
        ids[ids == 1] = self.unk_id  # SentencePiece's <unk> is 0
        return ids, np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))

    def decode(self, ids: Iterable[int]) -> str:
        """Converts ids to text; special ids appear by name, for example `<mask>`.

        Raises:
            IndexError: for an id outside [0, vocab_size).
        """
        return "".join(self.piece(id_) for id_ in ids).replace(_SPACE, " ").strip()

    def word_borders(self) -> WordBorders:
        """Determines which ids start or end a word.

        Most models write white space before words (`▁dog`). Models trained with `treat_whitespace_as_suffix` write
        white space after words (`dog▁`).
        """
        pieces = [self.piece(id_) for id_ in range(self.vocab_size)]
        starts = np.array([piece.startswith(_SPACE) for piece in pieces])
        ends = np.array([piece.endswith(_SPACE) for piece in pieces])
        (starts if self._marks_ends(starts, ends) else ends)[:] = False
        specials = [self.bos_id, self.pad_id, self.eos_id]  # not <unk>, which may be inside a word
        starts[specials] = ends[specials] = True
        return WordBorders(starts, ends)

    def _marks_ends(self, starts: NDArray[np.bool_], ends: NDArray[np.bool_]) -> bool:
        """Returns whether the SentencePiece model puts white space at the ends of words, not at their starts.

        Args:
            starts: whether each piece has leading white space, (vocab_size,).
            ends: whether each piece has trailing white space, (vocab_size,).
        """
        shown = "".join(self.piece(id_) for id_ in self.encode("a a"))
        if shown.startswith(_SPACE) != shown.endswith(_SPACE):  # the model itself puts white space around a text
            return shown.endswith(_SPACE)
        return int(np.count_nonzero(ends & ~starts)) > int(np.count_nonzero(starts & ~ends))

    def piece(self, id_: int) -> str:
        """Returns the piece of an id as a string; U+2581 represents white space.

        Raises:
            IndexError: for an id outside [0, vocab_size).
        """
        if not 0 <= id_ < self.vocab_size:
            raise IndexError(f"text tokenizer: id {id_} is outside [0, {self.vocab_size}).")
        if id_ == self.mask_id:
            return "<mask>"
        if id_ < len(_SPECIALS):
            return _SPECIALS[id_]
        return str(self._sentencepiece.id_to_piece(id_ - 1))

    def _from_sentencepiece(self, piece: int) -> int:
        # Encoding yields <unk> or a piece: SentencePiece never reads "<s>" in a text as its control symbol.
        return self.unk_id if piece == 0 else piece + 1


def load_text_tokenizer(config: RunConfig) -> TextTokenizer | None:
    """Reads a run's text tokenizer, and checks that the model's word embedding has a row for every id.

    Returns:
        The tokenizer; None for a run that has neither texts nor pairs.

    Raises:
        ConfigError: if the file is missing or not a valid tokenizer, or the word embedding has too few rows.
    """
    if not config.data.has_texts:
        return None
    tokenizer, rows = TextTokenizer(config.tokenizers.text.path), config.model.text_vocab_size
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            f"{config.tokenizers.text.path} has {tokenizer.vocab_size} ids, but model.text_vocab_size is {rows}. Raise "
            f"it to at least {tokenizer.vocab_size}, or use the tokenizer that the model was made for."
        )
    return tokenizer


def train_text_tokenizer(config: TextTokenizerConfig, lines: Iterable[str], seed: int = 1) -> TextTokenizer:
    """Trains a SentencePiece model (`train_sentencepiece_model`) and writes it to `config.path`.

    Does not record the training settings.
    """
    path, model = Path(config.path), train_sentencepiece_model(config, lines, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(model)
    return TextTokenizer(path)


def train_sentencepiece_model(config: TextTokenizerConfig, lines: Iterable[str], seed: int = 1) -> bytes:
    """Trains a SentencePiece unigram model (Kudo, 2018, arXiv:1804.10959), and returns it as the content of a file.

    Args:
        config: number of pieces, character coverage, and maximum number of training sentences.
        lines: lines of the training corpus; blank lines are skipped.
        seed: seed for drawing `config.max_sentences` lines from a larger corpus.

    Raises:
        ConfigError: if there is no text, or `config.vocab_size` is too small or too large for the corpus. The message
            gives the limit.
    """
    sentencepiece.set_random_generator_seed(seed % 2**32)  # SentencePiece takes 32 bits
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for line in lines if line.strip()),
            model_writer=model,
            model_type="unigram",
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            input_sentence_size=config.max_sentences,
            shuffle_input_sentence=True,
            max_sentence_length=_MAX_LINE_BYTES,
            minloglevel=_ERRORS_ONLY,
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(_explain_training_error(str(error), config)) from None
    return model.getvalue()


def _load_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Reads a SentencePiece model, and checks that it numbers <unk>, <s> and </s> as 0, 1 and 2."""
    if not path.is_file():
        raise ConfigError(
            f"tokenizers.text: {path} does not exist (looked in {Path.cwd()}). "
            f"Train it with `beit3 train-text-tokenizer CONFIG.json`."
        )
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=read_regular(path, _MAX_MODEL_BYTES))
    except (RuntimeError, OSError):
        raise ConfigError(
            f"tokenizers.text: {path} is not a SentencePiece model. "
            f"Train one with `beit3 train-text-tokenizer CONFIG.json`."
        ) from None
    own_ids = (model.unk_id(), model.bos_id(), model.eos_id())
    if own_ids != (0, 1, 2):
        raise ConfigError(
            f"tokenizers.text: {path} numbers {', '.join(_SENTENCEPIECE_SPECIALS)} as {own_ids}; BEiT-3's numbering "
            f"of ids needs SentencePiece's default (0, 1, 2). Train the model without --unk_id, --bos_id and --eos_id."
        )
    return model


def _explain_training_error(message: str, config: TextTokenizerConfig) -> str:
    """Translates SentencePiece's error after a failed training into a message about the config."""
    if match := re.search(r"value <= (\d+)", message):
        return (
            f"tokenizers.text.vocab_size={config.vocab_size} is more than this corpus supports. Use at most "
            f"{match[1]}, or a larger corpus."
        )
    if match := re.search(r"required_chars\S* (\d+) vs (\d+)", message):
        return (
            f"tokenizers.text.vocab_size={config.vocab_size} is too small: the characters alone need more than "
            f"{match[2]}. Raise it, or lower tokenizers.text.character_coverage ({config.character_coverage:g})."
        )
    return f"tokenizers.text: training failed; is there any text in data.texts.train? SentencePiece says: {message}"
