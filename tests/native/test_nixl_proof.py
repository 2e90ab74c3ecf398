"""A bit that flips in a hand-over's bytes never reaches a token, over the real NIXL library. `make test-native`."""

from __future__ import annotations

import pytest
from tests.flow.test_p2p import MODES, PROMPT, Cluster, cluster, expected, tokens
from tests.flow.test_p2p_proof import failures, flip

__all__ = ["cluster"]  # the fixture


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("token", [0, 27, 49])
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_bit_that_flips_at_the_prefill_engine_never_reaches_a_token(
    cluster: Cluster, mode: str, token: int, policy: str
) -> None:
    prefill = cluster.start(mode=mode, transport="nixl")
    decode = cluster.start(mode=mode, policy=policy, transport="nixl")
    cluster.add(decode, "good", cluster.prefill(prefill, "p"))
    (output,) = cluster.finish("good")
    assert (tokens(output), output.num_external_tokens, failures(decode)) == (expected(PROMPT, 8), len(PROMPT), {})
    decode.reset_prefix_cache()
    params = cluster.prefill(prefill, "p2")
    flip(prefill, params, token)
    cluster.add(decode, "bad", params)
    (output,) = cluster.finish("bad")
    assert failures(decode) == {"load TransferCorrupt": 1}
    assert tokens(output) == ([] if policy == "fail" else expected(PROMPT, 8))
