"""docs/structure.md against the folders: its tables name what is there, and all of it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "kvferry"
PAGE = (ROOT / "docs" / "structure.md").read_text()
FOLDERS, PLACES = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
PLACE = re.compile(r"`([\w/]+\.py)`(?::((?: `[\w.]+`,?)+))?")


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def names_in(file: Path) -> set[str]:
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_the_table_of_folders_names_every_folder_and_file_once() -> None:
    named = [name for where, *_ in rows(FOLDERS) for name in re.findall(r"`([\w./]+)`", where)]
    there = {f"{path.name}/" for path in SRC.iterdir() if (path / "__init__.py").is_file()}
    there |= {path.name for path in SRC.glob("*.py") if not path.name.startswith("__")}
    assert sorted(named) == sorted(there)


def test_modules_named_in_the_table_of_folders_are_there() -> None:
    for where, what, _ in rows(FOLDERS):
        for folder in re.findall(r"`(\w+)/`", where):
            below = [path for path in (SRC / folder).rglob("*.py") if "__pycache__" not in path.parts]
            names = {path.stem for path in below} | {f"{path.parent.name}/" for path in below}
            named = set(re.findall(r"`(\w+/?)`", what))
            assert named <= names | {"kvferry"}, f"{folder}: {named - names}"


@pytest.mark.parametrize("row", rows(PLACES), ids=lambda row: row[0])
def test_places_are_where_the_page_says(row: list[str]) -> None:
    places = PLACE.findall(row[1])
    assert places, "no file is named"
    for path, names in places:
        assert (SRC / path).is_file(), path
        missing = set(re.findall(r"`([\w.]+)`", names)) - names_in(SRC / path)
        assert not missing, f"{path}: {missing}"
