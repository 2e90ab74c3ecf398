"""Engines that hand KV over through NIXL are killed and stopped; see `tests/e2e/p2p_kill.py`."""

from __future__ import annotations

from p2p_kill import KillCases


class TestNixl(KillCases):
    transport = "nixl"
