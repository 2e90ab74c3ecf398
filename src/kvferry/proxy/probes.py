"""Tiny requests through each pair of engines: readiness means that KV moves, and engines come back by themselves."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from contextlib import suppress

from kvferry.http import ApiError
from kvferry.proxy.bodies import ClientCall
from kvferry.proxy.config import ProxyConfig
from kvferry.proxy.fleet import Engine, Fleet
from kvferry.proxy.legs import LegFailed, LegRefused
from kvferry.proxy.relay import Relay

logger = logging.getLogger(__name__)

_NUM_TOKENS = 64  # some blocks' worth, new each time, so that they are in nobody's cache
_TOKENS = range(16, 256)  # in any vocabulary, and seldom special


async def probe_for_ever(config: ProxyConfig, fleet: Fleet, relay: Relay, headers: Mapping[str, str]) -> None:
    """All pairs that need it, again and again, until cancelled, whatever comes of one."""
    pause_s = min(config.min_backoff_s, config.probe_interval_s)
    while True:
        probes = [probe(fleet, relay, *engines, headers) for engines in fleet.pairs_to_probe()]
        fleet.doubted.clear()
        fleet.doubts_came.clear()
        for error in filter(None, await asyncio.gather(*probes, return_exceptions=True)):
            logger.error("a probe raised an unexpected error", exc_info=error)
        await asyncio.sleep(pause_s)
        with suppress(TimeoutError):
            await asyncio.wait_for(fleet.doubts_came.wait(), config.probe_interval_s - pause_s)


async def probe(fleet: Fleet, relay: Relay, prefill: Engine, decode: Engine, headers: Mapping[str, str]) -> None:
    """One request through one pair, in rotation or not; what comes of it is noted where all requests' outcomes are."""
    prompt = random.choices(_TOKENS, k=_NUM_TOKENS)
    call = ClientCall("/v1/completions", {"prompt": prompt, "max_tokens": 2, "temperature": 0}, headers)
    hand_over = None
    try:
        hand_over = await relay.prefill(call, prefill, [], "probe_timeout_s")
        await (await relay.decode(call, decode, hand_over, "probe_timeout_s")).aclose()
    except (ApiError, LegFailed) as err:
        relay.give_back(hand_over)
        logger.debug("probe of %s and %s: %s", prefill.url, decode.url, err)
    except LegRefused as refused:
        relay.give_back(hand_over)
        is_for_key = refused.reply.status in (401, 403)
        remedy = (
            "give its API key with --engine-key-file or --probe-key-file"
            if is_for_key
            else "--probe-interval-s 0 switches probes off"
        )
        fleet.probe_refused(fleet.pairs[prefill, decode], f"a probe was refused by {refused}: {remedy}")
