"""Packages of others, as an installer leaves them."""

from __future__ import annotations

import importlib
from pathlib import Path


def install(
    folder: Path, package: str, points: dict[str, str], version: str = "2.5", group: str = "kvferry.connectors"
) -> None:
    """Make a package's dist-info folder, with entry points of one group."""
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "top_level.txt").write_text(f"{package}\n")
    lines = [f"{name} = {value}\n" for name, value in points.items()]
    (info / "entry_points.txt").write_text("".join([f"[{group}]\n", *lines]))
    importlib.invalidate_caches()
