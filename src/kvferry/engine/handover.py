"""First tokens that a prefill engine chose already: a decode engine need not compute the last of the prompt again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from kvferry.contract.base import CacheHitSource
from kvferry.contract.views import RequestView
from kvferry.engine.request import Request, SampledToken
from kvferry.kv.keys import HANDOVER, Identity, KeyChain, TokenDigests, first_tokens_digest

logger = logging.getLogger(__name__)


def handed_over_tokens(request: Request, vocab_size: int) -> tuple[int, ...]:
    """What the prefill engine that the request names chose; nothing when that is no list of token ids of this model.

    Nothing as well when another engine chose them, or that one in another life, behind another prompt, or under other
    sampling settings, and when log probabilities are asked for: only who computes the token knows them.
    """
    params = request.kv_transfer_params
    if not isinstance(params, dict) or not params.get("do_remote_prefill"):
        return ()
    tokens = params.get("remote_first_token_ids")
    if not isinstance(tokens, list | tuple) or not tokens or request.sampling_params.logprobs is not None:
        return ()
    if not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        return ()
    digest = _digest(request, tokens, params.get("remote_generation"))
    if digest is not None and digest == params.get("remote_first_tokens_digest"):
        return tuple(tokens)
    logger.info(
        "%s: the first token is computed here: remote_first_token_ids were not sampled behind this prompt and under "
        "these sampling settings", request.request_id,
    )  # fmt: skip
    return ()


def _digest(request: Request, tokens: Sequence[int], generation: object) -> str | None:
    """As the prefill engine's connector makes it; None when the tokens do not tell the prompt, or no life is named.

    That life (`generation`) the decode engine's connector proves to be that of the engine whose KV comes.
    """
    if not isinstance(generation, str) or not generation.isascii():
        return None
    view = RequestView(request)
    if view.has_unhashable_input or view.lora_path is not None:
        return None
    chain = KeyChain(Identity(HANDOVER, view.cache_salt), view.multimodal_items)
    prompt_digest = TokenDigests(chain, view.token_ids).at(view.num_prompt_tokens)
    return first_tokens_digest(prompt_digest, tokens, view.sampling_facts, generation).hex()


def take_over(request: Request, take: Callable[[Request, SampledToken], None]) -> bool:
    """A load ended: with the KV of the whole prompt there, its first tokens are taken; True when one was the last.

    Only with KV of that prefill engine, which has proved it: after a hand-over that was refused, KV may come from
    elsewhere, and an engine of other weights would have chosen other tokens behind the same prompt.
    """
    tokens, request.handed_over_token_ids = request.handed_over_token_ids, ()
    if request.num_output_tokens or request.num_computed_tokens < request.num_tokens:
        return False
    if CacheHitSource.P2P.value not in request.external_hit_sources:
        return False
    for token in tokens:
        take(request, SampledToken(token))
        if request.is_finished():
            return True
    return False
