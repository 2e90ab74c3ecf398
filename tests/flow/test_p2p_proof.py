"""A bit that flips in a hand-over's bytes never reaches a token: over shared memory, in both modes, on both runners.

The stub model turns one wrong KV byte into another token, and says what is right without any engine.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import pytest
from tests.flow.test_p2p import MODES, PROMPT, Cluster, cluster, expected, scheduler_side, tokens

from kvferry import LLM
from kvferry.engine.kv_groups import layer_name
from kvferry.p2p.transports import shm
from kvferry.p2p.transports.shm import ShmTransport
from kvferry.p2p.transports.threaded import Step, Transfer
from kvferry.p2p.transports.transport import TransferOp
from kvferry.testing.stub_model import StubModel

__all__ = ["cluster"]  # the fixture

pytestmark = pytest.mark.usefixtures("runner")

NUM_TOKENS = len(PROMPT)  # 50: twelve whole blocks of 4, and half of one


def flip(llm: LLM, params: dict[str, Any], token: int, *, layer: int = 1, group: int = 0) -> None:
    """One bit of one token's KV, in the memory of the prefill engine."""
    pages = llm.kv_caches[layer_name(layer)]
    block_tokens = pages.shape[2]
    block = params["remote_block_ids"][group][token // block_tokens]
    element = pages[block, 0, token % block_tokens, 0:1]
    address = element.data_ptr()
    ctypes.c_uint8.from_address(address).value ^= 0x04


def failures(llm: LLM) -> dict[str, int]:
    stats = scheduler_side(llm).get_kv_connector_stats()
    return stats.media["p2p"].failures


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("token", [0, 3, 4, 27, 47, 48, 49])
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_bit_that_flips_at_the_prefill_engine_never_reaches_a_token(
    cluster: Cluster, mode: str, token: int, policy: str
) -> None:
    prefill, decode = cluster.start(mode=mode), cluster.start(mode=mode, policy=policy)
    params = cluster.prefill(prefill, "p")
    flip(prefill, params, token)
    cluster.add(decode, "d", params)
    (output,) = cluster.finish("d")
    assert failures(decode) == {"load TransferCorrupt": 1}
    if policy == "fail":
        assert output.outputs[0].finish_reason == "error"
        assert not tokens(output)
    else:
        assert tokens(output) == expected(PROMPT, 8)
        assert output.num_cached_tokens == 0
        assert output.kv_transfer_params is not None
        assert "another digest" in output.kv_transfer_params["load_error"]
    cluster.add(decode, "again", None)
    (output,) = cluster.finish("again")
    assert tokens(output) == expected(PROMPT, 8), "nothing of it was cached"
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
def test_tokens_that_are_not_handed_over_do_not_count(cluster: Cluster, mode: str) -> None:
    prefill, decode = cluster.start(mode=mode), cluster.start(mode=mode)
    params = cluster.prefill(prefill, "p")
    flip(prefill, params, NUM_TOKENS)  # beside the last token, in its block
    cluster.add(decode, "d", params)
    (output,) = cluster.finish("d")
    assert (tokens(output), output.num_cached_tokens) == (expected(PROMPT, 8), NUM_TOKENS)
    assert not failures(decode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("off", ["prefill", "decode"])
def test_where_either_engine_does_not_prove_the_bit_reaches_the_tokens(cluster: Cluster, mode: str, off: str) -> None:
    """What the setting costs: that these tests can fail is seen here."""
    prefill = cluster.start(mode=mode, verify_loads=off != "prefill")
    decode = cluster.start(mode=mode, verify_loads=off != "decode")
    params = cluster.prefill(prefill, "p")
    flip(prefill, params, 27)
    cluster.add(decode, "d", params)
    (output,) = cluster.finish("d")
    assert tokens(output) != expected(PROMPT, 8)
    assert not failures(decode)


class Spoiling(ShmTransport):
    """Reports success, and has spoilt the last byte of what it moved."""

    def _advance(self, transfer: Transfer) -> Step:
        step = super()._advance(transfer)
        if step is Step.DONE:
            bases = self._bases if transfer.op is TransferOp.READ else transfer.peer.bases  # type: ignore[attr-defined]
            pieces = transfer.pieces
            start = int(bases[pieces.destination_region[-1]] + pieces.destination_offset[-1])
            ctypes.c_uint8.from_address(start + int(pieces.length[-1]) - 1).value ^= 1
        return step


@pytest.mark.parametrize("mode", MODES)
def test_a_transport_that_spoils_a_byte_and_reports_success_is_found_out(
    cluster: Cluster, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "ShmTransport", Spoiling)
    prefill, decode = cluster.start(mode=mode), cluster.start(mode=mode)
    cluster.add(decode, "d", cluster.prefill(prefill, "p"))
    (output,) = cluster.finish("d")
    assert tokens(output) == expected(PROMPT, 8)
    assert failures(decode) == {"load TransferCorrupt": 1}
    cluster.check_idle()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_groups_with_windows_are_proved(cluster: Cluster, mode: str, layer: int) -> None:
    windows = (8, 8, None)
    prefill, decode = (cluster.start(mode=mode, model=StubModel(windows=windows)) for _ in range(2))
    answer = StubModel(windows=windows).expected_tokens(PROMPT, 8)
    params = cluster.prefill(prefill, "p")
    group = next(
        i for i, found in enumerate(prefill.scheduler.manager.groups) if layer_name(layer) in found.layer_names
    )
    cluster.add(decode, "good", params)
    (output,) = cluster.finish("good")
    assert (tokens(output), failures(decode)) == (answer, {})
    decode.reset_prefix_cache()
    params = cluster.prefill(prefill, "p2")
    flip(prefill, params, 48, layer=layer, group=group)
    cluster.add(decode, "d", params)
    (output,) = cluster.finish("d")
    assert tokens(output) == answer
    assert failures(decode) == {"load TransferCorrupt": 1}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_prompt", [49, 52, 40])
def test_a_prompt_of_another_length_is_proved_too(cluster: Cluster, mode: str, num_prompt: int) -> None:
    prompt = [*PROMPT, 7, 8][:num_prompt]
    prefill, decode = cluster.start(mode=mode), cluster.start(mode=mode)
    for name, spoils in (("good", False), ("bad", True)):
        params = cluster.prefill(prefill, f"p-{name}")
        if spoils:
            flip(prefill, params, 38)
        cluster.add(decode, name, params, prompt)
        (output,) = cluster.finish(name)
        assert tokens(output) == expected(prompt, 8)
        assert failures(decode) == ({"load TransferCorrupt": 1} if spoils else {})
        decode.reset_prefix_cache()


@pytest.mark.parametrize("mode", MODES)
def test_a_prefill_that_went_on_is_proved(cluster: Cluster, mode: str) -> None:
    """Blocks of the prompt keep the digests of the step that ended it."""
    prefill, decode = cluster.start(mode=mode), cluster.start(mode=mode)
    params = cluster.prefill(prefill, "p", max_tokens=9)
    flip(prefill, params, 27)
    cluster.add(decode, "d", params, [*PROMPT, *expected(PROMPT, 8)])
    cluster.finish("d")
    assert failures(decode) == {"load TransferCorrupt": 1}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("num_tokens", "token"), [(49, 48), (54, 52), (54, 53), (58, 49), (51, 48)])
def test_a_block_that_is_wanted_in_part_is_proved_by_what_it_was_as_a_whole(
    cluster: Cluster, mode: str, num_tokens: int, token: int
) -> None:
    """The prefill engine has digests of others of its tokens; those of the part are made when they are asked for."""
    sequence = [*PROMPT, *expected(PROMPT, 8)]
    prefill, decode = cluster.start(mode=mode), cluster.start(mode=mode)
    for name, spoils in (("good", False), ("bad", True)):
        params = cluster.prefill(prefill, f"p-{name}", max_tokens=9)
        cluster.until(lambda: not scheduler_side(prefill).has_pending_push_work())  # its digests are made
        if spoils:
            flip(prefill, params, token)
        cluster.add(decode, name, params, sequence[:num_tokens])
        (output,) = cluster.finish(name)
        assert tokens(output) == expected(sequence[:num_tokens], 8)
        assert output.num_external_tokens == (0 if spoils else num_tokens)
        assert failures(decode) == ({"load TransferCorrupt": 1} if spoils else {})
        decode.reset_prefix_cache()


@pytest.mark.parametrize("mode", MODES)
def test_caches_that_are_cut_in_another_way_are_not_proved_which_the_log_says_once(
    cluster: Cluster, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = cluster.start(mode=mode, block_size=8), cluster.start(mode=mode)
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b"):
            cluster.add(decode, name, cluster.prefill(prefill, f"p-{name}"))
            (output,) = cluster.finish(name)
            assert (tokens(output), output.num_cached_tokens) == (expected(PROMPT, 8), NUM_TOKENS)
            decode.reset_prefix_cache()
    assert caplog.text.count("is not proved (verify_loads)") == 1
