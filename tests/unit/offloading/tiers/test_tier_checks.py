"""The checks for tiers: kvferry's own pass them, and for every check there is a broken tier that does not."""

from __future__ import annotations

import inspect
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, ClassVar

import pytest

import kvferry.testing
from kvferry.clock import Clock
from kvferry.errors import ConfigError, TierBusy, TierCorrupt, TierUnavailable
from kvferry.offloading.store.tier import ResetReceipt, Tier, TierJob, TierResult, TierRoom, TierStats
from kvferry.offloading.tiers.disk import DiskTier
from kvferry.testing.tier_checks import NAMESPACE, TierChecks, key_of
from kvferry.testing.tiers import MemoryTier
from kvferry.testing.transport_checks import TransportChecks
from kvferry.types import Namespace, StoreKey


class TestDisk(TierChecks):
    tier_class = DiskTier

    def make(self, namespace: Namespace = NAMESPACE, max_bytes: int | None = None) -> DiskTier:
        return DiskTier(self.folder / "kv", namespace, max_bytes=max_bytes)

    def config(self) -> Mapping[str, Any]:
        return {"path": str(self.folder / "configured"), "max_bytes": "1MB"}

    def quota(self, num_chunks: int) -> int:
        return 8192 + num_chunks * (4096 + self.payload_bytes + 80)

    def hold(self, tier: Tier) -> Callable[[], None]:
        gate, folder = threading.Event(), tier._folder  # type: ignore[attr-defined]

        def gated(call: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *arguments: (gate.wait(60), call(*arguments))[1]

        folder.write, folder.read = gated(folder.write), gated(folder.read)
        return gate.set

    def damage(self, tier: Tier, key: StoreKey) -> None:
        (path,) = self.folder.rglob(f"{key.hex()}.kv")
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(data)

    def refuse_writes(self, tier: Tier) -> None:
        def write(*_: object) -> None:
            raise OSError(30, "Read-only file system")

        tier._folder.write = write  # type: ignore[attr-defined]


class HeldMemory(MemoryTier):
    is_held = False
    is_refusing = False

    def _is_due(self, job: TierJob) -> bool:
        return not self.is_held


class TestMemory(TierChecks):
    is_durable = False
    tier_class = MemoryTier

    def make(self, namespace: Namespace = NAMESPACE, max_bytes: int | None = None) -> MemoryTier:
        return HeldMemory()

    def config(self) -> Mapping[str, Any]:
        return {"name": "mine"}

    def hold(self, tier: Tier) -> Callable[[], None]:
        tier.is_held = True  # type: ignore[attr-defined]
        return lambda: setattr(tier, "is_held", False)

    def damage(self, tier: Tier, key: StoreKey) -> None:
        payload, digest = tier.chunks[key]  # type: ignore[attr-defined]
        tier.chunks[key] = bytes([payload[0] ^ 1]) + payload[1:], digest  # type: ignore[attr-defined]

    def test_a_submit_that_raised_has_no_result_and_may_come_again(self) -> None:
        pytest.skip("a dict has no queue that could be full")


# ---- a whole tier, to be broken --------------------------------------------------------------------------------


class Shelf(HeldMemory):
    """A whole tier over a dict that outlives it. The mutants below each break one thing of it."""

    MAX_QUEUED: ClassVar[int] = 50

    def __init__(
        self, shelf: dict[str, OrderedDict[StoreKey, tuple[bytes, bytes]]], namespace: Namespace, max_bytes: int | None
    ) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise ConfigError("max_bytes")
        super().__init__("shelf")
        self.shelf = shelf
        self.max_bytes = max_bytes
        self.chunks = shelf.setdefault(namespace.digest, OrderedDict())
        self.evicted: list[StoreKey] = []
        self.num_evicted = 0
        self.make_room(0)
        self.evicted, self.num_evicted = [], 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], namespace: Namespace, clock: Clock, where: str) -> Shelf:
        if config.keys() - {"max_bytes"}:
            raise ConfigError(f"{where}: {sorted(config)}")
        return cls({}, namespace, config["max_bytes"])

    @classmethod
    def room(cls, config: Mapping[str, Any], payload_bytes: int, where: str) -> TierRoom:
        return TierRoom("shelf", 1, "a shelf")

    def used_bytes(self) -> int:
        return sum(len(payload) for chunks in self.shelf.values() for payload, _ in chunks.values())

    def make_room(self, num_bytes: int) -> None:
        while self.max_bytes is not None and self.used_bytes() + num_bytes > self.max_bytes:
            key, _ = self.chunks.popitem(last=False)
            self.evicted.append(key)
            self.num_evicted += 1

    def check_fits(self, payload_bytes: int) -> None:
        if self.max_bytes is not None and payload_bytes > self.max_bytes:
            raise ConfigError("max_bytes")

    def submit_store(self, job: TierJob) -> None:
        if len(self._stores) >= self.MAX_QUEUED:
            raise TierBusy("the queue is full")
        super().submit_store(job)

    def submit_load(self, job: TierJob) -> None:
        self._check_open()
        if job.key not in self.chunks:
            raise TierUnavailable("it is not there")
        super().submit_load(job)

    def _store(self, job: TierJob) -> bytes | None:
        if self.is_refusing:
            raise TierUnavailable("the shelf is full")
        digest = super()._store(job)
        chunk = self.chunks.pop(job.key)
        self.make_room(len(job.buffer))
        self.chunks[job.key] = chunk
        return digest

    def touch(self, keys: Any) -> None:
        for key in keys:
            if key in self.chunks:
                self.chunks.move_to_end(key)  # type: ignore[attr-defined]

    def take_lost(self) -> list[tuple[StoreKey, str]]:
        evicted, self.evicted = self.evicted, []
        return [*super().take_lost(), *((key, "evicted") for key in evicted)]

    def stats(self) -> TierStats:
        return TierStats(
            len(self.keys()), self.used_bytes(), self.max_bytes, len(self._stores) + len(self._loads),
            num_evicted=self.num_evicted, num_corrupt=self._num_corrupt, is_up=not self.is_refusing,
        )  # fmt: skip


