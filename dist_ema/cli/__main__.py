"""`python -m dist_ema.cli`."""

import sys

from dist_ema.cli.arguments import main

sys.exit(main())
