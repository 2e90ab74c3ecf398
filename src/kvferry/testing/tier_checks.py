"""What every tier must pass. Inherit `TierChecks` in a pytest module and say how to make one.

    class TestMine(TierChecks):
        def make(self, namespace=NAMESPACE, max_bytes=None):
            return MyTier(self.folder / "kv", namespace, max_bytes=max_bytes)

Each check stands for a sentence of `kvferry.offloading.store.tier`. What a check needs beside `make` is a method that
may be left out (`hold`, `damage`, `refuse_writes`, `quota`, `config`); the checks that need it are skipped then, and
say so. What only other processes can show (a killed writer, two owners) is for each tier's own tests.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from operator import gt
from pathlib import Path
from typing import Any
from unittest import SkipTest

from kvferry.clock import SystemClock
from kvferry.errors import ConfigError, TierBusy, TierCorrupt, TierError, TierUnavailable
from kvferry.kv.keys import digest as digest_of
from kvferry.offloading.store.tier import Tier, TierJob, TierResult, TierRoom
from kvferry.types import Namespace, StoreKey

NAMESPACE = Namespace("c0ffee00", {"format": 1, "dtype": "float32"})
OTHER_NAMESPACE = Namespace("0ddba11", {"format": 1, "dtype": "float16"})


def key_of(number: int) -> StoreKey:
    """The key of the test's chunk of that number."""
    return StoreKey(hashlib.sha256(b"chunk %d" % number).digest() + b"\0\0\0\0")


def payload_of(key: bytes, num_bytes: int) -> bytes:
    """The bytes of a chunk: a function of its key."""
    return hashlib.shake_128(key).digest(num_bytes)


