"""Each connector x {V1, V2} x {sync, async} x {layouts, blocks of 16 and 128, kernel blocks}: the right tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.runner_matrix import ABSENT, LOADS, Cell, cells, run_cache_cell, run_p2p_cell

from kvferry.contract.resolver import BUILT_INS

CACHES = [name for name in LOADS if name != "P2PConnector"]


@pytest.mark.parametrize("cell", [cell for name in CACHES for cell in cells(name)], ids=str)
def test_what_was_stored_is_loaded(cell: Cell, tmp_path: Path) -> None:
    run_cache_cell(cell, tmp_path)


@pytest.mark.parametrize("cell", cells("P2PConnector"), ids=str)
def test_what_was_handed_over_is_taken(cell: Cell) -> None:
    run_p2p_cell(cell)


def test_no_built_in_connector_is_left_out() -> None:
    tried = set(LOADS) | {name for name, _ in ABSENT}
    assert tried == {target.name for target in BUILT_INS}
    for name, loads in LOADS.items():
        wanted = {"pull", "push"} if "pull" in loads else {"sync", "async"}
        assert wanted - set(loads) == {load for absent, load in ABSENT if absent == name and load in wanted}
