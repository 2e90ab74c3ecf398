"""What a MultiConnector remembers of requests: who claimed what (scheduler), and who has yet to report (worker)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvferry.clock import Clock
from kvferry.contract.base import KVConnectorTransferResults
from kvferry.multi.config import LoadPolicy
from kvferry.multi.messages import ChildReport, MultiMetadata

Match = tuple[int | None, bool]


@dataclass(frozen=True, slots=True)
class ChildClaim:
    """The claim that was handed to the host."""

    child: int
    is_async: bool
    num_local_tokens: int


@dataclass(slots=True)
class _Lookup:
    claim: ChildClaim | None = None
    waits_since_s: float | None = None
    """Since when one child has had a hit while another was looking."""
    tails: set[int] = field(default_factory=set)
    """Children that took over the request's partial tail."""


class Claims:
    """Scheduler side: per request, which child's claim holds. Chooses by the load policy."""

    def __init__(self, policy: LoadPolicy, wait_s: float, clock: Clock) -> None:
        self._policy = policy
        self._wait_s = wait_s
        self._clock = clock
        self._lookups: dict[str, _Lookup] = {}

    def __len__(self) -> int:
        return len(self._lookups)

    def choose(self, request_id: str, num_local_tokens: int, answers: Sequence[Match]) -> Match:
        """The answer to the host, from the children's. Remembers its owner; a miss forgets the one before."""
        best, is_waiting = self._best(answers)
        lookup = self._lookups.setdefault(request_id, _Lookup())
        lookup.claim = None
        if best is None:
            lookup.waits_since_s = None
            self._drop_if_empty(request_id)
            return (None, False) if is_waiting else (0, False)
        if is_waiting and not self._waited_enough(lookup):
            return None, False
        lookup.claim = ChildClaim(best, answers[best][1], num_local_tokens)
        return answers[best]

    def _best(self, answers: Sequence[Match]) -> tuple[int | None, bool]:
        """(child with the best claim so far, whether one that is still looking may have a better one)."""
        hits = [i for i, (num_tokens, _) in enumerate(answers) if num_tokens]
        looking = [i for i, (num_tokens, _) in enumerate(answers) if num_tokens is None]
        if not hits:
            return None, bool(looking)
        if self._policy is LoadPolicy.FIRST:
            return hits[0], any(i < hits[0] for i in looking)
        return max(hits, key=lambda i: answers[i][0] or 0), bool(looking)

    def _waited_enough(self, lookup: _Lookup) -> bool:
        now_s = self._clock.now()
        if lookup.waits_since_s is None:
            lookup.waits_since_s = now_s
        return now_s - lookup.waits_since_s >= self._wait_s

    def of(self, request_id: str) -> ChildClaim | None:
        """The claim that holds."""
        lookup = self._lookups.get(request_id)
        return None if lookup is None else lookup.claim

    def admitted(self, request_id: str) -> None:
        """The request has its blocks: another lookup, after a preemption, may wait anew."""
        if request_id in self._lookups:
            self._lookups[request_id].waits_since_s = None

    def add_tail(self, request_id: str, child: int) -> None:
        """The child took over the partial tail, which it will report as sent."""
        self._lookups.setdefault(request_id, _Lookup()).tails.add(child)

    def end(self, request_id: str) -> set[int]:
        """Forget the request; the children that took over its partial tail."""
        lookup = self._lookups.pop(request_id, None)
        return set() if lookup is None else lookup.tails

    def _drop_if_empty(self, request_id: str) -> None:
        if not self._lookups[request_id].tails:
            del self._lookups[request_id]


@dataclass(slots=True)
class _ChildLoad:
    child: int
    has_failed: bool = False


