"""The demo's engine process: reads one JSON command a line from standard input, answers each with one line.

What the demo proves about the pool it reads here from the engine's KV memory itself, not through the connector.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvferry import LLM, SamplingParams
from kvferry.engine import RequestOutput
from kvferry.engine.request import Logprob
from kvferry.errors import ConfigError, KVFerryError
from kvferry.kv.fingerprint import fingerprint_folder
from kvferry.kv.keys import Identity, KeyChain, store_key

logger = logging.getLogger(__name__)

MAX_TOKENS = 24
POISON = 0x5A
"""Finite in every float type: a poisoned entry that is wrongly read changes the answer, a masked one does not."""
_WARM_UP_TOKENS = 40  # fewer than a chunk, so that nothing of it is stored
_TAIL_REPEATS = 3
_TAIL_BUDGET_S = 2.0
_COPY_REPEATS = 5
_SETTLE_TIMEOUT_S = 10.0
_SETTLE_REST_S = 0.005
_IDLE_REST_S = 0.001


class DemoEngine:
    """An engine and the demo's prompts; its public methods are the commands.

    Without a `store` folder it has neither connector nor prefix cache.
    """

    def __init__(
        self, model: str, document: str, questions: list[str], chunk_tokens: int, store: str | None, host_bytes: int
    ) -> None:
        self._chunk_tokens = chunk_tokens
        self._store = None if store is None else Path(store)
        config = None if store is None else _offloading(store, chunk_tokens, host_bytes)
        llm = LLM(model, dtype="float32", enable_prefix_caching=store is not None, kv_transfer_config=config)
        self._start(llm, document, questions)

    def _start(self, llm: LLM, document: str, questions: list[str]) -> None:
        self._llm = llm
        texts = [f"{document}\n\nQuestion: {question}" for question in questions]
        self._prompts = [_chat_prompt(llm, text) for text in texts]
        self._block_tokens = self._llm.config.cache_config.block_size
        self._pool = _pool_bytes(self._llm)
        self._run(list(range(100, 100 + _WARM_UP_TOKENS)), max_tokens=2)

    def shape(self) -> dict[str, Any]:
        """What the parent must know of engine and prompts."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(*self._prompts, strict=False))
        return {
            "block_tokens": self._block_tokens,
            "kv_bytes_per_token": self._pool.shape[1] // self._block_tokens,
            "shared_tokens": len(list(same)),
            "keys": [key.hex() for key in self._keys(self._prompts[0])],
        }

    def ask(self, question: int) -> dict[str, Any]:
        """Answer a question. Digests of the prompt's blocks are taken once the first token is there."""
        # Only the reference, which has no connector, tells how near other tokens were.
        return self._answer(*self._run(self._prompts[question], MAX_TOKENS, logprobs=None if self._store else 2))

    def _answer(self, output: RequestOutput, digests: list[str]) -> dict[str, Any]:
        if output.error is not None:
            raise KVFerryError(f"the request failed: {output.error}")
        sources = output.external_hit_sources
        if sum(sources.values()) != output.num_external_tokens:  # a load failed after it had been claimed
            raise KVFerryError(f"{sources} tokens were claimed, {output.num_external_tokens} loaded")
        return {
            "ttft_s": output.metrics.ttft_s,
            "prompt_tokens": len(output.prompt_token_ids),
            "tokens_from_host": sources.get("host", 0),
            "tokens_from_disk": sources.get("disk", 0),
            "tokens_from_peer": sources.get("p2p", 0),
            "tokens_computed": len(output.prompt_token_ids) - output.num_cached_tokens,
            "token_ids": output.outputs[0].token_ids,
            "logit_gaps": [_gap(at_token.values()) for at_token in output.outputs[0].logprobs or ()],
            "text": output.outputs[0].text,
            "block_digests": digests,
        }

    def settle(self) -> dict[str, Any]:
        """Step until every whole chunk of the first prompt has its file, or none was added for a while."""
        assert self._store is not None
        missing = {key.hex() for key in self._keys(self._prompts[0])}
        deadline_s = time.monotonic() + _SETTLE_TIMEOUT_S
        while missing and time.monotonic() < deadline_s:
            arrived = missing & {file.stem for file in self._store.rglob("*.kv")}
            if arrived:
                missing -= arrived
                deadline_s = time.monotonic() + _SETTLE_TIMEOUT_S
            self._llm.step()
            time.sleep(_SETTLE_REST_S)
        return {"num_missing": len(missing)}

    def forget(self) -> dict[str, Any]:
        """Empty the engine's own cache and overwrite its whole pool; says how many blocks are pure poison then."""
        if not self._llm.reset_prefix_cache():
            raise KVFerryError("the engine could not forget its cache: some block is still held")
        self._pool.fill(POISON)
        num_poisoned = int((self._pool == POISON).all(axis=1).sum())
        return {"num_blocks": len(self._pool), "num_poisoned": num_poisoned, "poison": POISON}

    def time_tail(self, question: int, num_known_tokens: int, first_token: int) -> dict[str, Any]:
        """Seconds to the first token when the first `num_known_tokens` are in the engine's own cache; best of some.

        The prompt is the question's with another token there (from `first_token` on; each engine has its own, since
        what one engine computes the next finds on disk), so that exactly the tail is computed.
        """
        prompt = list(self._prompts[question])
        seconds: list[float] = []
        while len(seconds) < _TAIL_REPEATS and sum(seconds) < _TAIL_BUDGET_S:
            prompt[num_known_tokens] = first_token + len(seconds)
            output, _ = self._run(prompt, max_tokens=1)
            if output.num_cached_tokens != num_known_tokens or output.num_external_tokens:
                raise KVFerryError(f"{output.num_cached_tokens} tokens were in the cache, not {num_known_tokens}")
            assert output.metrics.ttft_s is not None
            seconds.append(output.metrics.ttft_s)
        return {"seconds": min(seconds)}

    def copy_rate(self, num_bytes: int) -> dict[str, Any]:
        """Bytes per second of one plain copy of `num_bytes` between buffers touched before; best of some."""
        source, target = np.ones(num_bytes, dtype=np.uint8), np.ones(num_bytes, dtype=np.uint8)
        best_s = float("inf")
        for _ in range(_COPY_REPEATS):
            started_s = time.perf_counter()
            np.copyto(target, source)
            best_s = min(best_s, time.perf_counter() - started_s)
        return {"bytes_per_s": num_bytes / best_s}

    def stop(self) -> dict[str, Any]:
        """Shut the engine down."""
        self._llm.shutdown()
        return {}

    def _run(
        self, prompt: list[int], max_tokens: int, logprobs: int | None = None, **transfer_params: Any
    ) -> tuple[RequestOutput, list[str]]:
        """Generate greedily; also the digests of the prompt's blocks, taken once the first token is there."""
        extra = {"kv_transfer_params": transfer_params} if transfer_params else None
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=logprobs, extra_args=extra
        )
        request_id = self._llm.add_request(prompt, params)
        digests: list[str] = []
        while True:
            finished = [output for output in self._llm.step() if output.finished]
            if finished:
                return finished[0], digests
            running = self._llm.scheduler.running
            if not digests and running and running[0].num_output_tokens:
                digests = self._digests(self._llm.scheduler.manager.get_block_ids(request_id)[0], len(prompt))
            if not self._llm.has_moved:
                time.sleep(_IDLE_REST_S)

    def _digests(self, block_ids: list[int], num_tokens: int) -> list[str]:
        """SHA-256 (hex) of the pool's bytes of each full block, and of the tokens in the last one if it is not full."""
        num_full, num_rest = divmod(num_tokens, self._block_tokens)
        digests = [hashlib.sha256(self._pool[block_id]).hexdigest() for block_id in block_ids[:num_full]]
        if num_rest:
            layers = [kv[block_ids[num_full], :, :num_rest] for kv in self._llm.kv_caches.values()]
            digests.append(hashlib.sha256(torch.stack(layers).numpy().tobytes()).hexdigest())
        return digests

    def _keys(self, prompt: list[int]) -> list[bytes]:
        """Keys of the prompt's whole chunks, as docs/keys.md defines them."""
        chain = KeyChain(Identity(fingerprint_folder(Path(self._llm.config.model_config.model))))
        chain.extend(prompt)
        ends = range(self._chunk_tokens, len(prompt) + 1, self._chunk_tokens)
        return [store_key(chain.value_at(end), group_id=0, rank=0) for end in ends]


