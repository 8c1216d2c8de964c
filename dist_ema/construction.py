"""Building an average: every rank plans alone, then all compare their plans."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from dist_ema.averaging.state import AveragedState
from dist_ema.boxes.coverage import Coverage
from dist_ema.boxes.plan import Plan
from dist_ema.boxes.shards import Box
from dist_ema.checkpoint.record import dtype_name, manifest_of
from dist_ema.checkpoint.save_calls import SmallFiles
from dist_ema.checkpoint.saving import model_files
from dist_ema.disk.formats.model_config import config_files
from dist_ema.disk.manifest import Agreement
from dist_ema.errors import ConfigError, DistEMAError, RankMismatchError, agreed
from dist_ema.live.replicas import Replicas
from dist_ema.live.teacher import Teacher
from dist_ema.live.teacher_state import TeacherState
from dist_ema.options import Options, Patterns, checked_device, checked_schedules, name_patterns
from dist_ema.ranks.calls import ended_for_all
from dist_ema.ranks.exchange import Exchange
from dist_ema.schedules.base import Schedule
from dist_ema.schedules.records import is_known, schedule_text, schedule_to_json
from dist_ema.topology.names import class_of, unwrapped
from dist_ema.topology.planning import plan_model

__all__ = ["Built", "build"]


class Built(NamedTuple):
    """A new average.

    Attributes:
        state: the averages of this rank.
        replicas: the tensors that several ranks hold alike.
        small_files: gives the small files that the model wants beside its weights.
    """

    state: AveragedState
    replicas: Replicas
    small_files: SmallFiles


def build(
    exchange: Exchange,
    model: nn.Module,
    schedule: Schedule | Mapping[str, Schedule],
    into: nn.Module | None,
    **options: Any,
) -> Built:
    """Collective: every rank must call it. See `ShardedEMA`.

    Args:
        exchange: the control traffic of all ranks.
        model: the prepared model.
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

    def prepare() -> tuple[AveragedState, SmallFiles]:
        checked, schedules = _checked(**options), checked_schedules(schedule)
        plan_one = functools.partial(
            plan_model,
            averages=checked.averages,
            excludes=checked.excludes,
            update_buffers=checked.update_buffers,
            experts=checked.experts,
            rank=exchange.rank,
            world_size=exchange.world_size,
        )
        plan = plan_one(model)
        checked.check_patterns(plan.names)
        plan.check_not_empty()
        if checked.overlap:
            _check_overlap(plan, into)
        model_files(plan, {spec.fqn: spec.dtype for spec in plan.specs}, "5GB")  # raises if a tensor cannot be stored
        if into is None:
            state = AveragedState(plan, checked, schedules)
        else:
            _check_teacher(into, checked, schedules)
            state = TeacherState(Teacher(plan, plan_one(into), checked.dtype), checked, schedules)
        manifest_of(state, exchange.world_size).check_size()
        inner = unwrapped(model)
        return state, functools.partial(config_files, inner, class_of(inner).__name__)

    with ended_for_all(exchange, "ShardedEMA"):
        exchange.arrive("ShardedEMA")
        state, small_files = _agreed(exchange, prepare, has_teacher=into is not None)
        exchange.agree(_ACTION, state.allocate)
        _warn_of_coarse_averages(exchange, state.options.dtype)
        _warn_of_unknown_schedules(exchange, state.schedules.values())
        replicas = Replicas(exchange, state.plan)
        replicas.check(_ACTION)
    return Built(state, replicas, small_files)


_ACTION = "building the average"


def _checked(*, device: object, include: Patterns, exclude: Patterns, **others: Any) -> Options:
    return Options(
        device=checked_device(device),
        include=name_patterns("include", include),
        exclude=name_patterns("exclude", exclude),
        **others,
    )


class _Prepared(NamedTuple):
    """What a rank has planned alone: the average, and what shows that the boxes of all ranks cover the model."""

    state: AveragedState
    small_files: SmallFiles
    coverage: Coverage
    owned: list[Box]


def _agreed(
    exchange: Exchange, prepare: Callable[[], tuple[AveragedState, SmallFiles]], *, has_teacher: bool
) -> tuple[AveragedState, SmallFiles]:
    """Collective: every rank must call it. Refuses ranks that planned another model, or have other options.

    One agreement says whether any rank failed, whether all are alike, and whether their boxes cover every tensor.
    """

    def work() -> _Prepared:
        state, small_files = prepare()
        owned = [shard.box for averaged in (True, False) for shard in state.plan.owned(averaged=averaged)]
        return _Prepared(state, small_files, Coverage(state.plan.specs, exchange.channel.drawn), owned)

    def record(prepared: _Prepared) -> Mapping[str, Any]:
        manifest = manifest_of(prepared.state, exchange.world_size)
        live_dtypes = {spec.fqn: dtype_name(spec.dtype) for spec in prepared.state.plan.specs}
        of_model = {**manifest.compared(Agreement.MODEL), "live_dtypes": live_dtypes}
        declared = prepared.state.options.experts_json()
        return {"experts": declared, "model": of_model, **manifest.compared(Agreement.RUN), "into": has_teacher}

    def terms(prepared: _Prepared) -> list[int]:
        return [prepared.coverage.fingerprint(prepared.owned)]

    try:
        prepared, (fingerprint,) = exchange.agree_and_sum(_ACTION, work, terms, record)
    except RankMismatchError as error:
        raise _with_advice(error) from None
    coverage = prepared.coverage
    if not coverage.is_whole(fingerprint):
        coverage.check(exchange.sum_integers(coverage.contribution(prepared.owned)))
    return prepared.state, prepared.small_files


def _with_advice(error: RankMismatchError) -> DistEMAError:
    if " differ in model: " not in str(error):
        return error
    return agreed(
        RankMismatchError(
            f"{str(error).replace(' differ in model: ', ' differ in ')}. If these ranks are stages of a pipeline, or "
            "each has experts of its own: this version does not serve such a model; a later one will. Until then shard "
            "the whole model over all ranks, with fully_shard or tensor parallelism"
        )
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


def _check_overlap(plan: Plan, into: nn.Module | None) -> None:
    if into is not None:
        raise ConfigError("overlap=True and into are given, expected one: a teacher runs forward beside training too")
    buffers = [spec.fqn for spec in plan.specs if spec.averaged and spec.is_buffer]
    if buffers:
        raise ConfigError(
            f"overlap=True, but {len(buffers)} buffers are averaged ({buffers[0]}, ...), which a forward may write to "
            "while an update reads them: exclude them, or leave update_buffers or overlap out"
        )


def _check_teacher(into: object, options: Options, schedules: Mapping[str, Schedule]) -> None:
    if not isinstance(into, nn.Module):
        raise ConfigError(f"into is a {type(into).__name__}, expected a torch.nn.Module to hold the average")
    if len(schedules) > 1:
        raise ConfigError(f"into holds one average, but there are {len(schedules)} tracks: {list(schedules)}")
    if options.compensated:
        raise ConfigError("compensated=True with into, expected one: a teacher has no room for what rounding takes")
    if options.device is not None:
        raise ConfigError(f"device is {options.device} and into is given, expected one: a teacher lies where it lies")
    trained = [name for name, parameter in into.named_parameters() if parameter.requires_grad]
    if trained:
        raise ConfigError(
            f"{len(trained)} parameters of into require a gradient ({trained[0]}, ...): only the average moves a "
            "teacher. Call teacher.requires_grad_(False) before it is wrapped"
        )
