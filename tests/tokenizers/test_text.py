"""Tests the text tokenizer: its ids, its training and its messages."""

import pickle
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from beit3_ds.config import ConfigError, TextTokenizerConfig
from beit3_ds.tokenizers import TextTokenizer, train_text_tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "brew",
    "strange",
    "potions",
    "beneath",
    "yellow",
    "moons",
]
VOCAB_SIZE = 46


def corpus() -> Iterator[str]:
    draw = random.Random(0)
    for _ in range(300):
        yield " ".join(draw.choices(WORDS, k=12))


def config(path: Path, vocab_size: int = VOCAB_SIZE) -> TextTokenizerConfig:
    return TextTokenizerConfig(path=str(path), vocab_size=vocab_size, character_coverage=1.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_text_tokenizer(config(tmp_path_factory.mktemp("text") / "new" / "text.spm"), corpus())


def test_ids_follow_the_reference_layout(tokenizer: TextTokenizer) -> None:
    ids = (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id)
    assert ids == (0, 1, 2, 3)
    assert [tokenizer.piece(id_) for id_ in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
    # Catches a mask id that collides with the last piece: pieces are shifted by one, so it is pieces + 1.
    assert tokenizer.mask_id == VOCAB_SIZE + 1
    assert tokenizer.vocab_size == VOCAB_SIZE + 2
    assert tokenizer.piece(tokenizer.mask_id) == "<mask>"


def test_pieces_are_sentencepiece_ids_plus_one(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "same.spm"
    train_text_tokenizer(config(path), corpus())
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    # Catches the unshifted ids, in which the first piece would read as <unk>.
    assert tokenizer.encode("the quick fox") == [id_ + 1 for id_ in reference.encode("the quick fox")]
    assert tokenizer.piece(tokenizer.encode("quick")[0]) == reference.id_to_piece(reference.encode("quick")[0])


def test_unknown_characters_become_unk(tokenizer: TextTokenizer) -> None:
    # Catches SentencePiece's own id of <unk>, 0, shifted to 1, which is <pad> here.
    assert tokenizer.unk_id in tokenizer.encode("the ☃ fox")
    assert tokenizer.pad_id not in tokenizer.encode("the ☃ fox")


def test_decode_inverts_encode_and_names_specials(tokenizer: TextTokenizer) -> None:
    text = "seven wizards brew"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0, *ids, tokenizer.mask_id, 2]) == f"<s> {text}<mask></s>"


def test_a_batch_is_what_each_text_gives(tokenizer: TextTokenizer) -> None:
    texts = ["seven wizards brew", "", "the ☃ fox"]
    ids, lengths = tokenizer.encode_batch(texts)
    expected = [tokenizer.encode(text) for text in texts]
    assert ids.tolist() == [id_ for text in expected for id_ in text]  # catches <unk> shifted to <pad>
    assert lengths.tolist() == [len(text) for text in expected]
    assert tokenizer.encode_batch([])[0].tolist() == []


def test_word_starts_are_the_pieces_after_a_space(tokenizer: TextTokenizer) -> None:
    starts, ends = tokenizer.word_borders()
    assert np.flatnonzero(ends).tolist() == [0, 1, 2]
    assert starts.shape == (tokenizer.vocab_size,)
    ids = tokenizer.encode("seven wizards brew")
    assert starts[ids].sum() == 3  # catches the ids of SentencePiece, off by one
    assert starts[ids[0]]
    assert not starts[tokenizer.unk_id]
    assert not starts[tokenizer.mask_id]


@pytest.mark.parametrize("as_suffix", [False, True])
@pytest.mark.parametrize("add_dummy_prefix", [False, True])
def test_words_begin_where_white_space_does(tmp_path: Path, as_suffix: bool, add_dummy_prefix: bool) -> None:
    options = {"treat_whitespace_as_suffix": as_suffix, "add_dummy_prefix": add_dummy_prefix}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    tokenizer = TextTokenizer(tmp_path / "m.model")
    text = "the lazy dog brews seven potions"
    ids = np.array(tokenizer.encode(text))
    begins = tokenizer.word_borders().mark_word_starts(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id]))[1:]
    words = [tokenizer.decode(word) for word in np.split(ids, np.flatnonzero(begins[1:-1]) + 1)]
    assert words == text.split()  # catches suffix pieces taken for starts: then all is one word
    assert begins[0]
    assert begins[-1]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("id_", [-1, VOCAB_SIZE + 2])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: TextTokenizer, id_: int) -> None:
    with pytest.raises(IndexError, match="outside"):
        tokenizer.piece(id_)


