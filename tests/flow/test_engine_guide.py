"""docs/guides/engine.md tells the order in which a connector's hooks are called; here it is looked at."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "engine.md"


def test_hooks_of_a_step_come_in_the_guides_order(make_engine, tokens):
    engine = make_engine()
    engine.script.log.clear()
    engine.add(tokens(5), max_tokens=1)
    engine.step()
    told = re.findall(r"^\| (scheduler|worker) \| `(\w+)` \|", GUIDE.read_text(), re.MULTILINE)
    seen = engine.script.log
    layers = ("wait_for_layer_load", "save_kv_layer")
    per_layer = [hook for _, hook in seen if hook in layers]
    assert per_layer == [*layers, *layers]
    once = [entry for entry in seen if entry[1] not in layers]
    position = once.index(("worker", "start_load_kv"))
    assert [*once[:position], *(("worker", hook) for hook in layers), *once[position:]] == told
    assert len(list(groupby(side for side, _ in seen))) == 3, "scheduler, worker, scheduler"