class TestShelf(TestMemory):
    is_durable = True
    tier_class: Any = Shelf

    def setup_method(self) -> None:
        super().setup_method()
        self.shelf: dict[str, Any] = {}

    def make(self, namespace: Namespace = NAMESPACE, max_bytes: int | None = None) -> Any:
        return self.tier_class(self.shelf, namespace, max_bytes)

    def config(self) -> Mapping[str, Any]:
        return {"max_bytes": 1 << 20}

    def quota(self, num_chunks: int) -> int:
        return num_chunks * self.payload_bytes

    def refuse_writes(self, tier: Tier) -> None:
        tier.is_refusing = True  # type: ignore[attr-defined]

    test_a_submit_that_raised_has_no_result_and_may_come_again = (
        TierChecks.test_a_submit_that_raised_has_no_result_and_may_come_again
    )


# ---- mutants ---------------------------------------------------------------------------------------------------

FAILS: dict[type[Shelf], tuple[str, ...]] = {}
"""Mutant -> the checks that it must not pass."""


def fails(*checks: str) -> Callable[[type[Shelf]], type[Shelf]]:
    def note(mutant: type[Shelf]) -> type[Shelf]:
        FAILS[mutant] = checks
        return mutant

    return note


@fails("what_is_stored_is_loaded", "many_jobs_have_one_result_each")
class NeverEnds(Shelf):
    def poll(self) -> list[TierResult]:
        return super().poll()[:-1]


@fails("what_is_stored_is_loaded", "many_jobs_have_one_result_each")
class EndsTwice(Shelf):
    def poll(self) -> list[TierResult]:
        return super().poll() * 2


@fails("results_are_handed_out_once")
class RepeatsResults(Shelf):
    last: ClassVar[list[TierResult]] = []

    def poll(self) -> list[TierResult]:
        results = super().poll()
        if not results:
            self.last, results = [], self.last
        else:
            self.last = results
        return results


