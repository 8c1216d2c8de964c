"""Building the averages of all ranks: each plans alone, then they see that they planned the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from torch import nn

from dist_ema.checkpoint import model_files
from dist_ema.exchange import Exchange
from dist_ema.integrations.transformers import config_files
from dist_ema.options import Options, checked_schedules
from dist_ema.schedules.base import Schedule
from dist_ema.state import AveragedState, dtype_name
from dist_ema.topology.planning import plan_model

__all__ = ["build_state"]


def build_state(
    exchange: Exchange,
    model: nn.Module,
    schedule: Schedule | Mapping[str, Schedule],
    options: Callable[[], Options],
) -> AveragedState:
    """Collective: every rank must call it. The averages of `model`, allocated.

    Args:
        exchange: the control traffic of all ranks.
        model: the prepared model.
        schedule: a schedule, or one for each track.
        options: makes the options, or raises.

    Raises:
        ConfigError: an option is out of range, or a pattern matches no name.
        UnsupportedModelError: the model cannot be averaged exactly as it is.
        RankMismatchError: the ranks do not agree about the model or the options.
    """

    def prepare() -> AveragedState:
        chosen, schedules = options(), checked_schedules(schedule)
        plan = plan_model(
            model,
            averages=chosen.averages,
            update_buffers=chosen.update_buffers,
            rank=exchange.rank,
            world_size=exchange.world_size,
        )
        chosen.check_patterns(plan.names)
        plan.check_not_empty()
        model_files(plan, {spec.fqn: spec.dtype for spec in plan.specs}, "5GB")  # all of it can be stored
        return AveragedState(plan, chosen, schedules, functools.partial(config_files, model))

    action = "building the average"
    state = exchange.agree(action, prepare)
    # The boxes of the ranks fit together only if all planned the same model with the same options.
    live_dtypes = {spec.fqn: dtype_name(spec.dtype) for spec in state.plan.specs}
    exchange.compare({**state.manifest(exchange.world_size).to_json(), "live_dtypes": live_dtypes})
    state.plan.check_covered(exchange.sum_integers(state.plan.owned_numels()))
    exchange.agree(action, state.allocate)
    return state
