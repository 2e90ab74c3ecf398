"""Real LMCache servers. The tests fail, not skip, when there is none: `make test-lmcache` makes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.lmcache_server import LMCacheServer

StartServer = Callable[..., LMCacheServer]


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Start servers; what is left of them is killed when the test ends."""
    servers: list[LMCacheServer] = []

    def start(*options: str) -> LMCacheServer:
        servers.append(LMCacheServer(tmp_path / f"server{len(servers)}.log", *options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LMCacheServer]:
    """One for all tests of a module that leave it alive; its chunks have 64 tokens."""
    started = LMCacheServer(tmp_path_factory.mktemp("lmcache") / "server.log", "--chunk-size", "64")
    yield started
    started.kill()


@pytest.fixture
def transfer(server: LMCacheServer, request: pytest.FixtureRequest) -> dict[str, Any]:
    """A kv_transfer_config for it, whose keys no other test shares."""
    return transfer_to(server.port, request.node.name)


def transfer_to(port: int, version: str, **extra: Any) -> dict[str, Any]:
    """A kv_transfer_config for the server at a port."""
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "lmcache.mp.host": "127.0.0.1",
            "lmcache.mp.port": port,
            "weights_version": version,
            "staging_bytes": 1 << 20,
            "lookup_timeout_s": 30.0,
            **extra,
        },
    }
