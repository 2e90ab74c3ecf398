"""Hosts for connectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.unit.offloading.mini_host import MiniHost


@pytest.fixture
def make_host() -> Iterator[Callable[..., MiniHost]]:
    hosts: list[MiniHost] = []

    def make(extra: dict[str, Any] | None = None, **kwargs: Any) -> MiniHost:
        hosts.append(MiniHost(extra or {}, **kwargs))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()
