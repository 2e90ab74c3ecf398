"""`kvferry connectors` in a process of its own, with installed packages that are good and broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvferry

GOOD = '''
from kvferry.contract import KVConnectorBase_V1, KVConnectorMetadata

print("noise while importing")

class Good(KVConnectorBase_V1):
    """Moves [bold]nothing[/bold]."""
    supports_v2_model_runner = True
    def start_load_kv(self, forward_context, **kwargs): pass
    def wait_for_layer_load(self, layer_name): pass
    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs): pass
    def wait_for_save(self): pass
    def get_num_new_matched_tokens(self, request, num_computed_tokens): return 0, False
    def update_state_after_alloc(self, request, blocks, num_external_tokens): pass
    def build_connector_meta(self, scheduler_output): return KVConnectorMetadata()
'''


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    (tmp_path / "their_good.py").write_text(GOOD)
    (tmp_path / "their_broken.py").write_text("import a_package_nobody_has")
    info = tmp_path / "theirs-4.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 4.2\n")
    (info / "entry_points.txt").write_text(
        "[kvferry.connectors]\nGood = their_good:Good\nBad = their_broken:Bad\n"
        "[kvferry.tiers]\nram = kvferry.testing.tiers:MemoryTier\nrom = their_broken:Rom\n"
        "[kvferry.transports]\nshm = their_broken:Shm\n"
    )
    return tmp_path


def run(packages: Path, *options: str) -> str:
    path = os.pathsep.join([str(packages), str(Path(kvferry.__file__).parent.parent)])
    code = "import sys; from kvferry.cli.main import main; sys.argv[0] = 'kvferry'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "connectors", *options],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "160"},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout


def test_json_lists_good_and_broken_ones(packages: Path) -> None:
    rows: dict[str, Any] = {row["name"]: row for row in json.loads(run(packages, "--json"))}
    built_in = rows["OffloadingConnector"]
    assert (built_in["origin"], built_in["version"]) == ("built-in", kvferry.__version__)
    assert built_in["available"]
    assert built_in["capabilities"]["supports_hma"] is True
    tiers = {tier["name"]: tier for tier in built_in["tiers"]}
    assert tiers["fs"] == {"name": "fs", "origin": "built-in", "problem": None}
    assert tiers["ram"]["origin"] == "entry point kvferry.testing.tiers:MemoryTier of package theirs"
    assert "a_package_nobody_has" in tiers["rom"]["problem"]
    assert [row["name"] for row in rows["P2PConnector"]["transports"]] == ["shm", "nixl", "shm"]
    assert rows["Good"] == {
        "name": "Good",
        "origin": "entry point",
        "available": True,
        "description": "Moves [bold]nothing[/bold].",
        "module": "their_good",
        "class": "Good",
        "version": "4.2",
        "file": str(packages / "their_good.py"),
        "capabilities": {"supports_hma": False, "supports_v2_model_runner": True, "connector_api": [1, 0]},
    }
    bad = rows["Bad"]
    assert (bad["origin"], bad["available"], bad["version"]) == ("entry point", False, "4.2")
    assert "install the package that has 'a_package_nobody_has'" in bad["problem"]
    assert "capabilities" not in bad


def test_list_says_what_is_wrong_and_what_to_do(packages: Path) -> None:
    lines = [line.strip() for line in run(packages).splitlines()]
    good = lines.index("Good  (entry point 4.2)")
    assert lines[good + 1 : good + 3] == [
        "Moves [bold]nothing[/bold].",
        "hybrid KV caches: no; second model runner: yes",
    ]
    tiers = next(line for line in lines if line.startswith("tiers: fs, ram (entry point "))
    assert "of package theirs), rom (unavailable: " in " ".join(lines[lines.index(tiers) :][:2])
    bad = lines.index("Bad  (entry point 4.2)")
    assert lines[bad + 1].startswith("unavailable: ")
    assert "install the package that has 'a_package_nobody_has'" in " ".join(lines[bad + 1 : bad + 4])
