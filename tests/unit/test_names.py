"""One name, one class: in all of src no two classes share a name, inner ones included."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

SRC = Path(__file__).parents[2] / "src" / "kvferry"


def test_no_two_classes_share_a_name() -> None:
    homes = defaultdict(list)
    for file in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(str(file.relative_to(SRC)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