class PeerEngine(DemoEngine):
    """One of the two engines of the disaggregated act; its KV pool lies in shared memory, or else under `folder`."""

    def __init__(self, model: str, document: str, questions: list[str], num_kv_blocks: int, folder: str) -> None:
        self._store = None
        config = {
            "kv_connector": "P2PConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"transport": "shm", "shm_dir": folder},
        }
        llm = LLM(model, dtype="float32", num_kv_blocks=num_kv_blocks, kv_transfer_config=config)
        self._start(llm, document, questions)

    def shape(self) -> dict[str, Any]:
        """What the parent must know of the engine."""
        return {"kv_bytes_per_token": self._pool.shape[1] // self._block_tokens}

    def compute(self) -> dict[str, Any]:
        """Answer without any other engine, and tell how near other tokens were."""
        return self._answer(*self._run(self._prompts[0], MAX_TOKENS, logprobs=2))

    def prefill(self) -> dict[str, Any]:
        """Compute the prompt and its first token, for another engine: digests of the blocks that are kept for it."""
        output, _ = self._run(self._prompts[0], max_tokens=1, do_remote_decode=True)
        params = output.kv_transfer_params
        if params is None:
            raise KVFerryError("the prefill engine did not say where its KV is")
        blocks = params["remote_block_ids"][0]
        return self._answer(output, self._digests(blocks, len(self._prompts[0]))) | {"params": params}

    def decode(self, params: dict[str, Any]) -> dict[str, Any]:
        """Answer with KV and first token of the engine that `params` names; also the bytes that came, by transport."""
        answer = self._answer(*self._run(self._prompts[0], MAX_TOKENS, **params))
        stats = self._llm.connector_stats
        assert stats is not None
        return answer | {"num_bytes": {name: medium.loaded_bytes for name, medium in stats.media.items()}}

    def take_back(self) -> dict[str, Any]:
        """Step until no block is kept for another engine, or for too long."""
        deadline_s = time.monotonic() + _SETTLE_TIMEOUT_S
        while self._llm.has_requests() and time.monotonic() < deadline_s:
            self._llm.step()
            time.sleep(_IDLE_REST_S)
        return {"num_held_blocks": sum(self._llm.scheduler.stats().num_held_blocks.values())}


def _offloading(store: str, chunk_tokens: int, host_bytes: int) -> dict[str, Any]:
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "cpu_bytes_to_use": host_bytes,
            "chunk_tokens": chunk_tokens,
            "secondary_tiers": [{"type": "fs", "path": store}],
            "stall_timeout_s": 60.0,
        },
    }


