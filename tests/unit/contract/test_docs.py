"""docs/contract.md against the hook table."""

from __future__ import annotations

import re
from pathlib import Path

from kvferry.contract.hooks import HOOKS

PAGE = Path(__file__).parents[3] / "docs" / "contract.md"
ROW = re.compile(r"^\| `(\w+)`( \*\*own\*\*)? \| (\w+) \| (.+) \| (.+) \|$", re.MULTILINE)


def test_every_hook_has_one_row_that_names_its_side_and_says_what_happens() -> None:
    rows = {match[1]: match for match in ROW.finditer(PAGE.read_text())}
    assert {name: (row[3], row[2] is not None) for name, row in rows.items()} == {
        hook.name: (hook.side.value, hook.is_own) for hook in HOOKS
    }
    assert len(ROW.findall(PAGE.read_text())) == len(HOOKS), "a hook stands there twice"
