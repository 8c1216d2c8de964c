"""Checks of single values that users give: each returns the value in the type we keep, or raises."""

from __future__ import annotations

import math
import operator
import os
import re
from pathlib import Path

from dist_ema.errors import ConfigError

_FOLDER_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}")


def folder_name(name: str, value: object) -> str:
    """`value` as the name of one folder below another: letters, digits, '-' and '_'.

    Raises:
        ConfigError: it is something else, or could leave the folder.
    """
    return _matching(_FOLDER_NAME, name, value, "a folder name of letters, digits, '-' and '_'")


def file_name(name: str, value: object) -> str:
    """`value` as the name of one file in a folder.

    Raises:
        ConfigError: it is something else, or could leave the folder.
    """
    return _matching(_FILE_NAME, name, value, "the name of a file in the same folder")


def _matching(pattern: re.Pattern[str], name: str, value: object, expected: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ConfigError(f"{name} is {value!r}, expected {expected}")
    return value


def positive_integer(name: str, value: object) -> int:
    """`value` as an int of at least 1; bools and floats are refused.

    Raises:
        ConfigError: it is not such a number.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ConfigError(f"{name} is {value!r}, expected an integer of at least 1")
    return number


def real_number(name: str, value: object) -> float:
    """`value` as a finite float; bools and strings are refused.

    Raises:
        ConfigError: it is not such a number.
    """
    number = math.nan
    if not isinstance(value, bool | str | bytes):
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name} is {value!r}, expected a finite number")
    return number


def seconds_from_environment(name: str, default: float) -> float:
    """The environment variable `name` as seconds, at least 0.1; `default` where it is not set.

    Raises:
        ConfigError: it is no such number.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds < math.inf:
        raise ConfigError(f"{name} is {text!r}, expected a number of seconds, at least 0.1")
    return seconds


def absolute(path: object) -> Path:
    """A folder's path, absolute, links resolved, with `~` expanded.

    Raises:
        ConfigError: it is not a path.
    """
    try:
        if not os.fspath(path):  # type: ignore[call-overload]
            raise TypeError
        return Path(os.path.realpath(os.path.expanduser(os.fspath(path))))  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise ConfigError(f"path is {path!r}, expected the name of a folder") from None
    except FileNotFoundError:
        raise ConfigError(f"path is {path!r}, but the working folder was removed: give an absolute path") from None


def working_folder(path: object) -> str | None:
    """The working folder, from which a relative path is taken; None for a path that needs none."""
    try:
        return None if os.path.isabs(os.path.expanduser(os.fspath(path))) else os.getcwd()  # type: ignore[call-overload]
    except (TypeError, ValueError, OSError):
        return None
