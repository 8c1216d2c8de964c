"""The commands of `dist-ema`: a command takes the parsed options and returns the text to print."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

from dist_ema.checks import absolute, local, target_folder
from dist_ema.cli.answers import BadAnswer, json_answer, progress_bar
from dist_ema.cli.inspecting import kind_of_weights
from dist_ema.disk.folders import contents
from dist_ema.disk.folders.steady_reading import steadily
from dist_ema.disk.formats.file_names import stem_in
from dist_ema.disk.listing import holds_average
from dist_ema.disk.manifest import find_saved, read_manifest
from dist_ema.disk.saved_average import damage_text, damaged_tensors, read_saved
from dist_ema.disk.sources import Weights, find_weights
from dist_ema.errors import CheckpointCorruptError, CheckpointMismatchError, ConfigError
from dist_ema.schedules.base import Schedule
from dist_ema.schedules.nesting import horizon_of
from dist_ema.schedules.profiles import PowerSchedule
from dist_ema.schedules.records import schedule_from_json, schedule_from_text, schedule_text

__all__ = ["diff", "plot", "synthesize", "verify"]


def verify(options: argparse.Namespace) -> str:
    """Read all of an average and compare its checksums."""
    source = local(options.src)
    return steadily([source], lambda check: _verify(source))


def _verify(source: Path) -> str:
    if source.is_file() or (not holds_average(source) and stem_in(contents.resolve(source)) is not None):
        return _verify_weights(source)
    saved = read_saved(source)
    if not saved.manifest.checksums:
        raise CheckpointMismatchError(
            f"{saved.folder} was written without checksums (format version 1): its files fit its manifest, more cannot "
            "be told. Load it and save it again to add them"
        )
    damaged, num_bytes = [], 0
    with progress_bar(sum(t.nbytes for model in saved.models.values() for t in model.tensors.values())) as bar:
        for name, size, is_damaged in damaged_tensors(saved):
            num_bytes += size
            bar.update(size)
            damaged += [name] if is_damaged else []
    if damaged:
        raise CheckpointCorruptError(damage_text(saved.folder, damaged))
    return f"{saved.folder}: sound, {len(saved.manifest.tensors) * len(saved.models)} tensors, {num_bytes:,} bytes"


def _verify_weights(source: Path) -> str:
    """What can be said of weights without checksums."""
    model = find_weights(source, None).model
    index = "" if model.index_checksum is None else ", and the index"
    files = f"{len(model.files)} file{'s' * (len(model.files) > 1)}"
    file_bytes = sum(file.size_bytes for file in model.files.values())
    return (
        f"{source}: {kind_of_weights(source)}, {len(model.tensors)} tensors in {files}, {file_bytes:,} bytes. The "
        f"headers are in order, and fit the sizes of the files{index}. There are no checksums: no value was checked"
    )


def diff(options: argparse.Namespace) -> str:
    """Tell how far two sets of weights lie apart."""
    from dist_ema.live.distance import relative_distance  # loads torch
    from dist_ema.offline.comparison import Difference, differences

    sources = [local(options.a), local(options.b)]
    tracks = [options.track, options.track if options.track_b is None else options.track_b]

    def read(check: Callable[[], None]) -> tuple[Weights, Weights, list[Difference]]:
        a, b = map(find_weights, sources, tracks)
        a, b = a.under_names_of(b), b.under_names_of(a)
        both = [(stored, b.model.tensors[name]) for name, stored in a.model.tensors.items() if name in b.model.tensors]
        with progress_bar(sum(of_a.nbytes + of_b.nbytes for of_a, of_b in both if of_a.shape == of_b.shape)) as bar:
            return a, b, sorted(differences(a, b, bar.update), key=lambda tensor: -tensor.relative)

    a, b, compared = steadily(sources, read)
    total = relative_distance(
        sum(tensor.difference for tensor in compared), sum(tensor.reference for tensor in compared)
    )
    of_a, of_b = a.model.tensors, b.model.tensors
    apart = [
        *(f"only in {a.path}: {name}" for name in of_a if name not in of_b),
        *(f"only in {b.path}: {name}" for name in of_b if name not in of_a),
        *(
            f"{name}: {list(of_a[name].shape)} against {list(of_b[name].shape)}"
            for name in of_a
            if name in of_b and of_a[name].shape != of_b[name].shape
        ),
    ]
    if options.json:
        facts = {
            "a": str(a.path),
            "b": str(b.path),
            "relative": total,
            "tensors": {tensor.name: tensor.relative for tensor in compared},
            "apart": apart,
        }
        text = json_answer(facts)
    else:
        lines = [f"{tensor.relative:10.3e}  {tensor.name}" for tensor in compared[: max(options.top, 0)]]
        paths = [f"a: {a.path}", f"b: {b.path}"]
        text = "\n".join([*paths, f"{total:10.3e}  all {len(compared)} tensors that both have", *lines])
    if apart:
        raise BadAnswer(text, f"{len(apart)} tensors cannot be compared: {'; '.join(apart[:3])}")
    return text


def synthesize(options: argparse.Namespace) -> str:
    """Make an average that was no track of the run."""
    import torch  # most commands do not need it

    from dist_ema.offline.synthesis import Synthesis, weigh, write

    target = target_folder(options.out)
    wanted = (
        schedule_from_text(options.schedule)
        if options.sigma_rel is None
        else PowerSchedule(sigma_rel=options.sigma_rel)
    )

    def work(check: Callable[[], None]) -> tuple[Synthesis, list[warnings.WarningMessage]]:
        weighed = weigh(options.snapshots, wanted, options.num_updates)
        with warnings.catch_warnings(record=True) as warned, progress_bar(weighed.nbytes) as bar:
            warnings.simplefilter("always")
            made = write(
                weighed,
                target,
                dtype=None if options.dtype is None else getattr(torch, options.dtype),
                max_shard_size=options.max_shard_size,
                progress=bar.update,
                check=check,
            )
        return made, warned

    made, warned = steadily([absolute(options.snapshots)], work)
    facts = {
        "folder": str(made.folder),
        "schedule": repr(made.schedule),
        "num_updates": made.num_updates,
        "num_snapshots": len({part.folder for part in made.weights if part.weight}),
        "profile_error": made.profile_error,
        "amplification": made.amplification,
        "weights": [
            {"folder": str(part.folder), "track": part.track, "num_updates": part.num_updates, "weight": part.weight}
            for part in made.weights
        ],
        "warnings": [str(warning.message) for warning in warned],
    }
    if options.json:
        return json_answer(facts)
    lines = [
        f"{made.folder}: {made.schedule!r} after {made.num_updates:,} updates",
        f"  from {facts['num_snapshots']} snapshots, profile error {made.profile_error:.2e}, sum of absolute weights "
        f"{made.amplification:.2f}",
        *(f"  warning: {warning.message}" for warning in warned),
    ]
    return "\n".join(lines)


def plot(options: argparse.Namespace) -> str:
    """Draw schedules, or the profile that snapshots can express."""
    from dist_ema.offline.pictures import check_free
    from dist_ema.offline.plots import draw_schedules

    check_free(local(options.out), options.force)
    if options.sigma_rel is not None:
        if options.src is None or options.schedule or options.steps is not None:
            options.refuse(
                "--sigma-rel needs SRC, the folder of the snapshots, and goes without --schedule and --steps"
            )
        return _plot_profiles(options)
    if options.src is None and not options.schedule:
        options.refuse("nothing to draw: give SRC, a saved average, or --schedule, or both")
    manifest = None
    if options.src is not None:
        source = local(options.src)
        manifest = steadily([source], lambda check: read_manifest(find_saved(source)))
    tracks = {} if manifest is None else manifest.tracks
    try:
        schedules = {f"{name}: {schedule_text(saved)}": schedule_from_json(saved) for name, saved in tracks.items()}
    except ConfigError as error:
        raise CheckpointMismatchError(f"{options.src} has a schedule that only its author can draw: {error}") from None
    schedules |= {text: schedule_from_text(text) for text in options.schedule}
    # One line marks the present: the count of the average, or of its tracks where all began later.
    now = None if manifest is None else max(map(manifest.count_of, manifest.tracks))
    steps = options.steps
    if steps is None:
        steps = max(2 * (now or 0), max(map(_total_steps, schedules.values())) or 1000)
    draw_schedules(schedules, steps, options.out, now=now, replace=options.force)
    text = f"{options.out}: {len(schedules)} schedule{'s' * (len(schedules) > 1)} over {steps:,} updates"
    return text if now is None else f"{text}, now at {now:,}"


def _total_steps(schedule: Schedule) -> int:
    """The number of updates after which a schedule has nothing new; 0 if there is none."""
    return horizon_of(schedule) or 0


def _plot_profiles(options: argparse.Namespace) -> str:
    from dist_ema.offline.plots import MOST_POINTS, draw_profiles
    from dist_ema.offline.posthoc import masses  # loads torch
    from dist_ema.offline.synthesis import weigh

    wanted = PowerSchedule(sigma_rel=options.sigma_rel)
    weighed = steadily([absolute(options.src)], lambda check: weigh(options.src, wanted))
    snapshots, end = weighed.snapshots, weighed.snapshots.num_updates
    edges = sorted({end * point // MOST_POINTS for point in range(MOST_POINTS + 1)})
    *profiles, target = masses([*(source.profile for source in snapshots.sources), snapshots.profile(wanted)], edges)
    achieved = sum(weight * profile for weight, profile in zip(weighed.fit.weights, profiles, strict=True))
    draw_profiles(
        edges,
        (f"wanted: sigma_rel {options.sigma_rel:g}", target.tolist()),
        (f"sum of snapshots, profile error {weighed.fit.error:.2e}", achieved.tolist()),
        [profile.tolist() for profile in profiles],
        options.out,
        replace=options.force,
    )
    return (
        f"{options.out}: sigma_rel {options.sigma_rel:g} over {end:,} updates from {len(weighed.parts)} saved "
        f"averages, profile error {weighed.fit.error:.2e}"
    )
