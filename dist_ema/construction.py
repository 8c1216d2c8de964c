"""Building an average, or one more track of it: every rank plans alone, then all compare their plans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from dist_ema.averaging.averages import Averages
from dist_ema.averaging.counting.now import LIVE
from dist_ema.averaging.state import AveragedState
from dist_ema.boxes.holding import Proof
from dist_ema.boxes.plan import Plan
from dist_ema.checkpoint.record import dtype_name, in_files, manifest_of
from dist_ema.checkpoint.saving import model_files
from dist_ema.checks import folder_name
from dist_ema.disk.forms.deciding import FormOf, decide
from dist_ema.disk.forms.models import Model
from dist_ema.disk.manifest import Agreement
from dist_ema.errors import ConfigError
from dist_ema.live.holders.expert_copies import warn_of_expert_copies
from dist_ema.live.holders.proving import plan_of_all
from dist_ema.live.holders.replicas import Replicas
from dist_ema.live.teacher import Teacher
from dist_ema.live.teacher_state import TeacherState
from dist_ema.options import Options, Patterns, checked_device, checked_schedules, name_patterns
from dist_ema.ranks.calls import Call, ended_for_all
from dist_ema.ranks.exchange import Exchange
from dist_ema.ranks.groups import launched_without_a_group, names_of
from dist_ema.schedules.base import Schedule
from dist_ema.schedules.combinators import Every
from dist_ema.schedules.functions import ScheduleLike
from dist_ema.schedules.merging import MergeSchedule
from dist_ema.schedules.nesting import inner_of
from dist_ema.schedules.records import is_known, schedule_text, schedule_to_json
from dist_ema.topology.experts import check_numbers
from dist_ema.topology.names import class_of, unwrapped
from dist_ema.topology.parts import whole_model
from dist_ema.topology.planning import is_adapted, plan_model

__all__ = ["Built", "add_track", "build", "drop_track"]


class Built(NamedTuple):
    """A new average.

    Attributes:
        state: the averages of this rank.
        replicas: the tensors that several ranks hold alike.
        form_of: gives the form of the folders that this model wants.
    """

    state: AveragedState
    replicas: Replicas
    form_of: FormOf


def build(
    exchange: Exchange,
    model: nn.Module | Sequence[nn.Module],
    schedule: ScheduleLike | Mapping[str, ScheduleLike],
    into: nn.Module | None,
    **options: Any,
) -> Built:
    """Collective: every rank must call it. See `ShardedEMA`.

    Args:
        exchange: the control traffic of all ranks.
        model: the prepared model, or the parts of it that this rank has.
        schedule: a schedule, or one for every track.
        into: the module that is to hold the averages, or None.
        options: the options of `ShardedEMA`.

    Returns:
        The average, its values allocated.

    Raises:
        ConfigError: an option is out of range, or a pattern matches no name.
        UnsupportedModelError: the model cannot be averaged exactly as it is.
        RankMismatchError: the ranks do not agree about the model or the options.
    """

    def prepare() -> _Prepared:
        checked, schedules, whole = _checked(**options), checked_schedules(schedule), whole_model(model)
        checked = checked.resolved(is_adapted=is_adapted(whole))
        planned = partial(plan_model, options=checked, rank=exchange.rank, world_size=exchange.world_size)
        plans = [planned(whole)]
        if into is not None:
            teacher, student = _teacher(into, checked, schedules), plans[0].averaged_part()
            # No parameter of a teacher requires a gradient.
            averaged = {spec.fqn for spec in student.specs}.union(student.aliases) if checked.trainable_only else None
            plans.append(planned(teacher, averaged=averaged))
        proofs = [
            Proof.of(plan, exchange.rank, exchange.world_size, exchange.channel.drawn, names_of) for plan in plans
        ]
        return _Prepared(checked, schedules, plans, proofs, partial(decide, Model(unwrapped(whole), class_of)))

    with ended_for_all(exchange, "ShardedEMA"):
        exchange.arrive("ShardedEMA")
        prepared, sums = exchange.agree_and_sum(
            _ACTION, prepare, _terms, partial(_record, has_teacher=into is not None)
        )
        plans = [
            plan_of_all(exchange, _ACTION, plan, proof, sums[len(proof.terms) * number :][: len(proof.terms)])
            for number, (plan, proof) in enumerate(zip(prepared.plans, prepared.proofs, strict=True))
        ]
        state = exchange.agree_alike(
            _ACTION, partial(_allocated, prepared, plans, exchange.world_size), partial(_in_files, exchange.world_size)
        )
        _warn_of_a_missing_group(exchange)
        _warn_of_coarse_averages(exchange, state.options.dtype)
        _warn_of_unknown_schedules(exchange, state.schedules.values())
        _warn_of_sampled_merges(exchange, state.schedules.values(), state.options)
        compared = in_files(state)
        replicas = Replicas(exchange, compared)
        replicas.check(_ACTION)
        if state.options.experts:
            warn_of_expert_copies(exchange, _ACTION, compared, state.options.declares)
    return Built(state, replicas, prepared.form_of)


def add_track(call: Call, state: AveragedState, name: str, schedule: ScheduleLike, start: str) -> None:
    """Collective: every rank must call it. See `ShardedEMA.add_track`."""

    def prepare() -> tuple[Schedule, Averages]:
        (checked,) = checked_schedules({folder_name("track name", name): schedule}).values()
        if not state.takes_tracks:
            raise ConfigError("add_track with into: a teacher holds one average. Build a second ShardedEMA beside it")
        if name in state.schedules:
            raise ConfigError(f"there is a track {name!r} already, among {list(state.schedules)}: give another name")
        if start != LIVE and (not isinstance(start, str) or start not in state.schedules):
            raise ConfigError(f"start is {start!r}, expected {LIVE!r} or one of the tracks {list(state.schedules)}")
        return checked, state.new_averages()

    checked, averages = call.together(
        prepare,
        lambda prepared: {
            "track": name,
            "schedule": schedule_to_json(prepared[0]),
            "start": start,
            **state.progress,
        },
        after_saves=True,
    )
    _warn_of_unknown_schedules(call.exchange, [checked])
    _warn_of_sampled_merges(call.exchange, [checked], state.options)
    state.add_track(name, checked, averages, start)


def drop_track(call: Call, state: AveragedState, name: str) -> None:
    """Collective: every rank must call it. See `ShardedEMA.drop_track`."""

    def prepare() -> str:
        track = state.track(name)
        if not state.takes_tracks or len(state.schedules) == 1:
            raise ConfigError(f"{track!r} is the only track: an average has at least one. Add another one first")
        return track

    track = call.together(prepare, lambda track: {"track": track, **state.progress}, after_saves=True)
    state.drop_track(track)


_ACTION = "building the average"


def _checked(*, device: object, include: Patterns, exclude: Patterns, **others: Any) -> Options:
    return Options(
        device=checked_device(device),
        include=name_patterns("include", include),
        exclude=name_patterns("exclude", exclude),
        **others,
    )


class _Prepared(NamedTuple):
    """What a rank has planned alone: of the model, then of the teacher if there is one."""

    options: Options
    schedules: Mapping[str, Schedule]
    plans: list[Plan]
    proofs: list[Proof]
    form_of: FormOf


def _terms(prepared: _Prepared) -> list[int]:
    return [term for proof in prepared.proofs for term in proof.terms]


def _record(prepared: _Prepared, *, has_teacher: bool) -> Mapping[str, Any]:
    """What the ranks must have alike, whatever they hold."""
    return {
        "options": prepared.options.to_json(),
        "experts": prepared.options.experts_json(),
        "tracks": {name: schedule_to_json(schedule) for name, schedule in prepared.schedules.items()},
        "into": has_teacher,
    }


def _in_files(world_size: int, state: AveragedState) -> Mapping[str, Any]:
    """What the files will have, and the dtypes of the model: alike on all ranks, now that all tensors are known."""
    manifest = manifest_of(state, world_size)
    live_dtypes = {spec.fqn: dtype_name(spec.dtype) for spec in state.plan.specs}
    return {**manifest.compared(Agreement.MODEL), "live_dtypes": live_dtypes, **manifest.compared(Agreement.RUN)}


def _allocated(prepared: _Prepared, plans: Sequence[Plan], world_size: int) -> AveragedState:
    """The averages of this rank, their memory allocated; checked is what only the tensors of all ranks show."""
    options, plan, of_teacher = prepared.options, plans[0], plans[1:]
    options.check_patterns(plan.names)
    check_numbers(plan, options.experts, world_size)
    plan.check_not_empty(trainable_only=bool(options.trainable_only))
    if options.overlap:
        _check_overlap(plan, has_teacher=bool(of_teacher))
    if of_teacher:
        teacher = Teacher(plan, of_teacher[0], options.dtype)
        state: AveragedState = TeacherState(teacher, options, prepared.schedules)
    else:
        state = AveragedState(plan, options, prepared.schedules)
    # Raises if a tensor cannot be stored.
    model_files(in_files(state), {spec.fqn: spec.dtype for spec in plan.specs}, "5GB")
    manifest_of(state, world_size).check_size()
    state.allocate()
    return state


def _warn_of_a_missing_group(exchange: Exchange) -> None:
    """Collective: every rank must call it."""
    launched = launched_without_a_group()
    if launched:
        exchange.warn(
            f"the launcher started {launched} processes, but there is no process group: each process keeps a whole "
            "average of its own, and their saves replace one another. Call torch.distributed.init_process_group() (or "
            "make the Accelerator) before the average is built"
        )


def _warn_of_coarse_averages(exchange: Exchange, dtype: torch.dtype) -> None:
    """Collective: every rank must call it."""
    if dtype in (torch.bfloat16, torch.float16):
        exchange.warn(
            f"averaged values in {dtype} stand still when the momentum is small: at a decay of 0.9999 a bfloat16 "
            "average loses 99% of the motion. Use torch.float32 and convert on export"
        )


def _warn_of_unknown_schedules(exchange: Exchange, schedules: Iterable[Schedule]) -> None:
    """Collective: every rank must call it."""
    own = [schedule_text(schedule_to_json(schedule)) for schedule in schedules if not is_known(schedule)]
    if own:
        exchange.warn(
            f"only your code can rebuild the schedule {', '.join(own)}: a checkpoint keeps its repr. A resume sees a "
            "change only if the repr tells, and dist-ema can neither draw it nor synthesize from its snapshots"
        )


def _warn_of_sampled_merges(exchange: Exchange, schedules: Iterable[Schedule], options: Options) -> None:
    """Collective: every rank must call it."""
    interval = options.interval
    if interval == 1 or options.interval_correction:
        return
    sampled = [one for one in schedules if not (isinstance(one, Every) and one.num_steps % interval == 0)]
    merges = [merge for schedule in sampled for merge in _merges_in(schedule) if merge.num_steps > 1]
    if merges:
        exchange.warn(
            f"{merges[0]!r} counts every update as a value, but interval={interval} leaves most of them out, so the "
            f"first value would keep most of the weight. Give every({interval}, {merges[0]!r}): each value that is "
            "taken then has the weight of those that it stands for"
        )


def _merges_in(schedule: Schedule) -> Iterator[MergeSchedule]:
    if isinstance(schedule, MergeSchedule):
        yield schedule
    for inner in inner_of(schedule):
        yield from _merges_in(inner)


def _check_overlap(plan: Plan, *, has_teacher: bool) -> None:
    if has_teacher:
        raise ConfigError("overlap=True and into are given, expected one: a teacher runs forward beside training too")
    buffers = [spec.fqn for spec in plan.specs if spec.averaged and spec.is_buffer]
    if buffers:
        raise ConfigError(
            f"overlap=True, but {len(buffers)} buffers are averaged ({buffers[0]}, ...), which a forward may write to "
            "while an update reads them: exclude them, or leave update_buffers or overlap out"
        )


def _teacher(into: object, options: Options, schedules: Mapping[str, Schedule]) -> nn.Module:
    """The teacher, if it can be one. Raises a ConfigError otherwise."""
    if not isinstance(into, nn.Module):
        raise ConfigError(f"into is a {type(into).__name__}, expected a torch.nn.Module to hold the average")
    if len(schedules) > 1:
        raise ConfigError(f"into holds one average, but there are {len(schedules)} tracks: {list(schedules)}")
    if options.compensated:
        raise ConfigError("compensated=True with into, expected one: a teacher has no room for what rounding takes")
    if options.masters:
        raise ConfigError("masters=True with into, expected one: a rank has no masters of all that its teacher holds")
    if options.device is not None:
        raise ConfigError(f"device is {options.device} and into is given, expected one: a teacher lies where it lies")
    trained = [name for name, parameter in into.named_parameters() if parameter.requires_grad]
    if trained:
        raise ConfigError(
            f"{len(trained)} parameters of into require a gradient ({trained[0]}, ...): only the average moves a "
            "teacher. Call teacher.requires_grad_(False) before it is wrapped"
        )
    return into
