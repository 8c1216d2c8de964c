"""Every file of schedules: one line for each, so that importing this one registers all of them."""

from dist_ema.schedules.classic import *  # noqa: F403
from dist_ema.schedules.combinators import *  # noqa: F403
from dist_ema.schedules.profiles import *  # noqa: F403
