"""Hand-overs over the real NIXL library on both model runners. `make test-native`."""

from __future__ import annotations

import pytest
from tests.runner_matrix import Cell, run_p2p_cell

NAMES = {"NixlPullConnector": "pull", "NixlPushConnector": "push"}


def _cell(connector: str, runner: str, layout: str, block_size: int, kernel_block_size: int) -> Cell:
    return Cell(connector, NAMES[connector], runner, layout, block_size, kernel_block_size)


@pytest.mark.parametrize("kernel_block_size", [16, 32, 128])
@pytest.mark.parametrize("connector", NAMES)
def test_vllm_42846_nixl_block_size_128_on_v2(connector: str, kernel_block_size: int) -> None:
    """Tensors that are registered have more rows than there are blocks: 128 / `kernel_block_size` to a block."""
    cell = _cell(connector, "V2", "LBHNC", 128, kernel_block_size)
    run_p2p_cell(cell, connector=connector, transport="nixl")


@pytest.mark.parametrize(
    ("runner", "layout", "block_size", "kernel_block_size"),
    [("V1", "BLNHC", 16, 16), ("V1", "LBHNC", 128, 128), ("V2", "BLNHC", 16, 16), ("V2", "BLHNC", 128, 32)],
)
@pytest.mark.parametrize("connector", NAMES)
def test_what_was_handed_over_is_taken(
    connector: str, runner: str, layout: str, block_size: int, kernel_block_size: int
) -> None:
    cell = _cell(connector, runner, layout, block_size, kernel_block_size)
    run_p2p_cell(cell, connector=connector, transport="nixl")
