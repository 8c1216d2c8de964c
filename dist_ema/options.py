"""The options of an average, checked once."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import nn

from dist_ema.checks import folder_name, positive_integer
from dist_ema.errors import ConfigError
from dist_ema.schedules.base import Schedule
from dist_ema.schedules.functions import ScheduleLike, as_schedule

__all__ = [
    "Experts",
    "OptionArguments",
    "Options",
    "Patterns",
    "check_names",
    "checked_device",
    "checked_schedules",
    "floating_dtype",
    "matches_any",
    "name_patterns",
]

Patterns = str | Iterable[str] | None
"""One glob pattern of names, several, or none. A pattern matches a whole name, and `*` crosses dots."""

_AVERAGED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class OptionArguments(TypedDict, total=False):
    """The options as `ShardedEMA` and `attach` take them: more types than `Options` keeps, and `into`."""

    interval: int
    interval_correction: bool
    update_buffers: bool
    dtype: torch.dtype
    device: torch.device | str | None
    include: str | Iterable[str] | None
    exclude: str | Iterable[str] | None
    trainable_only: bool | None
    averaged_only: bool | None
    skip_nonfinite: bool
    compensated: bool
    overlap: bool
    masters: bool
    experts: Iterable[Experts]
    into: nn.Module | None


@dataclasses.dataclass(frozen=True)
class Experts:
    """Plain tensors that each rank has of its own, as parts of what the ranks of a group hold together: local experts.

    All ranks give the same `names` and `dim`. The tensors of the ranks are equal in size. Which ranks hold copies of
    the same experts need not be said: that is found by content. The average and its files have whole tensors, or one
    tensor for an expert; `include` and `exclude` mean the names there.

    Args:
        names: glob pattern or patterns of names. With `dim=None`, the part `{}` of a pattern is the number of an
            expert: "layers.*.experts.{}.*".
        dim: the dimension along which the tensors of the ranks lie end to end in the whole tensor. None for a list of
            experts, which every rank numbers from 0: number i on a rank becomes number i + (its place in the group) *
            (experts on a rank).
        group: the process group whose ranks hold different experts, in the order of their ranks in it; None for all
            ranks.

    Raises:
        ConfigError: a value is of the wrong type, or a pattern has a `{}` where it must not, or lacks it.

    Example:
        >>> from dist_ema import Experts
        >>> stacked = Experts("layers.*.experts.w?", dim=0)
        >>> listed = Experts("layers.*.experts.{}.*", dim=None)
    """

    names: str | Iterable[str]
    dim: int | None
    group: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", name_patterns("the names of Experts", self.names))
        if not self.names:
            raise ConfigError("the names of Experts are empty, expected a glob pattern such as 'experts.*'")
        if self.dim is not None and (isinstance(self.dim, bool) or not isinstance(self.dim, int)):
            raise ConfigError(f"the dim of Experts is {self.dim!r}, expected an integer, or None for a list of experts")
        for pattern in self.patterns:
            numbers = pattern.split(".").count(NUMBER)
            if self.dim is None and numbers != 1:
                raise ConfigError(
                    f"Experts has the pattern {pattern!r} and dim=None, expected one part {NUMBER} of the pattern, "
                    f"which stands for the number of an expert: 'experts.{NUMBER}.*'. If one tensor has all experts of "
                    "a rank, give the dim along which they lie"
                )
            if self.dim is not None and numbers:
                raise ConfigError(
                    f"Experts has the pattern {pattern!r} and dim={self.dim}, expected no {NUMBER}, or dim=None for a "
                    "list of experts with a number each"
                )

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of `names`."""
        assert isinstance(self.names, tuple)  # since __post_init__
        return self.names

    def declares(self, fqns: Sequence[str]) -> bool:
        """Whether a tensor of these names is declared.

        Raises:
            ConfigError: as `number_at`.
        """
        if self.dim is None:
            return any(self.number_at(fqn) is not None for fqn in fqns)
        return matches_any(fqns, self.patterns)

    def number_at(self, fqn: str) -> int | None:
        """The index, among the parts of a name, of the number of an expert; None if no pattern with a number matches.

        Raises:
            ConfigError: several parts may be the number.
        """
        parts = fqn.split(".")
        places = [
            at
            for at, part in enumerate(parts)
            if part.isdecimal() and matches_any([".".join([*parts[:at], NUMBER, *parts[at + 1 :]])], self.patterns)
        ]
        if len(places) > 1:
            raise ConfigError(
                f"{fqn} matches {list(self.patterns)} of experts= in several ways: {NUMBER} may stand for any of "
                f"{[parts[at] for at in places]}. Write out more of the name around {NUMBER}"
            )
        return places[0] if places else None

    def numbers(self, fqns: Iterable[str]) -> dict[str, set[int]]:
        """What stands before the number of an expert in the names -> the numbers."""
        numbers: dict[str, set[int]] = {}
        for fqn in fqns:
            at = None if self.dim is not None else self.number_at(fqn)
            if at is not None:
                parts = fqn.split(".")
                numbers.setdefault(".".join(parts[:at]), set()).add(int(parts[at]))
        return numbers


