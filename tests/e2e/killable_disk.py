"""A disk tier that ends its process at a chosen step; named by `tier_module_path` in the kill test's engine."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvferry.clock import Clock
from kvferry.offloading.tiers.disk import DiskTier
from kvferry.types import Namespace


class KillableDisk:
    """Settings: `path`, `step` (a fault point of the disk tier, or "never") and `count` (at which passing to die)."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], namespace: Namespace, clock: Clock, where: str) -> DiskTier:
        passings = 0

        def on_step(name: str) -> None:
            nonlocal passings
            if name != config["step"]:
                return
            passings += 1
            if passings == config["count"]:
                os.kill(os.getpid(), signal.SIGKILL)

        return DiskTier(Path(config["path"]), namespace, clock=clock, on_step=on_step)
