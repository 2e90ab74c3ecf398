"""Engines that hand KV over through shared memory are killed and stopped; see `p2p_kill`."""

from __future__ import annotations

from p2p_kill import KillCases


class TestShm(KillCases):
    transport = "shm"
