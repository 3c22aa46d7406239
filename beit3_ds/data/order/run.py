"""Determines the order of the samples of all streams, from the first step or from the positions in a checkpoint."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit3_ds.config import ConfigError, DataConfig
from beit3_ds.data.order.positions import StreamPosition
from beit3_ds.data.order.prefix_digest import IdentifiedSamples, prefix_digest
from beit3_ds.data.order.resuming import continue_stream, new_position
from beit3_ds.data.order.source_matching import FoundSource
from beit3_ds.data.order.stored_position import position_from_json
from beit3_ds.data.order.stream import StreamOrder
from beit3_ds.printing import printable

_LONGEST_LINE = 1000
POSITIONS = "positions"
"""Key in `Index.data` under which a checkpoint stores the position of each stream (images, pairs, texts)."""


class RunOrder:
    """Determines the samples of every step of a run, independent of the ranks.

    A stream with K samples per step uses the next K samples of its order in each step.
    """

    def __init__(self, config: DataConfig, seed: int, streams: Mapping[str, Iterable[IdentifiedSamples]]) -> None:
        """Starts every stream at its first sample.

        Args:
            config: data section of the run's config. It contains the samples per step and the sampling weights of the
                sources.
            seed: the run's seed.
            streams: sources of each stream that has samples in a step, in the order of the config.
        """
        self._config, self._seed, self._first_step = config, seed, 0
        self._found = {name: _find_sources(config, name, sources) for name, sources in streams.items()}
        self._absent: dict[str, Any] = {}
        self._orders = {name: StreamOrder(self._new_position(name)) for name in streams}

    def resume(self, first_step: int, data: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
        """Moves all streams to their positions in a checkpoint, and adapts the positions to changed data and settings.
        A stream with an unknown position begins with its first sample.

        Args:
            first_step: number of steps that were finished when the checkpoint was saved.
            data: `Index.data` of the checkpoint. A checkpoint of version 0.1 may have no positions; then the positions
                are computed from `first_step` and `before`.
            before: configuration of the run that wrote the checkpoint, by section.

        Returns:
            Description of each change since the checkpoint, one line each.

        Raises:
            ConfigError: if the checkpoint's positions are damaged.
        """
        self._first_step = first_step
        stored = data.get(POSITIONS, {})
        if not isinstance(stored, Mapping):
            raise _damaged("*", ValueError(f"{str(stored)[:40]!r} is not an object"))
        stored = dict(stored)
        lines: list[str] = []
        if POSITIONS not in data:
            lines.append(
                f"the checkpoint has no positions of its data, because an older version wrote it: they are computed "
                f"from its {first_step} steps and its settings. If files have changed since, repeats cannot be excluded"
            )
        for name in self._orders:
            if POSITIONS in data:
                position = _parse(name, stored.pop(name)) if name in stored else None
            else:
                try:
                    position = self._derive(name, first_step, before)
                except (KeyError, TypeError, AttributeError, ValueError) as error:
                    raise _damaged(name, error) from error
            if position is None:
                lines.append(f"data.{name}: its position is unknown; it begins with its first sample")
                self._orders[name] = StreamOrder(self._new_position(name))
                continue
            stream = self._config.streams()[name]
            found = self._found[name]
            try:
                continued = continue_stream(
                    position, self._seed, stream.samples_per_step, stream.weights(), found, self._config.blocks()
                )
                self._orders[name] = StreamOrder(continued.position)
            except (ValueError, IndexError, OverflowError) as error:
                raise _damaged(name, error) from error
            lines += continued.changes
        self._absent = stored
        return [printable(line, _LONGEST_LINE) for line in lines]

    def state_after(self, step: int) -> dict[str, Any]:
        """Returns the positions of all streams after `step` steps, to store in a checkpoint.

        A stream that this run does not use keeps the position that it had in the loaded checkpoint.
        """
        return self._absent | {name: self._position_after(name, step).to_json() for name in self._orders}

    def samples(self, stream: str, step: int, slots: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns two values of each sample in `slots`: its epoch, and its index in the stream. Both are (len(slots),)
        int64.

        Args:
            stream: name of the stream: "images", "pairs" or "texts".
            step: index of the step.
            slots: indices of the samples within the step.
        """
        epochs, numbers = self._orders[stream](self._samples_since(stream, step) + np.arange(slots.start, slots.stop))
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < self._orders[stream].position.total:
            raise _damaged(stream, ValueError("it leads to samples that the stream does not have"))
        return epochs, numbers

    def _samples_since(self, stream: str, step: int) -> int:
        return (step - self._first_step) * self._config.streams()[stream].samples_per_step

    def _position_after(self, name: str, step: int) -> StreamPosition:
        return self._orders[name].position.advanced(self._samples_since(name, step))

    def _new_position(self, name: str) -> StreamPosition:
        stream = self._config.streams()[name]
        return new_position(
            name,
            self._seed,
            stream.samples_per_step,
            stream.weights(),
            self._found[name],
            blocks=self._config.blocks(),
        )

    def _derive(self, name: str, step: int, before: Mapping[str, Any]) -> StreamPosition | None:
        """Computes a stream's position after `step` steps, if the checkpoint is old and stores no position. Returns
        None if the checkpoint's run did not use the stream, or if a source of the stream is no longer in the config.
        """
        stream = before["data"][name]
        found = {source.path: source for source in self._found[name]}
        paths = [source["path"] for source in stream["train"]]
        if not stream["samples_per_step"] or any(path not in found for path in paths):
            return None
        weights = [source["weight"] for source in stream["train"] if source["weight"] is not None] or None
        seed, samples = before["training"]["seed"], stream["samples_per_step"]
        start = new_position(name, seed, samples, weights, [found[path] for path in paths])
        return start.advanced(step * samples)


def _parse(name: str, content: Any) -> StreamPosition:
    try:
        return position_from_json(name, content)
    except (ValueError, KeyError) as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> ConfigError:
    reason = f"it has no {error}" if isinstance(error, KeyError) else error
    return ConfigError(
        f"data.{name}: the checkpoint's position in the data is damaged: {reason}. Delete this checkpoint, so that "
        "the same command resumes from an earlier one, or start a new run in another training.output_dir."
    )


def _find_sources(config: DataConfig, name: str, sources: Iterable[IdentifiedSamples]) -> list[FoundSource]:
    return [
        FoundSource(path=source.path, size=len(samples), digest=partial(prefix_digest, samples))
        for source, samples in zip(config.streams()[name].train, sources, strict=True)
    ]