@fails("what_is_stored_is_loaded", "many_jobs_have_one_result_each")
class WrongKeyInResults(Shelf):
    def poll(self) -> list[TierResult]:
        results = super().poll()
        for result in results:
            result.key = key_of(999)
        return results


@fails(
    "results_of_loads_carry_the_digest_that_was_proved",
    "results_of_stores_say_what_was_stored",
)
class NoDigests(Shelf):
    def _store(self, job: TierJob) -> bytes | None:
        super()._store(job)
        return None

    def _load(self, job: TierJob) -> bytes | None:
        super()._load(job)
        return None


@fails(
    "damaged_bytes_are_refused_and_gone",
)
class TrustsEverybody(Shelf):
    def _store(self, job: TierJob) -> bytes | None:
        self.chunks[job.key] = bytes(job.buffer), job.digest or b""
        return job.digest

    def _load(self, job: TierJob) -> bytes | None:
        job.buffer[:] = self.chunks[job.key][0]
        return self.chunks[job.key][1]


@fails(
    "damage_is_counted_and_told_as_a_loss",
    "damage_is_found_after_reopening_too",
    "damaged_bytes_are_refused_and_gone",
)
class KeepsCorruptChunks(Shelf):
    def _load(self, job: TierJob) -> bytes | None:
        before = self.chunks.get(job.key)
        try:
            return super()._load(job)
        except TierCorrupt:
            self.chunks[job.key] = before  # type: ignore[assignment]
            self._num_corrupt, self._corrupt = 0, []
            raise


@fails(
    "damaged_bytes_are_refused_and_gone",
)
class CallsDamageAMiss(Shelf):
    def _load(self, job: TierJob) -> bytes | None:
        try:
            return super()._load(job)
        except TierCorrupt as error:
            raise TierUnavailable("never mind") from error


@fails(
    "a_damaged_chunk_can_be_stored_anew",
)
class ForbidsWhatWasCorrupt(Shelf):
    def submit_store(self, job: TierJob) -> None:
        if self._num_corrupt:
            raise TierUnavailable("once bitten")
        super().submit_store(job)


@fails(
    "a_failed_store_leaves_no_trace",
)
class CountsFailedStores(Shelf):
    leaked = 0

    def _store(self, job: TierJob) -> bytes | None:
        try:
            return super()._store(job)
        except TierCorrupt:
            self.leaked += len(job.buffer)
            raise

    def used_bytes(self) -> int:
        return super().used_bytes() + self.leaked


@fails(
    "a_failed_store_leaves_no_trace",
    "a_failed_store_of_a_chunk_that_is_there_never_yields_wrong_bytes",
    "a_medium_that_refuses_writes_fails_stores_alone",
    "bytes_that_do_not_match_their_digest_are_not_stored",
)
class StoresBeforeProof(Shelf):
    def _store(self, job: TierJob) -> bytes | None:
        self.chunks[job.key] = bytes(job.buffer), job.digest or b""
        return super()._store(job)