class TierChecks(ABC):
    """Each test has a folder of its own, which `make` may use; a tier that is made there again finds what was there."""

    payload_bytes = 8192
    """Of the chunks in most checks."""
    is_durable = True
    """Whether chunks are there again after `close` and `make`. False: for tiers that are gone with their process."""
    evicts_least_recent = True
    """Whether, with a quota, the chunk goes first that was stored or touched longest ago."""
    wait_s = 60.0
    """A job that takes longer has hung."""
    quick_s = 2.0
    """A call that takes longer has waited for something."""
    tier_class: Any = None
    """The class with `from_config`, for the checks that need `config`."""
    SEED = 20261129

    # ---- what the tier's own test says ------------------------------------------------------------------------

    @abstractmethod
    def make(self, namespace: Namespace = NAMESPACE, max_bytes: int | None = None) -> Tier:
        """The tier, open, over this test's medium (`self.folder`, say)."""

    def config(self) -> Mapping[str, Any]:
        """Settings with which `tier_class.from_config` makes such a tier."""
        raise SkipTest("the test names no settings (config, tier_class)")

    def quota(self, num_chunks: int) -> int:
        """The `max_bytes` that has room for so many chunks of `payload_bytes`, and not for one more."""
        raise SkipTest("the test says of no quota (quota)")

    def hold(self, tier: Tier) -> Callable[[], None]:
        """Keep every job that is submitted from now on from ending, until what is returned is called (any thread)."""
        raise SkipTest("the test cannot hold jobs up (hold)")

    def damage(self, tier: Tier, key: StoreKey) -> None:
        """Change one bit of the stored bytes, behind the tier's back."""
        raise SkipTest("the test cannot damage stored bytes (damage)")

    def refuse_writes(self, tier: Tier) -> None:
        """From now on the medium refuses to take anything: it is full, gone or read-only."""
        raise SkipTest("the test cannot make the medium refuse writes (refuse_writes)")

    # ---- around each test -------------------------------------------------------------------------------------

    def setup_method(self) -> None:
        """A folder, and no tier yet."""
        self.folder = Path(tempfile.mkdtemp(prefix="kvferry-tier-"))
        self._made: list[Tier] = []
        self._releases: list[Callable[[], None]] = []
        self._last_job = 0

    def teardown_method(self) -> None:
        """Let everything go."""
        for release in self._releases:
            release()
        for tier in self._made:
            tier.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- tools ------------------------------------------------------------------------------------------------

    def open(self, **settings: Any) -> Tier:
        """`make`, closed at the end of the test."""
        self._made.append(self.make(**settings))
        return self._made[-1]

    def reopen(self, tier: Tier, **settings: Any) -> Tier:
        """Close, and make anew over the same medium."""
        tier.close()
        if not self.is_durable:
            raise SkipTest("the tier is gone when it is closed (is_durable)")
        return self.open(**settings)

    def held(self, tier: Tier) -> Callable[[], None]:
        """`hold`, released at the end of the test."""
        self._releases.append(self.hold(tier))
        return self._releases[-1]

    def bytes_of(self, number: int, num_bytes: int | None = None) -> bytes:
        """The chunk of that number."""
        return payload_of(key_of(number), self.payload_bytes if num_bytes is None else num_bytes)

    def store_job(self, number: int, data: bytes | None = None, digest: bytes | None = None) -> TierJob:
        """A job that stores the chunk of that number, or other bytes under its key."""
        data = self.bytes_of(number) if data is None else data
        self._last_job += 1
        return TierJob(self._last_job, key_of(number), memoryview(bytearray(data)), digest or digest_of(data))

    def load_job(self, number: int, num_bytes: int | None = None) -> TierJob:
        """A job that loads the chunk of that number into a new buffer."""
        self._last_job += 1
        size = self.payload_bytes if num_bytes is None else num_bytes
        return TierJob(self._last_job, key_of(number), memoryview(bytearray(size)))

    def wait(self, tier: Tier, *jobs: TierJob) -> dict[int, TierResult]:
        """The results of these jobs by number. AssertionError: one is missing, comes twice, or is of no such job."""
        waiting = {job.job_id: job for job in jobs}
        results: dict[int, TierResult] = {}
        deadline_s = time.monotonic() + self.wait_s
        while waiting:
            assert time.monotonic() < deadline_s, f"jobs {sorted(waiting)} have no result"
            for result in tier.poll():
                assert result.job_id in waiting, f"{result} is of no job, or its second"
                assert result.key == waiting.pop(result.job_id).key, f"{result} has another job's key"
                assert (result.error is None) == result.ok, f"{result}: the error is None exactly when ok"
                results[result.job_id] = result
            time.sleep(0.0005)
        return results

    def store(self, tier: Tier, *numbers: int, num_bytes: int | None = None) -> None:
        """Store these chunks, one after the other; each must succeed."""
        for number in numbers:
            job = self.store_job(number, self.bytes_of(number, num_bytes))
            tier.submit_store(job)
            result = self.wait(tier, job)[job.job_id]
            assert result.ok, result

    def load(self, tier: Tier, number: int, num_bytes: int | None = None) -> tuple[bytes | None, TierError | None]:
        """(bytes, None), or (None, why not), whether that is raised or a result."""
        job = self.load_job(number, num_bytes)
        try:
            tier.submit_load(job)
        except TierError as error:
            return None, error
        result = self.wait(tier, job)[job.job_id]
        return (bytes(job.buffer), None) if result.ok else (None, result.error)

    def settle(self, tier: Tier) -> None:
        """Let everything end that goes on in the background, deletions too."""
        assert tier.drain(self.wait_s), "it does not drain"
        assert tier.poll() == [], "results of jobs that had one"

    def contents(self, tier: Tier, *numbers: int) -> list[bool]:
        """What `contains` says of these chunks."""
        return tier.contains([key_of(number) for number in numbers])

    def assert_quick(self, call: Callable[[], object], release: Callable[[], None]) -> None:
        """It returns although nothing moves. What waits is let go after `quick_s`, and fails."""
        timer = threading.Timer(self.quick_s, release)
        timer.start()
        call()
        assert timer.is_alive(), "it waited for a job"
        timer.cancel()

    # ---- constructed ------------------------------------------------------------------------------------------

    def test_a_new_tier_is_empty(self) -> None:
        tier = self.open()
        assert (tier.keys(), tier.poll(), tier.take_lost()) == ([], [], [])
        stats = tier.stats()
        assert (stats.num_chunks, stats.num_queued, stats.num_evicted, stats.num_corrupt) == (0, 0, 0, 0)
        assert stats.is_up
        tier.check_integrity()

    def test_it_has_a_name(self) -> None:
        name = self.open().name
        assert isinstance(name, str)
        assert name

    def test_from_config_makes_one(self) -> None:
        tier = self.tier_class.from_config(dict(self.config()), NAMESPACE, SystemClock(), "secondary_tiers[2]")
        self._made.append(tier)
        self.store(tier, 1)
        assert self.load(tier, 1) == (self.bytes_of(1), None)

    def test_from_config_names_an_unknown_setting_and_its_place(self) -> None:
        settings = {**self.config(), "no_such_setting": 1}
        try:
            tier = self.tier_class.from_config(settings, NAMESPACE, SystemClock(), "secondary_tiers[2]")
        except ConfigError as error:
            assert "secondary_tiers[2]" in str(error)
            assert "no_such_setting" in str(error)
        else:
            self._made.append(tier)
            raise AssertionError("an unknown setting is ignored")

    def test_room_is_told_without_opening_anything(self) -> None:
        settings = dict(self.config())
        if not hasattr(self.tier_class, "room"):
            raise SkipTest("the class does not tell its room")
        before = sorted(self.folder.rglob("*"))
        room = self.tier_class.room(settings, self.payload_bytes, "secondary_tiers[2]")
        assert isinstance(room, TierRoom)
        assert room.name
        assert room.reason
        assert sorted(self.folder.rglob("*")) == before

    # ---- storing and loading ----------------------------------------------------------------------------------

    def test_what_is_stored_is_loaded(self) -> None:
        tier = self.open()
        self.store(tier, 1, 2, 3)
        for number in (2, 1, 3, 2):
            assert self.load(tier, number) == (self.bytes_of(number), None)
        tier.check_integrity()

    def test_results_of_stores_say_what_was_stored(self) -> None:
        tier, job = self.open(), self.store_job(1)
        tier.submit_store(job)
        result = self.wait(tier, job)[job.job_id]
        assert (result.ok, result.digest, result.payload_bytes) == (True, job.digest, self.payload_bytes)
        assert 0 <= result.seconds < self.wait_s

    def test_results_of_loads_carry_the_digest_that_was_proved(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        job = self.load_job(1)
        tier.submit_load(job)
        result = self.wait(tier, job)[job.job_id]
        assert (result.ok, result.payload_bytes) == (True, self.payload_bytes)
        assert result.digest == digest_of(self.bytes_of(1))

    def test_any_number_of_bytes(self) -> None:
        tier = self.open()
        for number, num_bytes in enumerate((1, 4095, 4096, 4097, 1 << 20)):
            self.store(tier, number, num_bytes=num_bytes)
            assert self.load(tier, number, num_bytes) == (self.bytes_of(number, num_bytes), None)

    def test_a_store_anew_replaces(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        other = bytes(reversed(self.bytes_of(1)))
        job = self.store_job(1, other)
        tier.submit_store(job)
        assert self.wait(tier, job)[job.job_id].ok
        assert self.load(tier, 1) == (other, None)
        assert tier.keys() == [key_of(1)]
        self.settle(tier)
        assert tier.stats().num_chunks == 1
        tier.check_integrity()

    def test_many_jobs_have_one_result_each(self) -> None:
        tier = self.open()
        jobs = [self.store_job(number) for number in range(40)]
        self._submit_all(tier, tier.submit_store, jobs)
        loads = [self.load_job(number) for number in range(40)]
        random.Random(self.SEED).shuffle(loads)
        results = self._submit_all(tier, tier.submit_load, loads)
        assert all(result.ok for result in results.values())
        for job in loads:
            assert bytes(job.buffer) == payload_of(job.key, self.payload_bytes)
        assert tier.poll() == []

    def _submit_all(self, tier: Tier, submit: Callable[[TierJob], None], jobs: list[TierJob]) -> dict[int, TierResult]:
        results: dict[int, TierResult] = {}
        waiting: list[TierJob] = []
        for job in jobs:
            while True:
                try:
                    submit(job)
                except TierBusy:
                    assert waiting, "busy without a job"
                    results |= self.wait(tier, *waiting)
                    waiting = []
                else:
                    waiting.append(job)
                    break
        return results | self.wait(tier, *waiting)

    def test_a_chunk_may_be_loaded_twice_at_once(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        jobs = [self.load_job(1), self.load_job(1)]
        results = self._submit_all(tier, tier.submit_load, jobs)
        assert all(result.ok for result in results.values())
        assert {bytes(job.buffer) for job in jobs} == {self.bytes_of(1)}

    def test_results_are_handed_out_once(self) -> None:
        tier, job = self.open(), self.store_job(1)
        tier.submit_store(job)
        self.wait(tier, job)
        assert tier.drain(self.wait_s)
        assert [tier.poll() for _ in range(3)] == [[], [], []]

    # ---- buffers ----------------------------------------------------------------------------------------------

    def test_a_store_only_reads_its_buffer(self) -> None:
        tier, data = self.open(), self.bytes_of(1)
        job = TierJob(1, key_of(1), memoryview(data), digest_of(data))  # read-only
        tier.submit_store(job)
        assert self.wait(tier, job)[1].ok
        writable = self.store_job(2)
        tier.submit_store(writable)
        self.wait(tier, writable)
        assert bytes(writable.buffer) == self.bytes_of(2)

    def test_a_stores_buffer_is_the_callers_again_after_the_result(self) -> None:
        tier, job = self.open(), self.store_job(1)
        tier.submit_store(job)
        self.wait(tier, job)
        job.buffer[:] = bytes(self.payload_bytes)
        assert self.load(tier, 1) == (self.bytes_of(1), None)

    def test_a_loads_buffer_is_not_written_after_the_result(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        job = self.load_job(1)
        tier.submit_load(job)
        self.wait(tier, job)
        job.buffer[:] = b"\5" * self.payload_bytes
        self.settle(tier)
        time.sleep(0.02)
        assert bytes(job.buffer) == b"\5" * self.payload_bytes

    def test_a_load_writes_its_buffer_and_nothing_beside_it(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        slots = bytearray(b"\7" * (3 * self.payload_bytes))
        job = TierJob(9, key_of(1), memoryview(slots)[self.payload_bytes : 2 * self.payload_bytes])
        tier.submit_load(job)
        assert self.wait(tier, job)[9].ok
        beside = b"\7" * self.payload_bytes
        assert bytes(slots) == beside + self.bytes_of(1) + beside

    def test_nothing_holds_on_to_a_buffer_after_the_result(self) -> None:
        tier = self.open()
        for job, submit in ((self.store_job(1), tier.submit_store), (self.load_job(1), tier.submit_load)):
            submit(job)
            self.wait(tier, job)
            self.settle(tier)
            owner = job.buffer.obj
            job.buffer.release()
            assert isinstance(owner, bytearray)
            owner.append(0)  # BufferError: somebody has a view of it

    # ---- proof ------------------------------------------------------------------------------------------------

    def test_bytes_that_do_not_match_their_digest_are_not_stored(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        self._store_wrong(tier, 2)
        assert self.contents(tier, 1, 2) == [True, False]
        assert isinstance(self.load(tier, 2)[1], TierUnavailable)
        assert self.load(tier, 1) == (self.bytes_of(1), None)
        self.settle(tier)
        tier.check_integrity()

    def _store_wrong(self, tier: Tier, number: int) -> None:
        job = self.store_job(number, digest=b"x" * 16)
        tier.submit_store(job)
        error = self.wait(tier, job)[job.job_id].error
        assert isinstance(error, TierCorrupt), error

    def test_a_failed_store_leaves_no_trace(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        used_bytes = tier.stats().used_bytes
        self._store_wrong(tier, 2)
        self.settle(tier)
        stats = tier.stats()
        assert (stats.num_chunks, stats.used_bytes, stats.num_queued) == (1, used_bytes, 0)
        tier = self.reopen(tier)
        assert tier.keys() == [key_of(1)]

    def test_a_failed_store_of_a_chunk_that_is_there_never_yields_wrong_bytes(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        self._store_wrong(tier, 1)
        (is_there,) = self.contents(tier, 1)
        data, error = self.load(tier, 1)
        assert data == (self.bytes_of(1) if is_there else None), error

    def test_damaged_bytes_are_refused_and_gone(self) -> None:
        tier = self.open()
        self.store(tier, 1, 2)
        self.damage(tier, key_of(1))
        data, error = self.load(tier, 1)
        assert data is None
        assert isinstance(error, TierCorrupt)
        assert self.contents(tier, 1, 2) == [False, True]
        assert tier.keys() == [key_of(2)]
        assert isinstance(self.load(tier, 1)[1], TierUnavailable), "it is a miss from then on"
        assert self.load(tier, 2) == (self.bytes_of(2), None)
        tier.check_integrity()

    def test_damage_is_counted_and_told_as_a_loss(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        self.damage(tier, key_of(1))
        self.load(tier, 1)
        assert tier.stats().num_corrupt == 1
        ((key, reason),) = tier.take_lost()
        assert key == key_of(1)
        assert reason

    def test_a_damaged_chunk_can_be_stored_anew(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        self.damage(tier, key_of(1))
        self.load(tier, 1)
        self.settle(tier)
        self.store(tier, 1)
        assert self.load(tier, 1) == (self.bytes_of(1), None)

    def test_damage_is_found_after_reopening_too(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        self.damage(tier, key_of(1))
        tier = self.reopen(tier)
        data, error = self.load(tier, 1)
        assert data is None
        assert isinstance(error, TierCorrupt | TierUnavailable)
        assert self.contents(tier, 1) == [False]

    # ---- failures ---------------------------------------------------------------------------------------------

    def test_what_is_not_there_cannot_be_loaded(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        assert isinstance(self.load(tier, 2)[1], TierUnavailable)

    def test_a_load_of_another_size_fails_and_never_lies(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        for num_bytes in (1, self.payload_bytes - 1, self.payload_bytes + 1):
            data, error = self.load(tier, 1, num_bytes)
            assert data is None
            assert isinstance(error, TierUnavailable)
        assert self.load(tier, 1) == (self.bytes_of(1), None)

    def test_a_submit_that_raised_has_no_result_and_may_come_again(self) -> None:
        tier = self.open()
        release = self.held(tier)
        accepted: list[TierJob] = []
        refused = None
        while refused is None and len(accepted) < 2000:
            job = self.store_job(len(accepted), b"x")
            try:
                tier.submit_store(job)
            except TierBusy:
                refused = job
            else:
                accepted.append(job)
        assert refused is not None, "2,000 jobs wait: a queue must have an end"
        release()
        self.wait(tier, *accepted)
        self.settle(tier)
        tier.submit_store(refused)
        assert self.wait(tier, refused)[refused.job_id].ok

    def test_a_medium_that_refuses_writes_fails_stores_alone(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        self.refuse_writes(tier)
        job = self.store_job(2)
        try:
            tier.submit_store(job)
        except TierError:
            pass
        else:
            assert isinstance(self.wait(tier, job)[job.job_id].error, TierUnavailable)
        assert self.contents(tier, 1, 2) == [True, False]
        assert self.load(tier, 1) == (self.bytes_of(1), None)
        tier.check_integrity()

    def test_a_medium_that_refuses_writes_is_told(self) -> None:
        tier = self.open()
        self.refuse_writes(tier)
        job = self.store_job(1)
        tier.submit_store(job)
        self.wait(tier, job)
        assert not tier.stats().is_up

    # ---- asking -----------------------------------------------------------------------------------------------

    def test_contains_answers_for_each_key_in_order(self) -> None:
        tier = self.open()
        self.store(tier, 1, 3)
        assert self.contents(tier, 3, 2, 1, 3, 4) == [True, False, True, True, False]
        assert tier.contains([]) == []

    def test_keys_are_what_contains_says_yes_to(self) -> None:
        tier = self.open()
        self.store(tier, *range(6))
        tier.remove([key_of(2)])
        assert Counter(tier.keys()) == Counter(key_of(number) for number in (0, 1, 3, 4, 5))
        assert all(tier.contains(tier.keys()))
        assert tier.stats().num_chunks == 5

    def test_a_chunk_is_not_there_before_it_is_stored(self) -> None:
        tier = self.open()
        release = self.held(tier)
        job = self.store_job(1)
        tier.submit_store(job)
        assert self.contents(tier, 1) == [False]
        assert tier.keys() == []
        release()
        self.wait(tier, job)
        assert self.contents(tier, 1) == [True]

    def test_stats_count_jobs_without_a_result(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        release = self.held(tier)
        jobs = [self.store_job(2), self.load_job(1)]
        tier.submit_store(jobs[0])
        tier.submit_load(jobs[1])
        assert tier.stats().num_queued == 2
        release()
        self.wait(tier, *jobs)
        assert tier.stats().num_queued == 0

    def test_stats_count_bytes(self) -> None:
        tier = self.open()
        empty_bytes = tier.stats().used_bytes
        self.store(tier, 1, 2)
        used_bytes = tier.stats().used_bytes
        assert used_bytes >= empty_bytes + 2 * self.payload_bytes
        tier.remove([key_of(1), key_of(2)])
        self.settle(tier)
        assert tier.stats().used_bytes < used_bytes - self.payload_bytes

    def test_chunks_that_can_be_stored_fit(self) -> None:
        self.open().check_fits(self.payload_bytes)

    def test_no_call_waits_for_a_job(self) -> None:
        tier = self.open()
        self.store(tier, 1, 2)
        release = self.held(tier)
        jobs = [self.store_job(3), self.store_job(4), self.load_job(1)]

        def use() -> None:
            tier.submit_store(jobs[0])
            tier.submit_store(jobs[1])
            tier.submit_load(jobs[2])
            assert tier.poll() == []
            tier.contains([key_of(1)])
            tier.keys()
            tier.touch([key_of(2)])
            tier.remove([key_of(3)])
            tier.take_lost()
            tier.stats()
            tier.check_integrity()
            tier.clear()

        self.assert_quick(use, release)
        release()
        self.wait(tier, *jobs)

    # ---- touch, quota -----------------------------------------------------------------------------------------

    def test_touching_unknown_keys_is_ignored(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        tier.touch([key_of(7), key_of(1), key_of(8)])
        tier.touch([])
        assert tier.keys() == [key_of(1)]
        tier.check_integrity()

    def test_the_quota_is_kept_at_every_moment(self) -> None:
        max_bytes = self.quota(3)
        tier = self.open(max_bytes=max_bytes)
        assert tier.stats().max_bytes == max_bytes
        for number in range(8):
            self.store(tier, number)
            stats = tier.stats()
            assert stats.used_bytes <= max_bytes
            assert stats.num_chunks == len(tier.keys()) == min(number + 1, 3)
            assert self.contents(tier, number) == [True]
            tier.check_integrity()

    def test_a_quota_below_one_chunk_is_refused(self) -> None:
        try:
            self.open(max_bytes=self.quota(1) - 1).check_fits(self.payload_bytes)
        except ConfigError:
            return
        raise AssertionError("a chunk that could never be stored is said to fit")

    def test_a_quota_of_one_chunk_works(self) -> None:
        tier = self.open(max_bytes=self.quota(1))
        tier.check_fits(self.payload_bytes)
        self.store(tier, 1, 2)
        assert self.contents(tier, 1, 2) == [False, True]

    def test_the_least_recently_used_goes_first(self) -> None:
        tier = self._full()
        self.store(tier, 3)
        assert self.contents(tier, 0, 1, 2, 3) == [False, True, True, True]

    def test_touched_chunks_stay_and_the_last_counts_as_the_most_recent(self) -> None:
        tier = self._full()
        tier.touch([key_of(0), key_of(2)])
        tier.touch([key_of(1), key_of(0)])
        self.store(tier, 3)
        assert self.contents(tier, 0, 1, 2, 3) == [True, True, False, True]
        self.store(tier, 4)
        assert self.contents(tier, 0, 1, 2, 3, 4) == [True, False, False, True, True]

    def _full(self) -> Tier:
        """With chunks 0, 1 and 2."""
        if not self.evicts_least_recent:
            raise SkipTest("the tier has another order (evicts_least_recent)")
        tier = self.open(max_bytes=self.quota(3))
        self.store(tier, 0, 1, 2)
        return tier

    def test_evicted_chunks_are_told_once_with_the_reason(self) -> None:
        tier = self.open(max_bytes=self.quota(2))
        self.store(tier, 0, 1, 2)
        lost = tier.take_lost()
        assert len(lost) == 1
        assert self.contents(tier, 0, 1, 2).count(False) == 1
        assert tier.contains([lost[0][0]]) == [False]
        assert lost[0][1]
        assert tier.take_lost() == []
        assert tier.stats().num_evicted == 1

    def test_what_is_evicted_is_gone_for_good(self) -> None:
        max_bytes = self.quota(2)
        tier = self.open(max_bytes=max_bytes)
        self.store(tier, 0, 1, 2)
        there = set(tier.keys())
        tier = self.reopen(tier, max_bytes=max_bytes)
        assert set(tier.keys()) == there

    def test_a_lowered_quota_is_kept_after_reopening(self) -> None:
        tier = self.open(max_bytes=self.quota(4))
        self.store(tier, 0, 1, 2, 3)
        tier = self.reopen(tier, max_bytes=self.quota(2))
        assert len(tier.keys()) == 2
        assert tier.stats().used_bytes <= self.quota(2)

    # ---- remove, clear ----------------------------------------------------------------------------------------

    def test_removed_chunks_are_misses_at_once(self) -> None:
        tier = self.open()
        self.store(tier, 1, 2)
        tier.remove([key_of(1)])
        assert self.contents(tier, 1, 2) == [False, True]
        assert isinstance(self.load(tier, 1)[1], TierUnavailable)
        assert self.load(tier, 2) == (self.bytes_of(2), None)
        tier.check_integrity()

    def test_removing_unknown_keys_is_ignored(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        tier.remove([key_of(7), key_of(7)])
        tier.remove([])
        assert tier.keys() == [key_of(1)]

    def test_a_removed_chunk_can_be_stored_again(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        tier.remove([key_of(1)])
        self.settle(tier)
        self.store(tier, 1)
        assert self.load(tier, 1) == (self.bytes_of(1), None)

    def test_removed_and_cleared_chunks_are_no_losses(self) -> None:
        tier = self.open()
        self.store(tier, 1, 2, 3)
        tier.take_lost()
        tier.remove([key_of(1)])
        tier.clear()
        self.settle(tier)
        assert tier.take_lost() == []

    def test_removed_chunks_stay_away_after_reopening(self) -> None:
        tier = self.open()
        self.store(tier, 1, 2)
        tier.remove([key_of(1)])
        assert self.reopen(tier).keys() == [key_of(2)]

    def test_a_store_that_is_removed_meanwhile_fails(self) -> None:
        self._gone_while_stored(lambda tier: tier.remove([key_of(1)]))

    def test_a_store_under_way_when_all_is_cleared_fails(self) -> None:
        self._gone_while_stored(lambda tier: tier.clear())

    def _gone_while_stored(self, forget: Callable[[Tier], object]) -> None:
        tier = self.open()
        release = self.held(tier)
        job = self.store_job(1)
        tier.submit_store(job)
        forget(tier)
        release()
        assert isinstance(self.wait(tier, job)[job.job_id].error, TierUnavailable)
        self.settle(tier)
        assert self.contents(tier, 1) == [False]
        assert tier.keys() == []
        tier.check_integrity()
        self.store(tier, 1)
        assert self.load(tier, 1) == (self.bytes_of(1), None)

    def test_a_load_that_is_removed_meanwhile_ends_once_and_never_lies(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        release = self.held(tier)
        job = self.load_job(1)
        tier.submit_load(job)
        tier.remove([key_of(1)])
        release()
        result = self.wait(tier, job)[job.job_id]
        assert isinstance(result.error, TierUnavailable) or bytes(job.buffer) == self.bytes_of(1)
        assert self.contents(tier, 1) == [False]
        self.settle(tier)
        tier.check_integrity()

    def test_clear_drops_everything_and_says_how_much(self) -> None:
        tier = self.open()
        self.store(tier, 1, 2, 3)
        receipt = tier.clear()
        assert (receipt.tier, receipt.num_chunks) == (tier.name, 3)
        assert receipt.payload_bytes >= 3 * self.payload_bytes
        assert tier.keys() == []
        assert self.contents(tier, 1, 2, 3) == [False, False, False]
        self.settle(tier)
        tier.check_integrity()

    def test_clearing_an_empty_tier_drops_nothing(self) -> None:
        receipt = self.open().clear()
        assert (receipt.num_chunks, receipt.payload_bytes) == (0, 0)

    def test_a_cleared_tier_is_empty_after_reopening(self) -> None:
        tier = self.open()
        self.store(tier, 1, 2)
        tier.clear()
        assert self.reopen(tier).keys() == []

    # ---- reopening --------------------------------------------------------------------------------------------

    def test_chunks_and_keys_are_there_after_reopening(self) -> None:
        tier = self.open()
        self.store(tier, 1, 2, 3)
        for _ in range(2):
            tier = self.reopen(tier)
            assert Counter(tier.keys()) == Counter(key_of(number) for number in (1, 2, 3))
            assert self.load(tier, 2) == (self.bytes_of(2), None)
            assert tier.take_lost() == []
            tier.check_integrity()

    def test_another_namespace_sees_none_of_it_and_clears_its_own_alone(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        tier = self.reopen(tier, namespace=OTHER_NAMESPACE)
        assert tier.keys() == []
        assert self.contents(tier, 1) == [False]
        assert self.load(tier, 1)[0] is None
        self.store(tier, 2)
        assert tier.clear().num_chunks == 1
        tier = self.reopen(tier)
        assert tier.keys() == [key_of(1)]
        assert self.load(tier, 1) == (self.bytes_of(1), None)

    # ---- drain, close -----------------------------------------------------------------------------------------

    def test_after_draining_all_results_can_be_polled(self) -> None:
        tier = self.open()
        jobs = [self.store_job(number) for number in range(5)]
        for job in jobs:
            tier.submit_store(job)
        assert tier.drain(self.wait_s)
        assert sorted(result.job_id for result in tier.poll()) == [job.job_id for job in jobs]

    def test_an_idle_tier_is_drained_at_once(self) -> None:
        tier = self.open()
        assert tier.drain(0.0)
        self.store(tier, 1)
        assert tier.drain(self.wait_s)

    def test_draining_ends_at_its_time_limit(self) -> None:
        tier = self.open()
        release = self.held(tier)
        job = self.store_job(1)
        tier.submit_store(job)
        self.assert_quick(lambda: self._drain_in_vain(tier), release)
        release()
        self.wait(tier, job)

    def _drain_in_vain(self, tier: Tier) -> None:
        assert not tier.drain(0.05), "it says that a job that is held has ended"

    def test_closing_an_unused_tier_twice(self) -> None:
        tier = self.open()
        tier.close()
        tier.close()
        self._assert_closed(tier)

    def test_a_closed_tier_has_nothing_and_takes_nothing(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        tier.close()
        self._assert_closed(tier)

    def _assert_closed(self, tier: Tier) -> None:
        assert self.contents(tier, 1) == [False]
        assert tier.keys() == []
        assert tier.poll() == []
        for submit, job in ((tier.submit_store, self.store_job(1)), (tier.submit_load, self.load_job(1))):
            try:
                submit(job)
            except TierUnavailable:
                continue
            raise AssertionError("a closed tier took a job")
        assert tier.poll() == []

    def test_results_that_were_not_polled_are_there_after_closing(self) -> None:
        tier = self.open()
        jobs = [self.store_job(number) for number in range(3)]
        for job in jobs:
            tier.submit_store(job)
        tier.drain(self.wait_s)
        tier.close()
        for result in self.wait(tier, *jobs).values():
            assert result.ok or isinstance(result.error, TierUnavailable)

    def test_closing_ends_jobs_under_way_once_each(self) -> None:
        tier = self.open()
        self.store(tier, 1)
        release = self.held(tier)
        jobs = [self.store_job(number) for number in range(2, 6)] + [self.load_job(1)]
        for job in jobs:
            (tier.submit_load if job.digest is None else tier.submit_store)(job)
        timer = threading.Timer(0.2, release)
        timer.start()
        started_s = time.monotonic()
        tier.close()
        tier.close()
        assert time.monotonic() - started_s < 15, "a few seconds at most"
        timer.join()
        results = self.wait(tier, *jobs)
        for result in results.values():
            assert result.ok or isinstance(result.error, TierUnavailable)
        stored = {result.key for result in results.values() if result.ok} - {key_of(1)}
        tier = self.reopen(tier)
        assert set(tier.keys()) == {key_of(1)} | stored, "what was reported is what is there"

    def test_closing_lets_go_of_threads_and_descriptors(self) -> None:
        self.open().close()  # what is made once per process is there now
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        tier = self.open()
        self.store(tier, 1, 2)
        self.load(tier, 1)
        tier.close()
        deadline_s = time.monotonic() + min(self.wait_s, 10.0)
        while any(map(gt, after := (threading.active_count(), len(os.listdir("/proc/self/fd"))), before)):
            assert time.monotonic() < deadline_s, f"threads and descriptors: {before} before, {after} after"
            time.sleep(0.01)

    # ---- all at once ------------------------------------------------------------------------------------------

    def test_a_random_walk_never_loads_wrong_bytes(self) -> None:
        print("seed", self.SEED)
        rng = random.Random(self.SEED)
        tier = self.open()
        waiting: dict[int, TierJob] = {}
        for _ in range(400):
            number = rng.randrange(12)
            action = rng.choice(("store", "store", "load", "load", "remove", "touch", "poll", "poll", "clear"))
            if action in ("store", "load"):
                job = self.store_job(number) if action == "store" else self.load_job(number)
                try:
                    (tier.submit_store if action == "store" else tier.submit_load)(job)
                except TierError:
                    continue
                waiting[job.job_id] = job
            elif action == "clear" and rng.random() < 0.2:
                tier.clear()
            elif action == "poll":
                self._check_results(tier.poll(), waiting)
            else:
                (tier.remove if action == "remove" else tier.touch)([key_of(number)])
            tier.check_integrity()
        assert tier.drain(self.wait_s)
        self._check_results(tier.poll(), waiting)
        assert not waiting
        keys = tier.keys()
        for key in keys:
            job = TierJob(1, key, memoryview(bytearray(self.payload_bytes)))
            tier.submit_load(job)
            assert self.wait(tier, job)[1].ok
            assert bytes(job.buffer) == payload_of(key, self.payload_bytes)

    def _check_results(self, results: Sequence[TierResult], waiting: dict[int, TierJob]) -> None:
        for result in results:
            job = waiting.pop(result.job_id)
            assert bytes(job.buffer) == payload_of(job.key, self.payload_bytes) or not result.ok
