"""The scheduler side's books of digests: which its workers were asked for, and whose KV went without."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from kvferry.contract.views import ScheduledRequest, StepView
from kvferry.p2p.actions import DigestJob
from kvferry.p2p.step_messages import DigestReport

logger = logging.getLogger(__name__)


class DigestBooks:
    """Of one engine. `is_on`: all its workers make digests, as `verify_loads` says."""

    def __init__(self, num_ranks: int) -> None:
        self.is_on = False
        self._num_ranks = num_ranks
        self._prompts: dict[str, int] = {}  # that will be handed over, in tokens
        self._jobs: dict[str, tuple[set[int], float]] = {}  # ranks that have answered, and its deadline
        self._unproved: set[str] = set()  # peers that were logged as such

    def expect(self, request_id: str, num_prompt_tokens: int) -> None:
        """A request whose prompt will be handed over."""
        self._prompts[request_id] = num_prompt_tokens

    def forget(self, request_id: str) -> None:
        """It ended."""
        self._prompts.pop(request_id, None)

    def ending_prompts(self, step: StepView) -> Iterator[tuple[ScheduledRequest, int]]:
        """Those of them whose last token the step computes, and their number of tokens."""
        for item in step.scheduled if self.is_on else ():
            num_tokens = self._prompts.get(item.request_id, 0)
            if item.num_computed_tokens < num_tokens <= item.num_computed_tokens + item.num_scheduled_tokens:
                yield item, num_tokens

    def ordered(self, job: DigestJob, deadline_s: float) -> None:
        """The workers are asked."""
        self._jobs[job.job_id] = set(), deadline_s

    def answered(self, report: DigestReport) -> None:
        """One of them answers."""
        ranks, _ = self._jobs.get(report.job_id, (set(), 0.0))
        ranks.add(report.rank)
        if len(ranks) == self._num_ranks:
            self._jobs.pop(report.job_id, None)

    def deadlines(self) -> list[float]:
        """Until when answers are waited for."""
        return [deadline_s for _, deadline_s in self._jobs.values()]

    def note_load(self, request_id: str, peer: str, *, is_proved: bool) -> None:
        """A load ended well."""
        if self.is_on and not is_proved and peer not in self._unproved:
            self._unproved.add(peer)
            logger.warning(
                "%s: KV from %s is not proved (verify_loads): that engine sends no digests, sends them "
                "late, or cuts its blocks or ranks in another way; this warning appears once for each peer",
                request_id, peer,
            )  # fmt: skip