def _chat_prompt(llm: LLM, text: str) -> list[int]:
    """Token ids of `text` as a user's message, or of the bare text when the model has no chat template."""
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise ConfigError(
            f"model={llm.config.model_config.model!r} has no tokenizer, so it cannot be asked about a text: put its "
            "tokenizer.json into that folder, or name another one with --model"
        )
    if tokenizer.chat_template is None:
        return list(tokenizer(text + "\nAnswer:")["input_ids"])
    message = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def _pool_bytes(llm: LLM) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The engine's KV memory as uint8 [blocks, bytes]: a block of all layers is one run of bytes. Not a copy."""
    config = llm.kv_cache_config
    if (num_groups := len(config.kv_cache_groups)) != 1:
        raise ConfigError(
            f"model={llm.config.model_config.model!r} has {num_groups} KV cache groups, for its layers are not all "
            "alike, and the demo reads one only: name another one with --model, such as smollm2"
        )
    storage = next(iter(llm.kv_caches.values())).untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    return flat.view(config.num_blocks, -1).numpy()


def _gap(candidates: Iterable[Logprob]) -> float:
    """How much likelier the first choice was than the second (difference of their logits)."""
    first, second = sorted((candidate.logprob for candidate in candidates), reverse=True)[:2]
    return first - second


def _answer(engine: DemoEngine | None, command: dict[str, Any]) -> tuple[DemoEngine | None, dict[str, Any]]:
    op = command.pop("op")
    if op in ("open", "open_peer"):
        engine = (DemoEngine if op == "open" else PeerEngine)(**command)
        return engine, engine.shape()
    assert engine is not None, "open comes first"
    return engine, getattr(engine, op)(**command)


def main() -> None:
    """Serve commands until `stop` or the end of input. Only answers go to the pipe; all else goes to the log."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine: DemoEngine | None = None
    for line in sys.stdin:
        command = json.loads(line)
        is_last = command["op"] == "stop"
        try:
            engine, answer = _answer(engine, command)
        except KVFerryError as error:
            answer = {"error": str(error), "is_config_error": isinstance(error, ConfigError)}
        answers.write(json.dumps(answer) + "\n")
        if is_last:
            return
    if engine is not None:  # whoever asked is gone
        engine.stop()


if __name__ == "__main__":
    main()