# The part of a pattern of `Experts` that stands for the number of an expert.
NUMBER = "{}"


# An option that changes the averaged values is recorded: the ranks compare it, the manifest has it, and a load warns of
# another value.
_RECORDED: Mapping[str, Any] = {"recorded": True}
_NOT_RECORDED: Mapping[str, Any] = {"recorded": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a `ShardedEMA`, all but the schedules and the teacher.

    Every option is declared here. `OptionArguments` and the keywords of `ShardedEMA` repeat the names, for type
    checkers and readers; a test compares the three.

    Attributes:
        interval: with n, calls number 0, n, 2n, ... of `update` average; the others only count.
        interval_correction: use 1 - (1 - m)^n in place of m, so that `interval` does not lengthen the average.
        update_buffers: average floating-point buffers too; otherwise the averaged side shows their live values.
        dtype: the dtype of the averaged values.
        device: the device of the averaged values; None for the device of the live tensor.
        include: glob patterns of names to average; empty for all.
        exclude: glob patterns of names not to average; wins over `include`.
        trainable_only: average only the parameters that require a gradient at construction; None until `resolved`.
        averaged_only: have files hold the averaged tensors alone; None until `resolved`.
        skip_nonfinite: leave out live values that are infinite or not a number.
        compensated: keep what rounding takes from an update, and add it to the next.
        overlap: run updates beside training.
        masters: average the fp32 masters of DeepSpeed's optimizer, not the live weights.
        experts: the plain tensors that each rank has of its own. The ranks compare names and dims. The manifest has
            whole tensors, and does not tell how they lay.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    interval: int = dataclasses.field(default=1, metadata=_RECORDED)
    interval_correction: bool = dataclasses.field(default=False, metadata=_RECORDED)
    update_buffers: bool = dataclasses.field(default=False, metadata=_RECORDED)
    dtype: torch.dtype = dataclasses.field(default=torch.float32, metadata=_RECORDED)
    device: torch.device | None = dataclasses.field(default=None, metadata=_NOT_RECORDED)
    include: tuple[str, ...] = dataclasses.field(default=(), metadata=_RECORDED)
    exclude: tuple[str, ...] = dataclasses.field(default=(), metadata=_RECORDED)
    trainable_only: bool | None = dataclasses.field(default=None, metadata=_RECORDED)
    averaged_only: bool | None = dataclasses.field(default=None, metadata=_RECORDED)
    skip_nonfinite: bool = dataclasses.field(default=False, metadata=_RECORDED)
    compensated: bool = dataclasses.field(default=False, metadata=_RECORDED)
    overlap: bool = dataclasses.field(default=False, metadata=_NOT_RECORDED)
    masters: bool = dataclasses.field(default=False, metadata=_RECORDED)
    experts: tuple[Experts, ...] = dataclasses.field(default=(), metadata=_NOT_RECORDED)

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", positive_integer("interval", self.interval))
        for field in dataclasses.fields(self):
            value, may_be_none = getattr(self, field.name), field.type == "bool | None"
            if field.type in ("bool", "bool | None") and not (
                isinstance(value, bool) or (may_be_none and value is None)
            ):
                raise ConfigError(f"{field.name} is {value!r}, expected True or False{', or None' * may_be_none}")
        if self.dtype not in _AVERAGED_DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}, expected one of {list(_AVERAGED_DTYPES)}")
        if self.compensated and self.dtype != torch.float32:
            raise ConfigError(f"compensated=True with dtype={self.dtype}, expected torch.float32")
        experts = tuple(self.experts) if isinstance(self.experts, Iterable) else (self.experts,)
        for declared in experts:
            if not isinstance(declared, Experts):
                raise ConfigError(f"experts has {declared!r}, expected a list of dist_ema.Experts(names, dim, group)")
        object.__setattr__(self, "experts", experts)

    def resolved(self, *, is_adapted: bool) -> Options:
        """The options with values where None leaves the choice to the model.

        Args:
            is_adapted: whether the model has adapters beside a frozen backbone.
        """
        return dataclasses.replace(
            self,
            trainable_only=is_adapted if self.trainable_only is None else self.trainable_only,
            averaged_only=is_adapted if self.averaged_only is None else self.averaged_only,
        )

    def averages(self, fqns: Sequence[str], *, is_buffer: bool, requires_grad: bool) -> bool:
        """Whether a tensor is to be averaged, if its dtype can be.

        Args:
            fqns: all of its names; several if it is tied.
            is_buffer: whether it is a buffer, of which `update_buffers` alone decides, and not `trainable_only`.
            requires_grad: whether it requires a gradient.
        """
        of_its_kind = self.update_buffers if is_buffer else requires_grad or not self.trainable_only
        included = not self.include or matches_any(fqns, self.include)
        return of_its_kind and included and not self.excludes(fqns)

    def excludes(self, fqns: Sequence[str]) -> bool:
        """Whether `exclude` names a tensor of these names."""
        return matches_any(fqns, self.exclude)

    def declares(self, fqn: str) -> bool:
        """Whether `experts` declares the tensor of this name, as the files have it."""
        return any(declared.declares([fqn]) for declared in self.experts)

    def check_patterns(self, fqns: Iterable[str]) -> None:
        """Refuse a pattern that matches none of the model's names: a typing error would go unnoticed.

        Raises:
            ConfigError: a pattern of `include`, `exclude` or `experts` matches nothing.
        """
        names = list(fqns)
        declared = [pattern for experts in self.experts for pattern in experts.patterns]
        for option, patterns in (("include", self.include), ("exclude", self.exclude), ("experts", declared)):
            for pattern in patterns:
                glob = pattern.replace(NUMBER, "*") if option == "experts" else pattern
                if not matches_any(names, [glob]):
                    raise ConfigError(
                        f"{option} has the pattern {pattern!r}, which matches none of the model's {len(names)} names "
                        f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                    )

    def arguments_text(self) -> str:
        """The options that are not the default, as arguments: "interval=2, overlap=True, "."""
        values = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        # Of an option that None leaves to the model, False is what most models have.
        return "".join(
            f"{name}={value!r}, "
            for name, (value, default) in values.items()
            if value != (False if default is None and isinstance(value, bool) else default)
        )

    def experts_json(self) -> list[dict[str, Any]]:
        """What the ranks compare of `experts`: all but the groups, of which each rank may have one of its own."""
        return [{"names": list(declared.patterns), "dim": declared.dim} for declared in self.experts]

    def to_json(self) -> dict[str, Any]:
        """The recorded options, for the manifest and the comparison of the ranks."""
        return {
            field.name: _json(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.metadata["recorded"]
        }


def check_names(caller: str, given: Iterable[str]) -> None:
    """Refuse options that `ShardedEMA` does not have, in the name of a function that passes its own on.

    Raises:
        ConfigError: it has the unknown names.
    """
    known = sorted(OptionArguments.__annotations__)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"{caller} was given {unknown}, expected options of ShardedEMA: {', '.join(known)}")


