"""When who fails is left alone, and when tried again."""

from __future__ import annotations

from kvferry.clock import FakeClock
from kvferry.proxy.breaker import EngineBreaker, State


def make(threshold: int = 3) -> tuple[EngineBreaker, FakeClock]:
    clock = FakeClock()
    return EngineBreaker(clock, threshold, 1.0, 4.0), clock


def open_it(breaker: EngineBreaker) -> None:
    while breaker.state is not State.OPEN:
        breaker.failed()


def test_opens_at_failures_in_a_row_only() -> None:
    breaker, _ = make()
    assert [breaker.failed(), breaker.failed()] == [False, False]
    breaker.succeeded()
    assert [breaker.failed(), breaker.failed()] == [False, False]
    assert breaker.is_available
    assert breaker.failed(), "the third in a row opened it"
    assert not breaker.is_available


def test_one_trial_at_a_time_after_the_backoff() -> None:
    breaker, clock = make()
    open_it(breaker)
    clock.advance(0.999)
    assert not breaker.is_available
    assert 0 < breaker.wait_s < 0.002
    clock.advance(0.001)
    assert breaker.is_available
    assert breaker.begin(), "this one finds out"
    assert not breaker.is_available, "nobody else"
    breaker.succeeded()
    assert breaker.is_available
    assert not breaker.begin(), "in the closed state nobody is on trial"


def test_backoff_doubles_up_to_its_limit_and_starts_anew_after_success() -> None:
    breaker, clock = make(threshold=1)
    waits = []
    for _ in range(4):
        breaker.failed()
        waits.append(breaker.wait_s)
        clock.advance(breaker.wait_s)
        breaker.begin()
    assert waits == [1, 2, 4, 4]
    breaker.succeeded()
    breaker.failed()
    assert breaker.wait_s == 1


def test_abandoned_trial_lets_the_next_one_try() -> None:
    breaker, clock = make(threshold=1)
    breaker.failed()
    clock.advance(1)
    breaker.abandoned(breaker.begin())
    assert breaker.state is State.OPEN
    assert breaker.is_available


def test_end_of_an_earlier_trial_is_not_the_end_of_the_one_under_way() -> None:
    breaker, clock = make(threshold=1)
    breaker.failed()
    clock.advance(1)
    stream = breaker.begin()
    bystander = breaker.begin()
    breaker.succeeded()
    breaker.failed()
    clock.advance(1)
    trial = breaker.begin()
    for ended in (stream, bystander):
        breaker.abandoned(ended)
        assert breaker.state is State.TRIAL
    breaker.failed()
    assert breaker.wait_s == 2, "doubled: the trial found out that it does not work"
    breaker.abandoned(trial)
    assert breaker.state is State.OPEN


def test_straggler_that_fails_while_open_does_not_prolong_it() -> None:
    breaker, clock = make(threshold=1)
    breaker.failed()
    clock.advance(0.5)
    assert not breaker.failed()
    assert breaker.wait_s == 0.5
