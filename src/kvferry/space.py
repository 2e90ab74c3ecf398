"""Room on the file system a folder is on, or would be on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Space(NamedTuple):
    """Of the file system, in bytes; `is_writable`: this process may make files there."""

    free_bytes: int
    total_bytes: int
    is_writable: bool


def unwritable(folder: Path, setting: str) -> list[str]:
    """The problem, naming `setting`, when this process cannot make files in the folder, or cannot make the folder."""
    if space_at(folder).is_writable:
        return []
    return [f"{setting}={str(folder)!r} is no writable folder: give one, or correct its permissions"]


def space_at(folder: Path) -> Space:
    """The space at `folder`, or at the nearest of its parents that exists. Makes nothing."""
    path = folder.expanduser().absolute()
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    is_writable = path.is_dir() and os.access(path, os.W_OK | os.X_OK)
    return Space(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize, is_writable)
