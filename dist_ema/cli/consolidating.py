"""`dist-ema consolidate`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dist_ema.checks import local
from dist_ema.cli.answers import progress_bar
from dist_ema.disk.manifest import Manifest
from dist_ema.disk.saved_average import read_saved
from dist_ema.schedules.bema import BemaSchedule

if TYPE_CHECKING:
    from dist_ema.live.correction import Bema

__all__ = ["consolidate"]

# The constants of the correction, as options.
_CONSTANTS = ("eta", "rho", "gamma", "update_after_step")


def consolidate(options: argparse.Namespace) -> str:
    """Write one average as a plain model folder."""
    given = {name: getattr(options, name) for name in _CONSTANTS if getattr(options, name) is not None}
    if options.bema != (options.live is not None) or (not options.bema and (given or options.start is not None)):
        options.refuse(
            "--bema needs --live, the weights that were saved with the average; --live, --start and the constants go "
            "with --bema alone"
        )
    import torch  # the other commands do not need it

    from dist_ema.offline.consolidation import consolidate_checkpoint

    saved = read_saved(local(options.src))
    track = saved.track(options.track)
    correct = _correction(options, given, saved.manifest, track) if options.bema else None
    with progress_bar(sum(tensor.nbytes for tensor in saved.models[track].tensors.values())) as bar:
        consolidate_checkpoint(
            options.src,
            options.dst,
            track=track,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            max_shard_size=options.max_shard_size,
            link=options.link,
            correct=correct,
            live=options.live,
            progress=bar.update,
        )
    text = f"{options.dst}: {len(saved.manifest.tensors)} tensors of track {track} from {saved.folder}"
    if correct is None:
        return text
    start = "of the track 'start'" if correct.start is None else correct.start
    weight = correct.weight(saved.manifest.count_of(track))
    constants = ", ".join(f"{name} {getattr(correct, name):g}" for name in _CONSTANTS)
    return f"{text}\n  plus {weight:.9g} (live - start): live {options.live}, start {start}; {constants}"


def _correction(options: argparse.Namespace, given: dict[str, float], manifest: Manifest, track: str) -> Bema:
    """BEMA with the constants of the command line; those of the saved schedule come next, if it is BEMA's."""
    from dist_ema.live.correction import Bema  # loads torch

    record = manifest.tracks[track]
    known = {name: record[name] for name in _CONSTANTS if name in record and record["type"] == BemaSchedule.__name__}
    return Bema(start=options.start, **{**known, **given})