@fails(
    "any_number_of_bytes",
)
class CutsToPages(Shelf):
    def _store(self, job: TierJob) -> bytes | None:
        digest = super()._store(job)
        if len(job.buffer) % 4096:
            self.chunks[job.key] = self.chunks[job.key][0][: len(job.buffer) // 4096 * 4096], digest or b""
        return digest


@fails(
    "a_load_of_another_size_fails_and_never_lies",
)
class PadsLoads(Shelf):
    """Loads what it has into a buffer of any size."""

    def _load(self, job: TierJob) -> bytes | None:
        payload, digest = self.chunks[job.key]
        job.buffer[: len(payload)] = payload[: len(job.buffer)]
        return digest


@fails(
    "a_failed_store_of_a_chunk_that_is_there_never_yields_wrong_bytes",
    "a_store_anew_replaces",
)
class KeepsTheOld(Shelf):
    def _store(self, job: TierJob) -> bytes | None:
        return job.digest if job.key in self.chunks else super()._store(job)


@fails(
    "a_stores_buffer_is_the_callers_again_after_the_result",
    "damage_is_counted_and_told_as_a_loss",
)
class WritesBehind(Shelf):
    """Takes the bytes of a store one poll after it has given the buffer back; holds on to buffers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.behind: list[tuple[TierJob, memoryview]] = []

    def poll(self) -> list[TierResult]:
        for job, view in self.behind:
            if job.key in self.chunks and len(self.chunks[job.key][0]) == len(view):
                self.chunks[job.key] = bytes(view), self.chunks[job.key][1]
        self.behind = [(job, job.buffer[:]) for job in self._stores]
        return super().poll()


@fails(
    "nothing_holds_on_to_a_buffer_after_the_result",
)
class HoldsOn(Shelf):
    def _store(self, job: TierJob) -> bytes | None:
        self.view = job.buffer[:]
        return super()._store(job)


@fails(
    "what_is_stored_is_loaded",
)
class OneForAll(Shelf):
    def _load(self, job: TierJob) -> bytes | None:
        job.buffer[:], digest = next(reversed(self.chunks.values()))  # type: ignore[call-overload]
        return digest


@fails(
    "a_loads_buffer_is_not_written_after_the_result",
)
class WritesLate(Shelf):
    """Copies into the buffer of a load once more, after its result."""

    late: ClassVar[list[tuple[TierJob, bytes]]] = []

    def _load(self, job: TierJob) -> bytes | None:
        digest = super()._load(job)
        self.late = [(job, bytes(job.buffer))]
        return digest

    def drain(self, timeout_s: float) -> bool:
        for job, data in self.late:
            job.buffer[:] = data
        self.late = []
        return super().drain(timeout_s)


@fails(
    "a_random_walk_never_loads_wrong_bytes",
    "a_store_only_reads_its_buffer",
)
class ScribblesInStores(Shelf):
    def _store(self, job: TierJob) -> bytes | None:
        digest = super()._store(job)
        job.buffer[0] ^= 1
        return digest


@fails(
    "a_load_writes_its_buffer_and_nothing_beside_it",
)
class WritesBeside(Shelf):
    def _load(self, job: TierJob) -> bytes | None:
        digest = super()._load(job)
        whole = job.buffer.obj
        if len(whole) > len(job.buffer):  # type: ignore[arg-type]
            memoryview(whole)[0] = 0  # type: ignore[arg-type]
        return digest


@fails(
    "draining_ends_at_its_time_limit",
    "no_call_waits_for_a_job",
)
class WaitsForHeldJobs(Shelf):
    def contains(self, keys: Any) -> list[bool]:
        for _ in range(1000):
            if not self.is_held:
                break
            time.sleep(0.001)
        return super().contains(keys)

    def drain(self, timeout_s: float) -> bool:
        self.contains([])
        return super().drain(timeout_s)


@fails(
    "a_submit_that_raised_has_no_result_and_may_come_again",
)
class QueuesForEver(Shelf):
    MAX_QUEUED = 1 << 30


@fails(
    "a_closed_tier_has_nothing_and_takes_nothing",
    "a_submit_that_raised_has_no_result_and_may_come_again",
    "closing_an_unused_tier_twice",
    "many_jobs_have_one_result_each",
)
class AcceptsWhatItRefuses(Shelf):
    def submit_store(self, job: TierJob) -> None:
        self._stores.append(job)
        if len(self._stores) > 20:
            raise TierBusy("full")


@fails(
    "a_chunk_is_not_there_before_it_is_stored",
)
class HasWhatIsNotStoredYet(Shelf):
    def contains(self, keys: Any) -> list[bool]:
        pending = {job.key for job in self._stores}
        return [has or key in pending for has, key in zip(super().contains(keys), keys, strict=True)]


@fails(
    "a_medium_that_refuses_writes_fails_stores_alone",
    "bytes_that_do_not_match_their_digest_are_not_stored",
    "contains_answers_for_each_key_in_order",
    "touched_chunks_stay_and_the_last_counts_as_the_most_recent",
)
class AnswersInOrderOfItsOwn(Shelf):
    def contains(self, keys: Any) -> list[bool]:
        return sorted(super().contains(keys))


@fails(
    "a_random_walk_never_loads_wrong_bytes",
    "clear_drops_everything_and_says_how_much",
    "keys_are_what_contains_says_yes_to",
)
class ListsTooMuch(Shelf):
    def remove(self, keys: Any) -> None:
        self.ghosts = [*getattr(self, "ghosts", []), *(key for key in keys if key in self.chunks)]
        super().remove(keys)

    def keys(self) -> list[StoreKey]:
        return [*super().keys(), *getattr(self, "ghosts", [])]


@fails(
    "a_closed_tier_has_nothing_and_takes_nothing",
)
class KeysWhenClosed(Shelf):
    def keys(self) -> list[StoreKey]:
        return list(self.chunks)


@fails(
    "stats_count_bytes",
    "stats_count_jobs_without_a_result",
)
class NoStats(Shelf):
    def stats(self) -> TierStats:
        return TierStats(0, 0, None, 0)


@fails(
    "a_quota_below_one_chunk_is_refused",
)
class NoQuota(Shelf):
    def make_room(self, num_bytes: int) -> None:
        pass

    def check_fits(self, payload_bytes: int) -> None:
        pass


@fails(
    "a_lowered_quota_is_kept_after_reopening",
    "the_quota_is_kept_at_every_moment",
)
class HalfTheQuota(Shelf):
    def __init__(self, shelf: Any, namespace: Namespace, max_bytes: int | None) -> None:
        super().__init__(shelf, namespace, max_bytes and max_bytes // 2)


@fails(
    "a_random_walk_never_loads_wrong_bytes",
    "the_least_recently_used_goes_first",
    "touched_chunks_stay_and_the_last_counts_as_the_most_recent",
    "touching_unknown_keys_is_ignored",
)
class EvictsTheNewest(Shelf):
    def touch(self, keys: Any) -> None:
        for key in keys:
            self.chunks.move_to_end(key, last=False)  # type: ignore[attr-defined]

    def make_room(self, num_bytes: int) -> None:
        while self.max_bytes is not None and self.used_bytes() + num_bytes > self.max_bytes:
            self.evicted.append(self.chunks.popitem()[0])  # type: ignore[attr-defined]
            self.num_evicted += 1


@fails(
    "damage_is_counted_and_told_as_a_loss",
    "evicted_chunks_are_told_once_with_the_reason",
)
class EvictsSilently(Shelf):
    def take_lost(self) -> list[tuple[StoreKey, str]]:
        super().take_lost()
        return []


@fails(
    "what_is_evicted_is_gone_for_good",
)
class EvictsForShow(Shelf):
    """What is evicted comes back when the tier is opened."""

    def make_room(self, num_bytes: int) -> None:
        before = dict(self.chunks)
        super().make_room(num_bytes)
        gone = {key: chunk for key, chunk in before.items() if key not in self.chunks}
        self.shelf.setdefault("attic", OrderedDict()).update(gone)

    def used_bytes(self) -> int:
        return sum(len(payload) for payload, _ in self.chunks.values())

    def close(self) -> None:
        self.chunks.update(self.shelf.pop("attic", {}))
        super().close()


@fails("removed_chunks_are_misses_at_once", "removed_chunks_stay_away_after_reopening")
class ForgetsNothing(Shelf):
    def remove(self, keys: Any) -> None:
        pass


@fails(
    "a_store_that_is_removed_meanwhile_fails",
    "a_store_under_way_when_all_is_cleared_fails",
)
class RemovesTheDiskCopyAlone(Shelf):
    """What is removed while it is stored is stored all the same."""

    def remove(self, keys: Any) -> None:
        for key in keys:
            self.chunks.pop(key, None)


@fails(
    "a_removed_chunk_can_be_stored_again",
    "a_store_that_is_removed_meanwhile_fails",
    "a_store_under_way_when_all_is_cleared_fails",
)
class RefusesWhatWasRemoved(Shelf):
    def remove(self, keys: Any) -> None:
        self.refused = {*getattr(self, "refused", ()), *keys}
        super().remove(keys)

    def submit_store(self, job: TierJob) -> None:
        if job.key in getattr(self, "refused", ()):
            raise TierUnavailable("it was removed")
        super().submit_store(job)


@fails(
    "a_cleared_tier_is_empty_after_reopening",
    "removed_chunks_stay_away_after_reopening",
)
class RemovesForNow(Shelf):
    def remove(self, keys: Any) -> None:
        self.attic = {**getattr(self, "attic", {}), **{key: self.chunks[key] for key in keys if key in self.chunks}}
        super().remove(keys)

    def close(self) -> None:
        self.chunks.update(getattr(self, "attic", {}))
        super().close()


@fails(
    "removed_and_cleared_chunks_are_no_losses",
)
class TellsRemovedAsLost(Shelf):
    def remove(self, keys: Any) -> None:
        self.evicted += [key for key in keys if key in self.chunks]
        super().remove(keys)


@fails(
    "a_random_walk_never_loads_wrong_bytes",
    "removing_unknown_keys_is_ignored",
    "touching_unknown_keys_is_ignored",
)
class KnowsNoStrangers(Shelf):
    def touch(self, keys: Any) -> None:
        for key in keys:
            self.chunks.move_to_end(key)  # type: ignore[attr-defined]

    def remove(self, keys: Any) -> None:
        for key in keys:
            if key not in self.chunks and not any(job.key == key for job in self._stores):
                raise KeyError(key)
        super().remove(keys)


@fails(
    "a_load_that_is_removed_meanwhile_ends_once_and_never_lies",
    "a_random_walk_never_loads_wrong_bytes",
    "no_call_waits_for_a_job",
)
class LosesLoadsOfRemovedChunks(Shelf):
    def remove(self, keys: Any) -> None:
        super().remove(keys)
        self._loads = [job for job in self._loads if job.key not in keys]


@fails(
    "clear_drops_everything_and_says_how_much",
    "clearing_an_empty_tier_drops_nothing",
)
class WrongReceipt(Shelf):
    def clear(self) -> ResetReceipt:
        super().clear()
        return ResetReceipt("someone", 1, 1)


@fails(
    "a_cleared_tier_is_empty_after_reopening",
    "a_store_under_way_when_all_is_cleared_fails",
    "clear_drops_everything_and_says_how_much",
    "clearing_an_empty_tier_drops_nothing",
)
class ClearsNobody(Shelf):
    def clear(self) -> ResetReceipt:
        return ResetReceipt(self.name, len(self.chunks), 1 << 20)


@fails(
    "another_namespace_sees_none_of_it_and_clears_its_own_alone",
)
class ClearsEverybody(Shelf):
    def clear(self) -> ResetReceipt:
        receipt = super().clear()
        for chunks in self.shelf.values():
            chunks.clear()
        return receipt


@fails(
    "another_namespace_sees_none_of_it_and_clears_its_own_alone",
)
class OneNamespace(Shelf):
    def __init__(self, shelf: Any, namespace: Namespace, max_bytes: int | None) -> None:
        super().__init__(shelf, NAMESPACE, max_bytes)


@fails(
    "chunks_and_keys_are_there_after_reopening",
)
class ForgetsWhenClosed(Shelf):
    def close(self) -> None:
        super().close()
        self.chunks.clear()


@fails(
    "draining_ends_at_its_time_limit",
)
class DrainsAlways(Shelf):
    def drain(self, timeout_s: float) -> bool:
        return True


@fails(
    "after_draining_all_results_can_be_polled",
    "an_idle_tier_is_drained_at_once",
    "results_are_handed_out_once",
)
class DrainsNever(Shelf):
    def drain(self, timeout_s: float) -> bool:
        return False


@fails(
    "a_closed_tier_has_nothing_and_takes_nothing",
    "closing_an_unused_tier_twice",
)
class StaysOpen(Shelf):
    def close(self) -> None:
        pass


@fails("closing_an_unused_tier_twice")
class ClosesOnce(Shelf):
    def close(self) -> None:
        assert not self.is_closed
        super().close()


@fails(
    "closing_ends_jobs_under_way_once_each",
    "results_that_were_not_polled_are_there_after_closing",
)
class DropsJobsWhenClosed(Shelf):
    def close(self) -> None:
        super().close()
        self._lost = []


@fails(
    "closing_lets_go_of_threads_and_descriptors",
)
class Abandons(Shelf):
    """A thread and a descriptor stay behind."""

    def close(self) -> None:
        if not self.is_closed:
            threading.Thread(target=time.sleep, args=(1.5,), daemon=True).start()
        super().close()


@fails(
    "a_medium_that_refuses_writes_is_told",
)
class IsNeverDown(Shelf):
    def stats(self) -> TierStats:
        self_is_refusing, self.is_refusing = self.is_refusing, False
        stats = super().stats()
        self.is_refusing = self_is_refusing
        return stats


@fails(
    "a_medium_that_refuses_writes_fails_stores_alone",
)
class WritesToTheRefusing(Shelf):
    def _store(self, job: TierJob) -> bytes | None:
        if self.is_refusing:
            self.chunks.clear()
        return super()._store(job)


@fails(
    "bytes_that_do_not_match_their_digest_are_not_stored",
    "damaged_bytes_are_refused_and_gone",
    "removed_chunks_are_misses_at_once",
    "what_is_not_there_cannot_be_loaded",
)
class RaisesOfMissing(Shelf):
    """A miss is no error of its contract."""

    def submit_load(self, job: TierJob) -> None:
        self._check_open()
        if job.key not in self.chunks:
            raise TierCorrupt("not there")
        super().submit_load(job)


@fails(
    "a_chunk_may_be_loaded_twice_at_once",
    "a_random_walk_never_loads_wrong_bytes",
)
class OneReaderAtATime(Shelf):
    def submit_load(self, job: TierJob) -> None:
        self._loads = [other for other in self._loads if other.key != job.key]
        super().submit_load(job)


@fails(
    "it_has_a_name",
)
class Nameless(Shelf):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.name = ""


@fails(
    "a_new_tier_is_empty",
)
class BornFull(Shelf):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.chunks[key_of(77)] = b"x", b"y"


@fails(
    "from_config_names_an_unknown_setting_and_its_place",
    "room_is_told_without_opening_anything",
)
class TakesAnySetting(Shelf):
    @classmethod
    def from_config(cls, config: Mapping[str, Any], namespace: Namespace, clock: Clock, where: str) -> Shelf:
        return cls({}, namespace, None)

    @classmethod
    def room(cls, config: Mapping[str, Any], payload_bytes: int, where: str) -> TierRoom:
        return TierRoom("shelf", 1, "")


@fails(
    "from_config_makes_one",
)
class TakesNoSetting(Shelf):
    @classmethod
    def from_config(cls, config: Mapping[str, Any], namespace: Namespace, clock: Clock, where: str) -> Shelf:
        raise ConfigError(f"{where}: no_such_setting")


@fails(
    "a_quota_of_one_chunk_works",
    "chunks_that_can_be_stored_fit",
)
class FitsNothing(Shelf):
    def check_fits(self, payload_bytes: int) -> None:
        raise ConfigError("too large")


def passes(mutant: type[Shelf], check: str) -> bool:
    suite = type("Suite", (TestShelf,), {"tier_class": mutant, "wait_s": 0.1, "quick_s": 0.2})()
    suite.setup_method()
    try:
        getattr(suite, f"test_{check}")()
    except Exception:
        return False
    finally:
        with suppress(Exception):
            suite.teardown_method()
    return True


@pytest.mark.parametrize("mutant", FAILS)
def test_a_broken_tier_is_found_out(mutant: type[Shelf]) -> None:
    assert [check for check in FAILS[mutant] if passes(mutant, check)] == []


def test_every_check_can_fail() -> None:
    found = {f"test_{check}" for checks in FAILS.values() for check in checks}
    there = {name for name, _ in inspect.getmembers(TierChecks, inspect.isfunction) if name.startswith("test_")}
    assert len(there) >= 60
    assert found == there


def test_the_checks_are_public_names() -> None:
    assert kvferry.testing.TierChecks is TierChecks
    assert kvferry.testing.TransportChecks is TransportChecks
