"""Room on the file system a folder is on, or would be on."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

from kvferry.errors import ConfigError


class Space(NamedTuple):
    """Of the file system, in bytes; `is_writable`: this process may make files there."""

    free_bytes: int
    total_bytes: int
    is_writable: bool


def folder_of(text: str, setting: str) -> Path:
    """The folder that a setting names, "~" meaning a home. ConfigError, naming `setting`, for one of nobody's."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{setting}={text!r}: {error} Give the path in full") from error


def unwritable(folder: Path, setting: str) -> list[str]:
    """The problem, naming `setting`, when this process cannot make files in the folder, or cannot make the folder."""
    if space_at(folder).is_writable:
        return []
    return [f"{setting}={str(folder)!r} is no writable folder: give one, or correct its permissions"]


def space_at(folder: Path) -> Space:
    """The space at `folder`, or at the nearest of its parents that exists. Makes nothing.

    A path that no file system takes, for it is too long, is not writable.
    """
    path, is_path = folder.absolute(), True
    while not os.path.exists(path):  # false too where the name is too long
        is_path = is_path and _may_be(path)
        path = path.parent
    status = os.statvfs(path)
    is_writable = is_path and path.is_dir() and os.access(path, os.W_OK | os.X_OK)
    return Space(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize, is_writable)


def _may_be(path: Path) -> bool:
    """Whether a file system takes the name, whatever is there."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def device_at(folder: Path) -> int:
    """Number of the file system that the folder is on, or would be on."""
    path = folder.absolute()
    while not os.path.exists(path):
        path = path.parent
    return os.stat(path).st_dev
