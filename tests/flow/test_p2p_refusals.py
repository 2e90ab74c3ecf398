"""After a hand-over that was refused nothing wrong is kept: not in the prefix cache, in host memory, or on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvferry import LLM, SamplingParams
from kvferry.engine.outputs import RequestOutput
from kvferry.testing.stub_model import StubModel

pytestmark = pytest.mark.usefixtures("runner")

P2P = {"kv_connector": "P2PConnector", "kv_connector_extra_config": {"transport": "shm", "handshake_s": 15.0}}
PREFILLED = [(i * 31 + i * i) % 1000 for i in range(160)]
WANTED = [*PREFILLED[:70], 7, *PREFILLED[71:]]


class Engines:
    def __init__(self) -> None:
        self.all: list[LLM] = []
        self.outputs: dict[str, RequestOutput] = {}

    def start(self, transfer: dict[str, Any], policy: str, path: str = "stub") -> LLM:
        transfer = {"kv_role": "kv_both", "kv_load_failure_policy": policy, **transfer}
        model = StubModel(path=path)
        if path != "stub":
            model.load_format = "auto"  # its weights are those of the folder
        llm = LLM(model, kv_transfer_config=transfer, num_kv_blocks=65, block_size=16)
        self.all.append(llm)
        return llm

    def run(self, llm: LLM, name: str, prompt: list[int], transfer: dict[str, Any] | None = None, **more: Any) -> Any:
        extra = None if transfer is None else {"kv_transfer_params": transfer}
        sampling = SamplingParams(temperature=0.0, max_tokens=more.pop("max_tokens", 8), extra_args=extra)
        llm.add_request(prompt, sampling, request_id=name, **more)
        deadline_s = time.monotonic() + 60
        while name not in self.outputs or not self.outputs[name].finished:
            assert time.monotonic() < deadline_s
            for engine in self.all:
                self.outputs |= {output.request_id: output for output in engine.step()}
            time.sleep(0.0005)
        return self.outputs[name]

    def stop(self, llm: LLM) -> None:
        self.all.remove(llm)
        llm.shutdown()


@pytest.fixture
def engines() -> Iterator[Engines]:
    made = Engines()
    yield made
    for llm in made.all:
        llm.shutdown()


def stored(folder: Path) -> dict[str, Any]:
    """Memory for all chunks, or some are dropped while a slow disk takes others; a new engine reads from the disk."""
    extra = {
        "weights_version": "1", "cpu_bytes_to_use": 1 << 20,
        "secondary_tiers": [{"type": "fs", "path": str(folder), "max_bytes": 1 << 24}],
    }  # fmt: skip
    return {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": extra}


@pytest.mark.parametrize("mode", ["pull", "push"])
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_disk_beside_a_hand_over_keeps_nothing_wrong_after_a_refusal(
    engines: Engines, tmp_path: Path, mode: str, policy: str
) -> None:
    p2p = {**P2P, "kv_connector_extra_config": P2P["kv_connector_extra_config"] | {"mode": mode, "lease_s": 60.0}}
    both = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [p2p, stored(tmp_path)]}}
    prefill, decode = engines.start(p2p, "fail"), engines.start(both, policy)
    handed = engines.run(prefill, "p", PREFILLED, {"do_remote_decode": True}, max_tokens=1).kv_transfer_params
    refused = engines.run(decode, "d", WANTED, handed)
    right = StubModel().expected_tokens(WANTED, 8)
    assert refused.outputs[0].token_ids == (right if policy == "recompute" else [])
    assert "the KV of other tokens" in (refused.error or json.dumps(refused.kv_transfer_params))
    for name, prompt in (("wanted", WANTED), ("prefilled", PREFILLED)):
        again = engines.run(decode, name, prompt)
        assert again.outputs[0].token_ids == StubModel().expected_tokens(prompt, 8)
    engines.stop(decode)  # what it has stored is on the disk now
    fresh = engines.start(stored(tmp_path), "fail")
    for name, prompt in (("wanted on disk", WANTED), ("prefilled on disk", PREFILLED)):
        found = engines.run(fresh, name, prompt)
        assert found.outputs[0].token_ids == StubModel().expected_tokens(prompt, 8)
        assert found.num_external_tokens > 0, "there is something on the disk to be right or wrong"


@pytest.mark.parametrize("mode", ["pull", "push"])
@pytest.mark.parametrize("is_same", [True, False])
def test_an_adapter_of_the_same_name_with_other_weights_is_refused(
    engines: Engines, tmp_path: Path, mode: str, is_same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded engine runs no adapters: requests get one as vLLM's have it, of each engine's own folder."""
    extra = P2P["kv_connector_extra_config"] | {"mode": mode, "lease_s": 60.0}
    folders = [tmp_path / "prefill" / "adapter", tmp_path / "decode" / "adapter"]
    for number, folder in enumerate(folders):
        save_weights(folder, 1 if is_same or number == 0 else 2, "adapter_")
    prefill, decode = (engines.start({**P2P, "kv_connector_extra_config": extra}, "recompute") for _ in folders)
    for llm, folder in zip((prefill, decode), folders, strict=True):
        use_adapter(monkeypatch, llm, SimpleNamespace(lora_name="adapter", lora_path=str(folder), adapter_id=1))
    handed = engines.run(prefill, "p", PREFILLED, {"do_remote_decode": True}, max_tokens=1).kv_transfer_params
    output = engines.run(decode, "d", PREFILLED, handed)
    assert output.outputs[0].token_ids == StubModel().expected_tokens(PREFILLED, 8)
    assert output.num_external_tokens == (len(PREFILLED) if is_same else 0)
    if not is_same:
        assert "LoRA adapter" in output.kv_transfer_params["load_error"]


