"""First tokens that a prefill engine chose already: a decode engine need not compute the last of the prompt again."""

from __future__ import annotations

from collections.abc import Callable

from kvferry.contract.views import RequestView
from kvferry.engine.request import Request, SampledToken
from kvferry.hashing import HANDOVER, Identity, KeyChain, TokenDigests


def handed_over_tokens(request: Request, vocab_size: int) -> tuple[int, ...]:
    """What the prefill engine that the request names chose; nothing when that is no list of token ids of this model.

    Nothing as well when its prompt was another than this request's, in any token or by its length, and when log
    probabilities are asked for: only who computes the token knows them.
    """
    params = request.kv_transfer_params
    if not isinstance(params, dict) or not params.get("do_remote_prefill"):
        return ()
    tokens = params.get("remote_first_token_ids")
    if not isinstance(tokens, list | tuple) or request.sampling_params.logprobs is not None:
        return ()
    is_valid = all(type(token) is int and 0 <= token < vocab_size for token in tokens)
    digest = params.get("remote_prompt_digest")
    return tuple(tokens) if is_valid and isinstance(digest, str) and digest == _prompt_digest(request) else ()


def _prompt_digest(request: Request) -> str | None:
    """As the prefill engine's connector makes it; None when the tokens do not tell what the prompt is."""
    view = RequestView(request)
    if view.has_unhashable_input or view.lora_path is not None:
        return None
    chain = KeyChain(Identity(HANDOVER, view.cache_salt), view.multimodal_items)
    return TokenDigests(chain, view.token_ids).at(view.num_prompt_tokens).hex()


def take_over(request: Request, take: Callable[[Request, SampledToken], None]) -> bool:
    """A load ended: with the KV of the whole prompt there, its first tokens are taken; True when one was the last."""
    tokens, request.handed_over_token_ids = request.handed_over_token_ids, ()
    if request.num_output_tokens or request.num_computed_tokens < request.num_tokens:
        return False
    for token in tokens:
        take(request, SampledToken(token))
        if request.is_finished():
            return True
    return False
