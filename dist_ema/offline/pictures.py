"""How a picture looks, and how it becomes a file. No communication.

A picture is a small file. The same data give the same bytes.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from dist_ema.errors import ConfigError

__all__ = ["check_free", "dress", "new_figure", "save_figure"]


def check_free(path: Path, replace: bool) -> None:
    """Refuse a path at which there is something.

    Raises:
        ConfigError: there is a folder, or a file that is not to be replaced; or no folder to write it into.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, expected the name of a picture, such as {path / 'schedule.png'}")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no folder, so {path} cannot be written: make it first (--out)")
    if os.path.lexists(path) and not replace:
        raise ConfigError(f"{path} exists, and is not replaced unasked: give another name (--out), or --force")


def new_figure() -> Any:
    """An empty figure of matplotlib.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # an optional dependency
    except ImportError:
        raise ConfigError("plotting needs matplotlib, which is not installed: pip install 'dist-ema[plot]'") from None
    return Figure(figsize=(7.5, 5.5), layout="constrained")


def dress(axes: Any) -> None:
    """Give axes a faint grid, and no frame above and at the right."""
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, path: Path, *, replace: bool) -> None:
    """Write a figure, PNG or SVG by the name of `path`.

    Args:
        figure: of `new_figure`.
        path: of the picture.
        replace: whether a file that is there is replaced.

    Raises:
        ConfigError: the path is taken, or matplotlib does not know the picture's format.
    """
    from matplotlib import rc_context  # there is a figure, so there is matplotlib

    check_free(path, replace)
    # An SVG would otherwise hold the date, names drawn by chance, and its text as outlines.
    options: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix.lower() == ".svg" else {}
    drawn = io.BytesIO()  # by its name matplotlib would write a file of another one, with an ending
    try:
        with rc_context({"svg.hashsalt": "dist-ema", "svg.fonttype": "none"}):
            figure.savefig(drawn, dpi=150, format=path.suffix[1:].lower() or "png", **options)
    except ValueError as error:
        raise ConfigError(f"the picture {path} cannot be written: {error}") from None
    with open(path, "wb" if replace else "xb") as file:
        file.write(drawn.getbuffer())