def _json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value


def matches_any(fqns: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether some name matches some glob pattern."""
    return any(fnmatch.fnmatchcase(fqn, pattern) for fqn in fqns for pattern in patterns)


def checked_device(device: object) -> torch.device | None:
    """`device` as a torch device; None stays None.

    Raises:
        ConfigError: torch does not know the device, or has none here.
    """
    if device is None:
        return None
    try:
        checked: torch.device = torch.device(device)  # type: ignore[call-overload]
        if checked.type == "meta":
            raise TypeError("it holds no values")
        torch.empty(0, device=checked)  # raises if the machine has no such device
        return checked
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(f"device is {device!r}, expected a torch device such as 'cpu' or None: {error}") from None


def floating_dtype(name: str, value: object) -> torch.dtype | None:
    """A floating-point torch dtype, or None.

    Raises:
        ConfigError: the value is of another type.
    """
    if value is None or (isinstance(value, torch.dtype) and value.is_floating_point):
        return value
    raise ConfigError(f"{name} is {value!r}, expected a floating-point torch dtype or None")


def with_floating(dtypes: Mapping[str, torch.dtype], floating: torch.dtype | None) -> dict[str, torch.dtype]:
    """Names and dtypes, every floating-point one replaced by `floating`; None replaces none."""
    return {name: floating if floating and own.is_floating_point else own for name, own in dtypes.items()}


def name_patterns(name: str, value: Patterns) -> tuple[str, ...]:
    """One glob pattern, several, or None, as a tuple of patterns.

    Raises:
        ConfigError: the value is of another type.
    """
    if value is None:
        return ()
    patterns = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigError(f"{name} is {value!r}, expected a glob pattern or a list of them, such as 'encoder.*'")
    return patterns


def checked_schedules(schedule: ScheduleLike | Mapping[str, ScheduleLike]) -> dict[str, Schedule]:
    """Track names and their schedules; a single schedule is the track "ema", and a function is a schedule.

    Raises:
        ConfigError: there is no schedule, one has no `momentum(step)` method, or a name cannot be a folder.
    """
    given = dict(schedule) if isinstance(schedule, Mapping) else {"ema": schedule}
    if not given:
        raise ConfigError("schedule is an empty dict, expected a schedule or {track_name: schedule}")
    tracks = {}
    for name, own in given.items():
        folder_name("track name", name)
        value = as_schedule(own)
        if not isinstance(value, Schedule) or isinstance(value, type):
            raise ConfigError(
                f"the schedule of track {name!r} is {value!r}, expected an object with momentum(step) -> float, "
                "such as CosineSchedule(total_steps=10_000) or ConstantSchedule(decay=0.999)"
            )
        tracks[name] = value
    return tracks
