"""Hooks of built-in connectors that raise inside real vLLM: the engine lives, and answers as a cold one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from conftest import StartEngine
from engine_process import assert_same_tokens, offloading, random_prompt

from kvferry.vllm.facade import _NEUTRAL, VllmAnswers, built_in, guarded

CONNECTORS = ["OffloadingConnector", "NixlConnector", "DecodeBenchConnector"]


@pytest.mark.parametrize("hook", _NEUTRAL)
@pytest.mark.parametrize("name", CONNECTORS)
@pytest.mark.parametrize("error", [RuntimeError, TypeError, UnicodeError, RecursionError])
def test_what_a_hook_raises_is_counted_and_answered_for(name: str, hook: str, error: type[Exception]) -> None:
    connector = raising(name, hook, error)
    args: dict[str, list[Any]] = {
        "on_new_request": [SimpleNamespace(request_id="r")],
        "get_num_new_matched_tokens": [SimpleNamespace(request_id="r"), 3],
        "get_external_cache_hit_sources": [SimpleNamespace(request_id="r"), 7],
    }
    answer = getattr(connector, hook)(*args.get(hook, []))
    if hook == "get_num_new_matched_tokens":
        assert answer == (0, False)
    elif hook == "get_external_cache_hit_sources":
        assert sum(answer.values()) == 7
    else:
        assert not answer
    assert connector.num_hook_errors == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_the_end_of_the_process_is_not_swallowed(error: type[BaseException]) -> None:
    with pytest.raises(error):
        raising("OffloadingConnector", "take_events", error).take_events()


@pytest.mark.parametrize(
    "hook", ["register_kv_caches", "get_handshake_metadata", "get_transfer_results", "build_connector_meta"]
)
def test_start_errors_and_loads_whose_end_is_unknown_are_not_swallowed(hook: str) -> None:
    connector = raising("OffloadingConnector", hook, RuntimeError)
    with pytest.raises(RuntimeError, match="told to"):
        getattr(connector, hook)(*([] if hook == "get_handshake_metadata" else [None]))


def raising(name: str, hook: str, error: type[BaseException]) -> Any:
    """An instance, past its constructor, one of whose hooks raises."""
    assert issubclass(built_in(name), VllmAnswers)

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise error("told to")

    kind = guarded(type("Raising", (built_in(name),), {hook: fail}))
    return kind.__new__(kind)


def test_a_real_engine_lives(start_engine: StartEngine, tiny_llama: str) -> None:
    engine = start_engine(
        model=tiny_llama,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=64,
        max_model_len=1024,
        disable_log_stats=False,
        worker_extension_cls="engine_child.WorkerProbe",
        kv_transfer_config=offloading("recompute", {}),
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    prompt = random_prompt(1, 500)
    cold = engine.ask(generate=prompt, max_tokens=8)
    engine.ask(reset=False)
    for hook in _NEUTRAL:
        engine.ask(raise_in=hook)
        got = engine.ask(generate=prompt, max_tokens=8)
        assert_same_tokens(got, cold)
        engine.ask(raise_in="")
        engine.ask(reset=False)
    warm = engine.ask(generate=prompt, max_tokens=8)
    assert warm["external_hits"] == 448
    assert_same_tokens(warm, cold)
    assert "told to raise" in engine.log.read_text()
