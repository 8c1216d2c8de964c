"""The command line, `dist-ema`."""

from dist_ema.cli.arguments import main

__all__ = ["main"]