def test_a_pickled_copy_needs_no_file(tmp_path: Path) -> None:
    path = tmp_path / "text.spm"
    original = train_text_tokenizer(config(path), corpus())
    path.unlink()  # data workers on another node may not see it
    copy = pickle.loads(pickle.dumps(original))
    assert copy.encode("the lazy dog") == original.encode("the lazy dog")
    assert (copy.mask_id, copy.vocab_size) == (original.mask_id, original.vocab_size)


def test_training_leaves_no_temporary_file(tmp_path: Path) -> None:
    train_text_tokenizer(config(tmp_path / "text.spm"), corpus())
    assert [path.name for path in tmp_path.iterdir()] == ["text.spm"]


def test_long_lines_are_learnt_from(tmp_path: Path) -> None:
    # Catches SentencePiece's limit of 4192 bytes, which silently skips longer paragraphs.
    tokenizer = train_text_tokenizer(config(tmp_path / "text.spm"), [*corpus(), "zzz " * 1100 + "ß"])
    assert tokenizer.unk_id not in tokenizer.encode("ß")


def test_too_many_pieces_are_refused_with_what_fits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=1000 is more than .* Use at most") as caught:
        train_text_tokenizer(config(tmp_path / "text.spm", 1000), corpus())
    assert not list(tmp_path.iterdir())
    fits = int(re.search(r"at most (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert train_text_tokenizer(config(tmp_path / "text.spm", fits), corpus()).vocab_size == fits + 2


def test_too_few_pieces_and_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size=8 is too small"):
        train_text_tokenizer(config(tmp_path / "text.spm", 8), corpus())
    with pytest.raises(ConfigError, match=r"any text in data\.texts\.train"):
        train_text_tokenizer(config(tmp_path / "text.spm"), ["", "\n"])


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="beit3 train-text-tokenizer"):
        TextTokenizer(tmp_path / "absent.spm")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.spm").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"broken\.spm is not a SentencePiece model"):
        TextTokenizer(tmp_path / "broken.spm")


def test_another_numbering_of_the_specials_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.spm"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=corpus(),
            model_writer=file,
            vocab_size=VOCAB_SIZE,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            minloglevel=2,
        )
    # Catches a shift of ids that are not where the shift expects them: every token would be wrong, silently.
    with pytest.raises(ConfigError, match=r"other\.spm numbers .* as \(1, 2, 3\)"):
        TextTokenizer(path)


def test_a_model_of_64000_pieces_gets_the_released_ids(tmp_path: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    pieces = [*kinds, "\u2581the", "\u2581fox", *(f"\u2581w{i}" for i in range(64_000 - 5))]
    for score, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(score), type=kinds.get(piece, 1))
    model.trainer_spec.vocab_size = len(pieces)
    (tmp_path / "beit3.spm").write_bytes(model.SerializeToString())
    tokenizer = TextTokenizer(tmp_path / "beit3.spm")
    assert (tokenizer.mask_id, tokenizer.vocab_size) == (64001, 64002)
    assert tokenizer.encode("the fox") == [4, 5]  # the first piece comes after <s>, <pad>, </s>, <unk>
    assert tokenizer.piece(64000) == "\u2581w63994"


def test_the_sample_is_drawn_from_the_whole_corpus(tmp_path: Path) -> None:
    lines = [*(["the quick brown fox"] * 1000), *(["yellow moons beneath"] * 1000)]
    sampled = TextTokenizerConfig(
        path=str(tmp_path / "text.spm"), vocab_size=26, character_coverage=1.0, max_sentences=101
    )
    tokenizer = train_text_tokenizer(sampled, iter(lines))
    # Catches a sample of the first lines, which have no "y", "m" or "l".
    assert tokenizer.unk_id not in [*tokenizer.encode("quick fox"), *tokenizer.encode("yellow moons")]
