"""Measures the preparation of texts: the speed compared with SentencePiece, and the memory for a large corpus."""

import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from beit3_ds.config import DataConfig, SourceConfig, StreamConfig, TextTokenizerConfig
from beit3_ds.data.prepare.texts import prepare_texts
from beit3_ds.data.text.paragraphs import BrokenLines, read_paragraphs, whole_file
from beit3_ds.data.text.sequences import TextSequences, texts_folder
from beit3_ds.data.text.token_files import write_tokens
from beit3_ds.tokenizers.text import TextTokenizer, train_text_tokenizer

_ROUNDS = 7  # the smallest and the largest of seven paired ratios enclose their median with 98% confidence
_SPEED_BYTES = 4 << 20
_SENTENCES_PER_PARAGRAPH = 5
_EARLY = 0.05
_SAMPLE_SECONDS = 0.2


def benchmark_text(num_bytes: int = 0, processes: int | None = None, json_path: str | None = None) -> str:
    """Measures the preparation of a text corpus and returns a report.

    The corpus consists of the sample data's sentences in random order. Two functions run in turn. The function
    `write_tokens` of `beit3 prepare texts` reads, decodes and tokenizes the corpus, and writes a file. SentencePiece's
    batch encoding tokenizes the same text in memory, and does nothing else. Speed is measured in CPU time on one core.

    Args:
        num_bytes: size in bytes of a second corpus for measuring memory. The report compares the peak memory of
            preparing the whole corpus with the peak at 5% of the corpus. 0 skips the measurement of memory.
        processes: number of processes that prepare the second corpus; None means one process per core.
        json_path: file for the results (`rows` and `summary`) as JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_config = TextTokenizerConfig(path=str(Path(folder) / "text.spm"), vocab_size=4000)
        tokenizer = train_text_tokenizer(tokenizer_config, _sample_sentences())
        rows = _compare_speed(Path(folder), tokenizer_config.path, tokenizer)
        ratios = sorted(row["ratio"] for row in rows)
        summary: dict[str, float] = {
            "ratio_sentencepiece": statistics.median(ratios),
            "ratio_low": ratios[0],
            "ratio_high": ratios[-1],
        }
        if num_bytes:
            summary |= _measure_memory(Path(folder), tokenizer, num_bytes, processes)
    if json_path:
        Path(json_path).write_text(json.dumps({"rows": rows, "summary": summary}, indent=2))
    return _describe(summary)


def write_corpus(path: Path, num_bytes: int, seed: int = 0) -> None:
    """Writes a text file of `num_bytes` bytes with random sentences of the sample data."""
    sentences = np.array([sentence.encode() for sentence in _sample_sentences()], dtype=object)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        while file.tell() < num_bytes:
            drawn = sentences[rng.integers(len(sentences), size=(1000, _SENTENCES_PER_PARAGRAPH))]
            text = b"\n".join(b" ".join(paragraph) for paragraph in drawn.tolist()) + b"\n"
            file.write(text[: max(0, num_bytes - file.tell())])


def _sample_sentences() -> Iterator[str]:
    with (files("beit3_ds.sample_data") / "text-train.txt").open(encoding="utf-8") as file:
        for line in file:
            yield from (f"{part.rstrip('.')}." for part in line.strip().split(". ") if part.strip("."))


def _compare_speed(folder: Path, model: str, tokenizer: TextTokenizer) -> list[dict[str, float]]:
    """Measures the CPU seconds of `write_tokens` and of SentencePiece's encoding, for one corpus with one thread.

    In each round, the two functions run in one order, and then in the reverse order. Returns the CPU seconds of each
    round, and the ratio of SentencePiece's time to the time of `write_tokens`.
    """
    corpus = folder / "speed.txt"
    write_corpus(corpus, _SPEED_BYTES)
    piece = whole_file(str(corpus))
    paragraphs = [paragraph.text for paragraph in read_paragraphs(piece, BrokenLines(0))]
    reference = sentencepiece.SentencePieceProcessor(model_file=model)
    ways = {
        "sentencepiece": lambda: reference.encode(paragraphs, num_threads=1),
        "prepare": lambda: write_tokens(folder, piece, tokenizer, 0),
    }
    rows: list[dict[str, float]] = []
    for _ in range(_ROUNDS + 1):  # the first round warms up
        seconds = dict.fromkeys(ways, 0.0)
        # Each row runs both orders, because a function is faster after itself than after the other.
        for name in (*ways, *reversed(ways)):
            start = time.process_time()  # CPU time, which other processes do not change; both use one core
            ways[name]()
            seconds[name] += time.process_time() - start
        row = {f"{name}_cpu_seconds": value for name, value in seconds.items()}
        rows.append(row | {"ratio": seconds["sentencepiece"] / seconds["prepare"]})
    return rows[1:]


def _measure_memory(folder: Path, tokenizer: TextTokenizer, num_bytes: int, processes: int | None) -> dict[str, float]:
    corpus, prepared = folder / "corpus.txt", folder / "prepared"
    write_corpus(corpus, num_bytes)
    none = StreamConfig(train=(), samples_per_step=0)
    texts = StreamConfig(train=(SourceConfig(path=str(corpus)),), samples_per_step=1)
    data = DataConfig(images=none, pairs=none, texts=texts, cache_dir=str(prepared))
    with _MemorySampler(texts_folder(str(prepared)), num_bytes) as sampler:
        start = time.perf_counter()
        done = prepare_texts(data, tokenizer, processes=processes)
        seconds = time.perf_counter() - start
    start = time.perf_counter()
    sequences = TextSequences([str(corpus)], tokenizer, data.text_length, str(prepared))
    sequences[len(sequences) - 1]
    return {
        "corpus_bytes": corpus.stat().st_size,
        "num_tokens": done.num_tokens,
        "prepare_seconds": seconds,
        "memory_early_bytes": sampler.early_bytes,
        "memory_peak_bytes": sampler.peak_bytes,
        "memory_growth": sampler.peak_bytes / sampler.early_bytes,
        "open_seconds": time.perf_counter() - start,
    }


class _MemorySampler(threading.Thread):
    """Samples the memory of this process and its descendants.

    Keeps the peak during the first 5% of the corpus, and the peak during the whole corpus.
    """

    def __init__(self, folder: Path, num_bytes: int) -> None:
        super().__init__(daemon=True)
        self.early_bytes = self.peak_bytes = 0
        self._folder, self._early_done = folder, _EARLY * num_bytes
        self._ended = threading.Event()

    def __enter__(self) -> "_MemorySampler":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            resident = _resident_bytes(os.getpid())
            self.peak_bytes = max(self.peak_bytes, resident)
            if not self._is_past_early():
                self.early_bytes = self.peak_bytes

    def _is_past_early(self) -> bool:
        # A token has two bytes and is about four bytes of text, so the written bytes show the progress.
        written = sum(path.stat(follow_symlinks=False).st_size for path in self._folder.glob("*.tokens"))
        return 2 * written > self._early_done


def _resident_bytes(pid: int) -> int:
    """Returns the resident bytes of a process and its descendants. A page counts once per process that shares it."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        tasks = [(task / "children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:  # the process has just ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(_resident_bytes(int(child)) for task in tasks for child in task)


def _describe(summary: dict[str, Any]) -> str:
    lines = [
        f"prepare texts / SentencePiece's batch encoding, speed per core: {summary['ratio_sentencepiece']:.2f} "
        f"({summary['ratio_low']:.2f} to {summary['ratio_high']:.2f}; paired, median of {_ROUNDS})"
    ]
    if "corpus_bytes" in summary:
        lines.append(
            f"{summary['corpus_bytes'] / 1e9:.2f} GB, {summary['num_tokens']:,} tokens in "
            f"{summary['prepare_seconds']:.0f} s; memory of all processes {summary['memory_early_bytes'] / 1e6:.0f} MB "
            f"in the first 5%, {summary['memory_peak_bytes'] / 1e6:.0f} MB at its peak "
            f"(x {summary['memory_growth']:.2f}); opened in {summary['open_seconds']:.2f} s"
        )
    return "\n".join(lines)
