from __future__ import annotations

from pathlib import Path

import pytest
from tests.packages import install

from kvferry.errors import ConfigError
from kvferry.offloading.store.registry import create_tier, tier_room
from kvferry.testing.tiers import BlockingTier


def test_fs_with_all_settings(tmp_path: Path, kit) -> None:
    tier = create_tier(
        {
            "type": "fs",
            "path": str(tmp_path / "kv"),
            "max_bytes": 1 << 20,
            "num_threads": 1,
            "fsync": True,
            "name": "d",
        },
        kit.namespace,
    )
    assert tier.name == "d"
    assert kit.store(tier, 1).ok
    assert kit.load(tier, 1)[1] == kit.payload(kit.key(1))
    assert tier.stats().max_bytes == 1 << 20
    tier.close()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["secondary_tiers[3].type", "missing", "fs"]),
        ("fs", ["secondary_tiers[3]", "object"]),
        ({"type": "fss"}, ["secondary_tiers[3].type", "'fss'", "'fs'"]),
        ({"type": "fs"}, ["secondary_tiers[3].path", "missing"]),
        ({"type": "fs", "root_dir": "x"}, ["secondary_tiers[3].root_dir='x'", "vLLM", "write path"]),
        ({"type": "fs", "path": "x", "n_read_threads": 4}, ["n_read_threads=4", "write num_threads"]),
        ({"type": "fs", "path": "x", "n_write_threads": 4}, ["n_write_threads=4", "write num_threads"]),
        ({"type": "fs", "path": "x", "enable_kv_events": True}, ["enable_kv_events=True", "leave the key out"]),
        ({"type": "fs", "path": "x", "locality": "LOCAL"}, ["locality='LOCAL'", "leave the key out"]),
        ({"type": "MyTier", "module_path": "my"}, ["module_path='my'", "write tier_module_path"]),
        ({"type": "fs", "path": ""}, ["secondary_tiers[3].path", "empty"]),
        ({"type": "fs", "path": "x", "max_byte": 1}, ["secondary_tiers[3].max_byte", "'max_bytes'"]),
        ({"type": "fs", "path": "x", "max_bytes": "1 pound"}, ["secondary_tiers[3].max_bytes", "'1 pound'"]),
        ({"type": "fs", "path": "x", "max_bytes": True}, ["secondary_tiers[3].max_bytes", "True"]),
        ({"type": "fs", "path": "x", "fsync": 1}, ["secondary_tiers[3].fsync", "bool"]),
        ({"type": "fs", "path": "/proc/kvferry"}, ["secondary_tiers[3]", "/proc/kvferry", "writable"]),
        ({"type": "fs", "path": "/etc/hostname"}, ["secondary_tiers[3]", "/etc/hostname", "writable"]),
        ({"type": "fs", "path": "x", "max_bytes": 100}, ["secondary_tiers[3]", "max_bytes 100", "one chunk"]),
        ({"type": "fs", "path": "x", "num_threads": 0}, ["secondary_tiers[3]", "num_threads"]),
        ({"type": "X", "tier_module_path": "no.such"}, ["secondary_tiers[3]", "no.such"]),
        ({"type": "X", "tier_module_path": ""}, ["secondary_tiers[3].tier_module_path"]),
        (
            {"type": "BlockingTir", "tier_module_path": "kvferry.testing.tiers"},
            ["secondary_tiers[3].type", "'BlockingTier'"],
        ),
        ({"type": "BlockingTier", "tier_module_path": "kvferry.testing.tiers", "x": 1}, ["secondary_tiers[3]", "'x'"]),
    ],
)
def test_mistakes_are_named_with_their_path(config, words: list[str], kit, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        create_tier(config, kit.namespace, where="secondary_tiers[3]")
    for word in words:
        assert word in str(caught.value)


def test_a_module_path_wins_over_a_built_in_name(kit, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_tiers.py").write_text(
        "from kvferry.testing.tiers import MemoryTier\nclass fs(MemoryTier):\n    pass\n", "utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    tier = create_tier({"type": "fs", "tier_module_path": "my_tiers", "name": "mine"}, kit.namespace)
    assert type(tier).__name__ == "fs"
    assert tier.name == "mine"


def test_shipped_test_tiers_by_name(kit) -> None:
    config = {"type": "BlockingTier", "tier_module_path": "kvferry.testing.tiers", "block_s": 5.0}
    assert isinstance(create_tier(config, kit.namespace), BlockingTier)


def test_a_tier_of_an_installed_package(kit, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    points = {"ram": "kvferry.testing.tiers:MemoryTier", "fs": "kvferry.testing.tiers:MemoryTier"}
    install(tmp_path, "theirs", points, group="kvferry.tiers")
    tier = create_tier({"type": "ram", "name": "mine"}, kit.namespace)
    assert (type(tier).__name__, tier.name) == ("MemoryTier", "mine")
    with pytest.raises(ConfigError, match="root_dir"):  # the tier's own error, not what vLLM calls a setting of `fs`
        create_tier({"type": "ram", "root_dir": "x"}, kit.namespace)
    assert create_tier({"type": "fs", "path": str(tmp_path / "kv")}, kit.namespace).close() is None
    with pytest.raises(ConfigError, match=r"secondary_tiers\[0\].type='rom' is unknown .*known: fs, ram"):
        create_tier({"type": "rom"}, kit.namespace)


def test_a_tier_need_not_tell_its_room(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    install(tmp_path, "theirs", {"ram": "kvferry.testing.tiers:MemoryTier"}, group="kvferry.tiers")
    room = tier_room({"type": "ram"}, 100, where="x")
    assert (room.name, room.num_chunks, room.problem) == ("ram", None, None)
