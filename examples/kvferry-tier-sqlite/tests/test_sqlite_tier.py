"""The tier passes kvferry's checks; what only this tier does is below them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from kvferry_tier_sqlite import SqliteTier, Work

from kvferry.errors import ConfigError
from kvferry.offloading.store.tier import Tier
from kvferry.testing.tier_checks import NAMESPACE, TierChecks
from kvferry.types import Namespace, StoreKey


class GatedTier(SqliteTier):
    """Its thread waits at a gate."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.gate = threading.Event()
        self.gate.set()
        super().__init__(*arguments, **settings)

    def _do(self, work: Work) -> None:
        self.gate.wait(60)
        super()._do(work)


class TestSqlite(TierChecks):
    tier_class = SqliteTier

    def make(self, namespace: Namespace = NAMESPACE, max_bytes: int | None = None) -> GatedTier:
        return GatedTier(self.folder / "kv.sqlite", namespace, max_bytes=max_bytes)

    def config(self) -> Mapping[str, Any]:
        return {"path": str(self.folder / "configured" / "kv.sqlite"), "max_bytes": "1MB"}

    def quota(self, num_chunks: int) -> int:
        return num_chunks * self.payload_bytes

    def hold(self, tier: Tier) -> Callable[[], None]:
        assert isinstance(tier, GatedTier)
        tier.gate.clear()
        return tier.gate.set

    def damage(self, tier: Tier, key: StoreKey) -> None:
        assert isinstance(tier, GatedTier)
        ((payload,),) = tier._db.execute("SELECT payload FROM chunks WHERE key = ?", (bytes(key),)).fetchall()
        with tier._db:
            wrong = bytes([payload[0] ^ 1]) + payload[1:]
            tier._db.execute("UPDATE chunks SET payload = ? WHERE key = ?", (wrong, bytes(key)))

    def refuse_writes(self, tier: Tier) -> None:
        assert isinstance(tier, GatedTier)
        tier._db.execute("PRAGMA query_only = ON")


def test_the_file_is_private_and_of_one_process(tmp_path: Path) -> None:
    path = tmp_path / "kv.sqlite"
    tier = SqliteTier(path, NAMESPACE)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
    with pytest.raises(ConfigError, match="does another process use it"):
        SqliteTier(path, NAMESPACE)
    tier.close()
    SqliteTier(path, NAMESPACE).close()


def test_another_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Dear Sir or Madam, " * 100)
    with pytest.raises(ConfigError, match="not a database"):
        SqliteTier(path, NAMESPACE)
    assert path.read_text().startswith("Dear")
