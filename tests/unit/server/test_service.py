"""The bridge between asyncio and the engine's thread: all jobs or none, nothing left behind, every waiter answered."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch

from kvferry import LLM, SamplingParams
from kvferry.clock import FakeClock
from kvferry.engine import RequestOutputKind
from kvferry.errors import ConfigError
from kvferry.metrics import Metrics
from kvferry.server.service import EngineJob, EngineService, EngineStopped, Overloaded
from kvferry.testing.stub_model import StubModel

PROMPT = [1, 2, 3, 4, 5]


class GatedModel(StubModel):
    """Forwards wait while the gate is closed."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.gate.set()

    def forward(self, *arguments):
        self.entered.set()
        assert self.gate.wait(20)
        return super().forward(*arguments)


def job(max_tokens=4, prompt=PROMPT):
    return EngineJob(
        list(prompt), SamplingParams(max_tokens=max_tokens, temperature=0, output_kind=RequestOutputKind.DELTA)
    )


async def tokens_of(generation):
    found = {}
    async for index, output in generation:
        found.setdefault(index, []).extend(output.outputs[0].token_ids)
    return found


def run(scenario, max_unfinished=4, clock=None):
    """Run `scenario(service, llm)` and end the service."""
    torch.set_num_threads(1)
    llm = LLM(GatedModel(), num_kv_blocks=200, clock=clock)
    service = EngineService(llm, Metrics("m"), max_unfinished)

    async def main():
        service.start()
        try:
            await asyncio.wait_for(scenario(service, llm), 30)
        finally:
            llm._model.gate.set()
            await asyncio.wait_for(service.close(), 30)

    asyncio.run(main())
    assert not service._thread.is_alive()
    assert not llm.scheduler.has_unfinished_requests() or service.refusal is not None


async def poke(service):
    """Wake the engine up until it is gone."""
    while True:
        await service.call(lambda: None)


async def settled(llm):
    """Wait until the engine has nothing to do."""
    deadline_s = time.monotonic() + 20
    while llm.scheduler.has_unfinished_requests():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.001)


def test_jobs_of_one_client_come_together():
    async def scenario(service, llm):
        generation = await service.submit([job(4), job(7, [9, 8, 7])])
        model = StubModel()
        assert await tokens_of(generation) == {
            0: model.expected_tokens(PROMPT, 4),
            1: model.expected_tokens([9, 8, 7], 7),
        }
        assert generation.is_done
        assert service.num_unfinished == 0
        generation.close()

    run(scenario)


def test_one_bad_job_stops_all_of_them():
    async def scenario(service, llm):
        with pytest.raises(ConfigError, match="not a token id"):
            await service.submit([job(), job(prompt=[10**6]), job()])
        assert service.num_unfinished == 0
        await settled(llm)
        llm.scheduler.check_integrity()

    run(scenario)


def test_client_that_goes_before_the_engine_took_its_job():
    async def scenario(service, llm):
        llm._model.gate.clear()
        first = await service.submit([job()])
        while not llm._model.entered.is_set():
            await asyncio.sleep(0.001)
        waiting = asyncio.ensure_future(service.submit([job(), job()]))  # the engine is in a step
        await asyncio.sleep(0)
        assert service.num_unfinished == 3
        with pytest.raises(Overloaded, match="3 unfinished requests of at most 4"):
            await service.submit([job(), job()])
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert service.num_unfinished == 1
        llm._model.gate.set()
        assert await tokens_of(first) == {0: StubModel().expected_tokens(PROMPT, 4)}
        await settled(llm)

    run(scenario)


def test_closed_generation_is_aborted_and_silent():
    async def scenario(service, llm):
        generation = await service.submit([job(1000)])
        await anext(generation)
        generation.close()
        generation.close()
        assert [item async for item in generation] == []
        assert service.num_unfinished == 0
        await settled(llm)

    run(scenario)


def test_end_of_the_engine_reaches_every_waiter():
    async def scenario(service, llm):
        llm._model.gate.clear()
        generation = await service.submit([job()])
        while not llm._model.entered.is_set():
            await asyncio.sleep(0.001)
        calling = asyncio.ensure_future(service.call(lambda: 1))
        await asyncio.sleep(0)
        llm._model.forward = None  # the step after this one fails
        llm._model.gate.set()
        assert await calling == 1
        with pytest.raises(EngineStopped, match="the engine failed: TypeError"):
            await tokens_of(generation)
        assert service.has_ended
        for order in (service.submit([job()]), service.call(lambda: 1), service.reset_prefix_cache(False)):
            with pytest.raises(EngineStopped):
                await order

    run(scenario)


def test_refusing_new_requests_lets_the_old_ones_end():
    async def scenario(service, llm):
        generation = await service.submit([job(30)])
        service.refuse_new("going home")
        with pytest.raises(EngineStopped, match="going home"):
            await service.submit([job()])
        assert await tokens_of(generation) == {0: StubModel().expected_tokens(PROMPT, 30)}
        assert not service.has_ended

    run(scenario)


def test_broken_bookkeeping_ends_the_engine_rather_than_answer_wrongly():
    clock = FakeClock()

    async def scenario(service, llm):
        await tokens_of(await service.submit([job()]))
        await service.call(lambda: llm.scheduler.manager.block_pool.blocks[7].__setattr__("ref_cnt", -1))
        clock.advance(60)
        with pytest.raises(EngineStopped, match="AssertionError"):
            await poke(service)

    run(scenario, clock=clock)