@pytest.mark.parametrize("what", ["model", "adapter"])
@pytest.mark.parametrize("is_loading", [False, True])
def test_nothing_is_taken_once_files_of_the_decode_engine_have_changed(
    engines: Engines, tmp_path: Path, what: str, is_loading: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows is computed with them: a model's files are mapped, and an adapter's are read again."""
    prefix = {"model": "", "adapter": "adapter_"}
    started = []
    for side in ("prefill", "decode"):
        for part in prefix:
            save_weights(tmp_path / side / part, 1, prefix[part])
        started.append(engines.start(P2P, "recompute", str(tmp_path / side / "model")))
        path = str(tmp_path / side / "adapter")
        use_adapter(monkeypatch, started[-1], SimpleNamespace(lora_name="a", lora_path=path, adapter_id=1))
    prefill, decode = started

    def hand_over(name: str, prompt: list[int]) -> RequestOutput:
        handed = engines.run(prefill, f"{name} prefill", prompt, {"do_remote_decode": True}, max_tokens=1)
        return engines.run(decode, name, prompt, handed.kv_transfer_params)

    assert hand_over("unchanged", PREFILLED).num_external_tokens == len(PREFILLED)
    scheduler_side = decode.connector.side
    load_ended = scheduler_side._load_ended

    def changed_and_ended(event: Any) -> None:
        save_weights(tmp_path / "decode" / what, 2, prefix[what])
        load_ended(event)

    if is_loading:
        monkeypatch.setattr(scheduler_side, "_load_ended", changed_and_ended)
    else:
        save_weights(tmp_path / "decode" / what, 2, prefix[what])
    output = hand_over("changed", WANTED)
    assert output.outputs[0].token_ids == StubModel().expected_tokens(WANTED, 8)
    assert output.num_external_tokens == 0
    assert "may not be what was loaded" in output.kv_transfer_params["load_error"]


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_kv_behind_other_media_is_refused(engines: Engines, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded engine takes no media: requests get them as vLLM's have them, among the same tokens."""
    extra = P2P["kv_connector_extra_config"] | {"mode": mode, "lease_s": 60.0}
    prefill, decode = (engines.start({**P2P, "kv_connector_extra_config": extra}, "recompute") for _ in range(2))
    sides: list[list[Any]] = [[], []]
    for llm, features in zip((prefill, decode), sides, strict=True):
        with_fields(monkeypatch, llm, mm_features=features)
    cases = [
        ("same", "picture", 20, 160, True),
        ("other picture", "another", 20, 160, False),
        ("other place", "picture", 21, 160, False),
        ("none", None, 20, 160, False),
        ("one token of another", "another", 20, 21, False),
        ("none of another yet", "another", 20, 20, True),
    ]
    for number, (name, picture, offset, num_tokens, is_taken) in enumerate(cases):
        prompt = [number, *PREFILLED[1:]]
        for features, identifier, place in zip(sides, ("picture", picture), (20, offset), strict=True):
            where = SimpleNamespace(offset=place, length=30)
            features[:] = [] if identifier is None else [SimpleNamespace(identifier=identifier, mm_position=where)]
        handed = engines.run(prefill, f"{name} prefill", prompt, {"do_remote_decode": True}, max_tokens=1)
        output = engines.run(decode, name, prompt[:num_tokens], handed.kv_transfer_params)
        assert output.outputs[0].token_ids == StubModel().expected_tokens(prompt[:num_tokens], 8), name
        assert (output.num_external_tokens > 0) == is_taken, name
        assert is_taken or "the KV of other tokens" in output.kv_transfer_params["load_error"], name


def save_weights(folder: Path, value: int, prefix: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes([value])
    (folder / f"{prefix}model.safetensors").write_bytes(data)
    (folder / f"{prefix}config.json").write_text("{}")


def use_adapter(monkeypatch: pytest.MonkeyPatch, llm: LLM, adapter: Any) -> None:
    with_fields(monkeypatch, llm, lora_request=adapter)


def with_fields(monkeypatch: pytest.MonkeyPatch, llm: LLM, **fields: Any) -> None:
    make = llm._make_request

    def made(*arguments: Any, **more: Any) -> Any:
        request = make(*arguments, **more)
        for name, value in fields.items():
            setattr(request, name, value)
        return request

    monkeypatch.setattr(llm, "_make_request", made)
