"""docs/guides/hybrid.md: its program prints what stands below it, and its figures are those of the engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvferry.types import AttentionKind, GroupInfo

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "hybrid.md").read_text()


def test_the_program_prints_the_tables_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    ((program, printed),) = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    exec(compile(program, "hybrid.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_the_tail_in_the_drawing_is_the_one_that_is_loaded() -> None:
    window = GroupInfo(0, ("layer",), 16, AttentionKind.SLIDING_WINDOW, 40)
    assert "blocks 17 to 19" in GUIDE
    assert window.first_needed_block(320) == 17 == 20 - -(-(40 - 1) // 16)
    assert "begin in block 10" in GUIDE
    assert window.first_needed_block(200) == 10
