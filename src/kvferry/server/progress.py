"""What the server did lately, as a line of its log. Runs on the engine's thread."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from kvferry.clock import Clock
from kvferry.contract import ConnectorStats
from kvferry.engine.outputs import RequestOutput, SchedulerStats

logger = logging.getLogger(__name__)


class ProgressLog:
    """One line each `interval_s` seconds in which tokens came; 0: none."""

    def __init__(self, interval_s: float, clock: Clock) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        self._begun_s = self._clock.now()
        self._num_prompt = self._num_here = self._num_external = self._num_generated = 0

    def prompt_done(self, output: RequestOutput) -> None:
        """A request has its first token."""
        self._num_prompt += len(output.prompt_token_ids)
        self._num_here += output.num_cached_tokens - output.num_external_tokens
        self._num_external += output.num_external_tokens

    def generated(self, num_tokens: int) -> None:
        """So many tokens came."""
        self._num_generated += num_tokens

    def step_done(self, stats: SchedulerStats, connector: ConnectorStats | None) -> None:
        """Write the line when it is time for it. What happens after a quiet time begins a new interval."""
        seconds = self._clock.now() - self._begun_s
        if not self._interval_s or seconds < self._interval_s:
            return
        if self._num_generated:
            logger.info("%s", self._line(seconds, stats, connector))
        self._begin()

    def _line(self, seconds: float, stats: SchedulerStats, connector: ConnectorStats | None) -> str:
        prompt = max(1, self._num_prompt)
        parts = [
            (
                f"last {seconds:.0f} s: {self._num_prompt / seconds:.1f} prompt tokens/s "
                f"(hits: {self._num_here / prompt:.0%} in the KV cache, "
                f"{self._num_external / prompt:.0%} by the connector)"
            ),
            f"{self._num_generated / seconds:.1f} generated tokens/s",
            f"{stats.num_running} running, {stats.num_waiting + stats.num_loading} waiting",
            f"KV cache {stats.kv_cache_usage:.0%} in use",
        ]
        return "; ".join([*parts, *(() if connector is None else _media(connector))])


def _media(stats: ConnectorStats, path: str = "") -> Iterator[str]:
    for name, medium in stats.media.items():
        if medium.used_bytes or medium.capacity_bytes:
            of = "" if medium.capacity_bytes is None else f" of {medium.capacity_bytes / 1e9:.2f}"
            yield f"{path}{name} {medium.used_bytes / 1e9:.2f}{of} GB"
    for label, child in stats.children.items():
        yield from _media(child, f"{path}{label}/")
