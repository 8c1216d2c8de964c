"""The calls that save and load: what all ranks check together before they write or read.

Behind the methods of `ShardedEMA` of the same names, where their arguments and errors are described.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from dist_ema.background import Background
from dist_ema.checkpoint import model_files, write_average, write_export
from dist_ema.checks import absolute, positive_integer
from dist_ema.exchange import Exchange
from dist_ema.files import ModelFiles
from dist_ema.loading import Escapes, load_average, load_model
from dist_ema.manifest import Manifest
from dist_ema.options import floating_dtype, name_patterns
from dist_ema.replicas import warn_of_differing_replicas
from dist_ema.sharded import take_sharded
from dist_ema.state import AveragedState
from dist_ema.writing import Pieces

__all__ = ["Storage"]

T = TypeVar("T")
PathLike = str | os.PathLike[str]
Patterns = str | Iterable[str] | None


class Storage:
    """The folders of one `ShardedEMA`. Every method but `wait` is collective: every rank must call it."""

    def __init__(self, exchange: Exchange, state: AveragedState) -> None:
        self._exchange = exchange
        self._state = state
        self._background = Background()

    def wait(self) -> None:
        """See `ShardedEMA.wait`."""
        self._background.wait()

    def save(self, path: PathLike, *, max_shard_size: int | str, background: bool) -> None:
        """See `ShardedEMA.save`."""

        def prepare() -> tuple[Path, Manifest, dict[str, Pieces], ModelFiles]:
            state = self._state
            state.refuse_while_swapped("save")
            texts = state.texts(state.options.dtype)
            files = model_files(state.plan, state.dtypes(), max_shard_size, texts)
            return absolute(path), self._manifest(), {name: state.pieces(name) for name in state.schedules}, files

        target, manifest, tracks, files = self._together("save", prepare)
        if self._state.options.skip_nonfinite:
            manifest = dataclasses.replace(manifest, num_refused=self._sum_refused())
        same = {"call": "save", "path": str(target), "num_updates": manifest.num_updates}
        self._exchange.compare({**same, "max_shard_size": str(max_shard_size), "background": background})
        warn_of_differing_replicas(self._exchange, self._state.plan)
        if not background:
            write_average(self._exchange, target, files, tracks, manifest)
            return
        exchange = self._background.exchange()
        copies = self._exchange.agree("save", lambda: self._background.copied(tracks))
        self._background.start(lambda: write_average(exchange, target, files, copies, manifest))

    def load(self, path: PathLike, *, new: Patterns, dropped: Patterns, verify: bool) -> None:
        """See `ShardedEMA.load`."""
        target, escapes = self._prepare_load("load", path, new, dropped, verify=verify)
        state, now = self._state, self._manifest()
        filled = self._exchange.agree("load", state.targets)
        saved, found = load_average(self._exchange, target, state.shards, now, escapes, filled, verify=verify)
        for change in now.changes_since(saved):
            self._exchange.warn(f"{target}: {change}")
        state.restore(filled, found, saved.num_updates)
        state.forget_refused(before=saved.num_refused if self._exchange.rank == 0 else 0)

    def start_from(self, path: PathLike, *, num_updates: int, new: Patterns, dropped: Patterns) -> None:
        """See `ShardedEMA.start_from`."""
        source, escapes = self._prepare_load("start_from", path, new, dropped, num_updates=num_updates)
        start = positive_integer("num_updates", num_updates)  # alike on all ranks by now
        state = self._state
        filled = self._exchange.agree("start_from", state.targets)
        first = next(iter(filled.values()))
        found = load_model(self._exchange, source, state.plan, state.shards, escapes, first)
        state.restore(dict.fromkeys(filled, first), found, start)

    def consolidate(
        self, path: PathLike, *, track: str | None, dtype: torch.dtype | None, max_shard_size: int | str
    ) -> None:
        """See `ShardedEMA.consolidate`."""

        def prepare() -> tuple[Path, Pieces, ModelFiles]:
            state = self._state
            state.refuse_while_swapped("consolidate")
            dtypes, texts = state.dtypes(floating_dtype("dtype", dtype)), state.texts(dtype or state.options.dtype)
            return absolute(path), state.pieces(track), model_files(state.plan, dtypes, max_shard_size, texts)

        target, pieces, files = self._together("consolidate", prepare)
        same = {"call": "consolidate", "path": str(target), "track": self._state.track(track), "dtype": str(dtype)}
        self._exchange.compare({**same, "max_shard_size": str(max_shard_size)})
        write_export(self._exchange, target, files, pieces)

    def load_sharded(
        self, state_dict: Mapping[str, torch.Tensor], *, track: str | None, num_updates: int | None
    ) -> None:
        """See `ShardedEMA.load_sharded_state_dict`."""
        state = self._state

        def prepare() -> tuple[str, list[torch.Tensor], int]:
            state.refuse_while_swapped("load_sharded_state_dict")
            count = max(state.num_updates, 1) if num_updates is None else positive_integer("num_updates", num_updates)
            return state.track(track), take_sharded(state.plan, state_dict), count

        name, values, count = self._together("load_sharded_state_dict", prepare)
        self._exchange.compare({"call": "load_sharded_state_dict", "track": name, "num_updates": count})
        state.take_over(name, values, count)

    def num_refused(self) -> int:
        """See `ShardedEMA.num_refused`."""
        self._exchange.arrive("num_refused")
        return self._sum_refused()

    def _sum_refused(self) -> int:
        (total,) = self._exchange.sum_integers([self._state.num_refused])
        return total

    def _together(self, call: str, prepare: Callable[[], T]) -> T:
        """See that all ranks come, that no save is under way, and that the local work succeeds on all."""
        self._exchange.arrive(call)
        self._background.wait()
        return self._exchange.agree(call, prepare)

    def _prepare_load(
        self, call: str, path: PathLike, new: Patterns, dropped: Patterns, **same: object
    ) -> tuple[Path, Escapes]:
        """The checked arguments of a load, the same on all ranks."""

        def prepare() -> tuple[Path, Escapes]:
            self._state.refuse_while_swapped(call)
            self._state.plan.verify()
            return absolute(path), Escapes(name_patterns("new", new), name_patterns("dropped", dropped))

        target, escapes = self._together(call, prepare)
        told = {name: str(value) for name, value in same.items()}
        self._exchange.compare({"call": call, "path": str(target), **dataclasses.asdict(escapes), **told})
        return target, escapes

    def _manifest(self) -> Manifest:
        return self._state.manifest(self._exchange.world_size)
