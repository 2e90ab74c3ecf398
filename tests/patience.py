"""How long tests wait for what must come: far longer than a busy machine needs, for only a failing test waits so long.

A condition asks the process that it waits for, and so fails at once when that has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 300.0
"""Also for answers over HTTP and for processes that are to end."""


def wait_until(what: str, is_so: Callable[[], bool], wait_s: float = PATIENCE_S) -> None:
    """Look again and again, at most `wait_s`."""
    deadline_s = time.monotonic() + wait_s
    while not is_so():
        assert time.monotonic() < deadline_s, f"not within {wait_s:.0f} s: {what}"
        time.sleep(0.02)