class Completions:
    """Worker side: forwards a send when every child that promised it has reported, and a load when its owner has.

    Order and repetition of reports do not matter. Reports of a live request come early and are kept until it ends;
    those of unknown requests, of children that promised nothing, and late ones are dropped.
    """

    def __init__(self, num_children: int) -> None:
        self._live: set[str] = set()
        self._early: dict[str, set[int]] = {}
        self._sends: dict[str, set[int]] = {}
        self._loads: dict[str, _ChildLoad] = {}
        self._due = KVConnectorTransferResults()
        self._accepted = [ChildReport() for _ in range(num_children)]

    def begin_step(self, metadata: MultiMetadata, switched_off: set[int], closed: set[int]) -> None:
        """Take the scheduler's news in.

        Loads of a child that is switched off have failed: nobody starts them. What a closed one promised is over.
        """
        self._live.update(metadata.new_req_ids)
        for request_id, children in metadata.ended.items():
            self._live.discard(request_id)
            early = self._early.pop(request_id, set())
            if children:
                self._sends.setdefault(request_id, set()).update(children)
            for child in early.intersection(children):
                self._sent(child, request_id)
        for request_id, child in metadata.async_loads.items():
            self._loads[request_id] = _ChildLoad(child)
            if child in switched_off:
                self._received(child, request_id, has_failed=True)
        for child in closed:
            self._give_up(child)

    def _give_up(self, child: int) -> None:
        for request_id in [request_id for request_id, awaited in self._sends.items() if child in awaited]:
            self._sent(child, request_id)
        for request_id in [request_id for request_id, load in self._loads.items() if load.child == child]:
            self._received(child, request_id, has_failed=True)

    def loading(self) -> set[int]:
        """Children with a load under way."""
        return {load.child for load in self._loads.values()}

    def loading_ids(self) -> set[str]:
        """Loads under way."""
        return set(self._loads)

    def live_ids(self) -> set[str]:
        """Requests that have not ended."""
        return set(self._live)

    def fail(self, child: int, request_ids: set[str]) -> set[str]:
        """These loads of the child's have failed, without its word. Those of them that were under way."""
        failed = {request_id for request_id in request_ids if request_id in self._loads}
        for request_id in failed:
            self._received(child, request_id, has_failed=True)
        return failed

    def report(self, child: int, results: Any) -> None:
        """Take one child's `KVConnectorTransferResults` in."""
        for request_id in results.finished_sending:
            if child in self._sends.get(request_id, ()):
                self._sent(child, request_id)
            elif request_id in self._live:
                self._early.setdefault(request_id, set()).add(child)
        for request_id in results.failed_recving:
            load = self._loads.get(request_id)
            if load is not None and load.child == child:
                load.has_failed = True
        for request_id in results.finished_recving:
            self._received(child, request_id)
        self._due.failed_blocks |= getattr(results, "failed_blocks", set())

    def _sent(self, child: int, request_id: str) -> None:
        awaited = self._sends[request_id]
        awaited.remove(child)
        self._accepted[child].sent[request_id] = 1
        if not awaited:
            del self._sends[request_id]
            self._due.finished_sending.add(request_id)

    def _received(self, child: int, request_id: str, *, has_failed: bool = False) -> None:
        load = self._loads.get(request_id)
        if load is None or load.child != child:
            return
        del self._loads[request_id]
        self._accepted[child].received[request_id] = 1
        self._due.finished_recving.add(request_id)
        if has_failed or load.has_failed:
            self._accepted[child].failed.add(request_id)
            self._due.failed_recving.add(request_id)

    def take(self) -> KVConnectorTransferResults:
        """What is due to the host since the last call; each id once."""
        due, self._due = self._due, KVConnectorTransferResults()
        return due

    def take_accepted(self) -> list[ChildReport]:
        """By child, its reports that counted since the last call."""
        accepted, self._accepted = self._accepted, [ChildReport() for _ in self._accepted]
        return accepted


class RankCounts:
    """Scheduler side: request ids that enough ranks have reported, for one child."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._seen: Counter[str] = Counter()

    def add(self, reported: Counter[str]) -> set[str]:
        """Count a step's reports in; the ids that are complete by now."""
        self._seen.update(reported)
        done = {request_id for request_id in reported if self._seen[request_id] >= self._num_ranks}
        for request_id in done:
            del self._seen[request_id]
        return done
