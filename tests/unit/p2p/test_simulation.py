"""Thousands of random schedules, and the defects of the field, each of which the same schedules catch.

KVFERRY_SIM_SEEDS=100000 runs that many schedules, KVFERRY_SIM_FIRST_SEED starts elsewhere.
"""

from __future__ import annotations

import os

import pytest
from mutants import MUTANTS
from simulation import Faults, World

NUM_SEEDS = int(os.environ.get("KVFERRY_SIM_SEEDS", "3200"))
FIRST_SEED = int(os.environ.get("KVFERRY_SIM_FIRST_SEED", "0"))
PARTS = 8

# Worlds in which a rare defect shows soon; the others are found in any.
HARD_WORLDS = {
    "2 no confirmation": Faults(slow=0.6, freeze=0.6, loss=0.6, glitch=0.3),
    "2 neither": Faults(slow=0.6),
    "5 no deadline": Faults(hang=0.6, slow=0.6),
    "7 restart not seen": Faults(crash=0.5, slow=0.1),
}


@pytest.mark.timeout(0 if "KVFERRY_SIM_SEEDS" in os.environ else 900)
@pytest.mark.parametrize("part", range(PARTS))
def test_no_schedule_breaks_a_rule(part: int) -> None:
    num_loads = num_ok = 0
    for seed in range(FIRST_SEED + part, FIRST_SEED + NUM_SEEDS, PARTS):
        world = World(seed)
        broken = world.run()
        assert not broken, f"seed {seed}, {world.faults}: {broken[0]}"
        num_loads, num_ok = num_loads + world.num_loads, num_ok + world.num_ok
    print(
        f"seeds {FIRST_SEED + part}..{FIRST_SEED + NUM_SEEDS - 1} by {PARTS}: {num_ok} of {num_loads} loads succeeded"
    )
    assert num_ok > num_loads / 4, "the worlds are so bad that little is tested"


@pytest.mark.parametrize("defect", MUTANTS)
def test_a_defect_of_the_field_is_caught(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[defect](monkeypatch)
    for seed in range(2000):
        if broken := World(seed, HARD_WORLDS.get(defect)).run():
            print(f"{defect}: seed {seed}: {broken[0]}")
            return
    pytest.fail(f"2000 schedules did not show the defect {defect!r}")


@pytest.mark.parametrize("defect", ["1 cancel as a fence", "2 neither", "7 restart not seen", "8 no token check"])
def test_some_defects_lead_to_wrong_bytes(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the other rules off, what users would see is found as well: KV of somebody else, accepted."""

    def rule(self: World, holds: bool, text: str) -> None:
        if not holds and "WRONG BYTES" in text:
            self.broken.append(text)

    MUTANTS[defect](monkeypatch)
    monkeypatch.setattr(World, "rule", rule)
    faults = Faults(slow=0.5, hang=0.2, abort=0.6) if defect.startswith("1") else HARD_WORLDS.get(defect)
    assert any(World(seed, faults).run() for seed in range(1000)), "1000 schedules showed no wrong byte"
