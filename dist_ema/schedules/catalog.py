"""Every file of schedules has a line here, so an import of this module registers all schedules."""

from dist_ema.schedules.classic import *  # noqa: F403
from dist_ema.schedules.combinators import *  # noqa: F403
from dist_ema.schedules.merging import *  # noqa: F403
from dist_ema.schedules.profiles import *  # noqa: F403
