"""Checks of single values that users give: a check returns the value in the type that this package uses, or raises."""

from __future__ import annotations

import math
import operator
import os
import re
import socket
from pathlib import Path
from typing import Any

from dist_ema.errors import ConfigError

PathLike = str | os.PathLike[str]
"""A path of the local file system; a URL is refused."""

# "s3://bucket/x", the form of pathlib ("s3:/bucket/x"), and the chains of fsspec ("simplecache::s3://bucket/x"). A
# scheme has two characters or more, so that "C:/x" stays a local name, as "a:b/c" and "./s3:x" do.
_URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+)(::[A-Za-z0-9+.-]+)*:/")
_LONGEST_TARGET_NAME_BYTES = 200
_FOLDER_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}")


def folder_name(name: str, value: object) -> str:
    """`value` as the name of one folder below another: letters, digits, '-' and '_'.

    Raises:
        ConfigError: the value is something else, or could leave the folder.
    """
    return _matching(_FOLDER_NAME, name, value, "a folder name of letters, digits, '-' and '_'")


def json_object(value: object) -> dict[str, Any]:
    """A JSON object of any content.

    Raises:
        ValueError: the value is none.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


def file_name(name: str, value: object) -> str:
    """`value` as the name of one file in a folder.

    Raises:
        ConfigError: the value is something else, or could leave the folder.
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
    return _integer(name, value, least=1, bits=63)


def update_number(name: str, value: object) -> int:
    """`value` as the number of an update, which counts from 0; bools and floats are refused.

    Raises:
        ConfigError: it is not such a number.
    """
    return _integer(name, value, least=0, bits=62)


def _integer(name: str, value: object, *, least: int, bits: int) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or not least <= number < 2**bits:
        raise ConfigError(f"{name} is {shown(value)}, expected an integer of at least {least} (and below 2^{bits})")
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
        raise ConfigError(f"{name} is {shown(value)}, expected a finite number")
    return number


def seconds_from_environment(name: str, default: float) -> float:
    """The environment variable `name` as seconds, at least 0.1; `default` where it is not set.

    Raises:
        ConfigError: the variable is not such a number.
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


def shown(value: object) -> str:
    """The repr of a value for a message: short, also of a number with thousands of digits."""
    try:
        return repr(value)[:200]
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"a {type(value).__name__} too large to print"


def local(path: object) -> Path:
    """A path as the user gave it, of this machine's file systems and no URL.

    Raises:
        ConfigError: it is a URL, or not a path.
    """
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
        if not text or not isinstance(text, str):
            raise TypeError
        os.fsencode(text)
    except (TypeError, ValueError):
        raise ConfigError(f"path is {shown(path)}, expected the name of a folder") from None
    # The paths of some libraries are a URL as text, and a cached copy by os.fspath.
    for form in (text, text if isinstance(path, str) else str(path)):
        match = _URL.match(form)
        if match is not None:
            raise ConfigError(_url_refusal(form, match[1]))
    return Path(text)


def _url_refusal(text: str, scheme: str) -> str:
    if scheme.lower() == "file":
        return f"path is {text!r}, which is a URL: give the path alone, without 'file://'"
    if scheme.lower() == "hf":
        repository = "/".join([part for part in text.partition(":")[2].split("/") if part][:2])
        upload = f"huggingface_hub.upload_folder(folder_path=folder, repo_id={repository!r})"
    else:
        upload = "fsspec's filesystem(scheme).put(folder, url, recursive=True), or the store's own client"
    return (
        f"path is {text!r}, which is a URL, expected a folder that the operating system sees. There are two ways: a "
        f"local or shared folder, and then {upload} (download before a load); or ema.stateful() in "
        "torch.distributed.checkpoint, whose fsspec writer writes to the URL itself (docs/integrations/torch.md has "
        "the snippet). A local folder of that name can be given by its absolute path"
    )


def absolute(path: object) -> Path:
    """A folder's path, absolute, links resolved, with `~` expanded.

    Raises:
        ConfigError: it is a URL, or not a path.
    """
    given = local(path)
    try:
        return Path(os.path.realpath(os.path.expanduser(given)))
    except (TypeError, ValueError):
        raise ConfigError(f"path is {shown(path)}, expected the name of a folder") from None
    except FileNotFoundError:
        raise ConfigError(f"path is {shown(path)}, but the working folder was removed: give an absolute path") from None


def target_folder(path: object) -> Path:
    """As `absolute`, of a folder to write. Its staging folder has a longer name, which must be a valid one too.

    Raises:
        ConfigError: it is a URL, not a path, or its name is too long.
    """
    target = absolute(path)
    length = len(os.fsencode(target.name))
    if length > _LONGEST_TARGET_NAME_BYTES:
        raise ConfigError(
            f"path ends in the name {target.name[:40]!r}..., which has {length} bytes, expected at most "
            f"{_LONGEST_TARGET_NAME_BYTES}: the folder is staged under a longer name, and file systems take 255 bytes"
        )
    return target


def working_folder(path: object) -> str | None:
    """The working folder, to which a relative path belongs, as `node:folder`; None for an absolute path, or no path."""
    try:
        if os.path.isabs(os.path.expanduser(os.fspath(path))):  # type: ignore[call-overload]
            return None
        return f"{socket.gethostname()}:{os.getcwd()}"
    except Exception:  # the `__fspath__` of another library may raise anything; `absolute` refuses it, for all ranks
        return None
