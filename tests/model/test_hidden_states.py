"""ExampleHiddenStatesConnector in the embedded engine: its files hold what transformers itself computes."""

from __future__ import annotations

import random
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from kvferry import LLM, SamplingParams
from kvferry.errors import ConfigError
from kvferry.examples.hidden_states import load_hidden_states
from kvferry.testing.stub_model import StubModel

STATES = [0, 2, 3]  # embeddings, a middle one, what the last of three layers gives
SHORT = SamplingParams(max_tokens=3, temperature=0)


def connector(folder: Path, **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "ExampleHiddenStatesConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(folder), **extra},
    }


def make_llm(model: Any, folder: Path, transfer: dict[str, Any] | None = None, **settings: Any) -> LLM:
    settings = {"block_size": 4, "hidden_state_layers": STATES, **settings}
    return LLM(model, kv_transfer_config=transfer or connector(folder), **settings)


@pytest.fixture(scope="module")
def expected(tiny_llama):
    """By the layers' own inputs and outputs in transformers, [tokens, states, hidden]."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    last: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda layer, args, out: last.append(out))

    def compute(prompt: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            states = model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states
        return torch.stack([states[0][0], states[2][0], last.pop()[0]], dim=1)

    return compute


def prompts(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(211) for _ in range(n)] for n in lengths]


def check(outputs, expected):
    paths = [output.kv_transfer_params["hidden_states_path"] for output in outputs]
    assert len(set(paths)) == len(paths)
    for output, path in zip(outputs, paths, strict=True):
        found = load_hidden_states(path)
        assert found["token_ids"].tolist() == output.prompt_token_ids
        torch.testing.assert_close(found["hidden_states"], expected(output.prompt_token_ids), rtol=1e-4, atol=1e-4)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_sound(llm: LLM) -> None:
    llm.scheduler.check_integrity()
    assert llm.counters.hook_errors == llm.counters.contract_errors == {}


V2 = {"use_v2_model_runner": True}
RUNNERS = {"V1": {}, "V2": V2, "V2 with kernel blocks": V2 | {"block_size": 16, "kernel_block_size": 4}}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_rows_are_those_of_the_model(tiny_llama, tmp_path, expected, chunk, runner):
    with make_llm(tiny_llama, tmp_path / "a" / "b", max_num_batched_tokens=chunk, **RUNNERS[runner]) as llm:
        assert llm.config.use_v2_model_runner == (runner != "V1")
        check(llm.generate(prompts([1, 5, 16, 33]), SHORT), expected)
        check_sound(llm)
    assert len(files(tmp_path / "a" / "b")) == 4
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a/b").iterdir()} == {0o600}


def test_the_file_says_which_states_it_holds(tiny_llama, tmp_path):
    with make_llm(tiny_llama, tmp_path / "hs") as llm:
        (output,) = llm.generate(prompts([6]), SHORT)
        load_hidden_states(output.kv_transfer_params["hidden_states_path"])
        with safe_open(output.kv_transfer_params["hidden_states_path"], "pt") as file:
            metadata = file.metadata()
    assert metadata.pop("name") == Path(output.kv_transfer_params["hidden_states_path"]).name
    assert (len(metadata.pop("identity")), len(metadata.pop("digest"))) == (64, 32)
    assert metadata == {"hidden_state_layers": "[0, 2, 3]", "model": str(tiny_llama)}


def test_nothing_is_missing_where_the_prefix_was_computed_before(tiny_llama, tmp_path, expected):
    (prompt,) = prompts([33])
    with make_llm(tiny_llama, tmp_path / "hs") as llm:
        for again in (prompt, prompt, [*prompt, 7, 8]):
            outputs = llm.generate([again], SHORT)
            assert outputs[0].num_cached_tokens == 0
            check(outputs, expected)


def test_nothing_is_missing_beside_a_connector_that_loads(tiny_llama, tmp_path, expected):
    (prompt,) = prompts([40])
    settings = {"cpu_bytes_to_use": 1 << 22, "chunk_tokens": 16}
    offloading = {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": settings}

    def loaded_tokens(parts, states):
        extra = {"connectors": parts}
        multi = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
        with make_llm(tiny_llama, tmp_path, multi, block_size=16, hidden_state_layers=states) as llm:
            for _ in range(2):
                (output,) = llm.generate([prompt], SHORT)
                if states:
                    check([output], expected)
                assert llm.reset_prefix_cache()
            check_sound(llm)
            return output.num_external_tokens

    assert loaded_tokens([offloading], []) == 32, "else the other half proves nothing"
    assert loaded_tokens([offloading, connector(tmp_path / "hs")], STATES) == 0


@pytest.mark.parametrize("runner", [{}, V2 | {"kernel_block_size": 2}], ids=["V1", "V2"])
def test_preempted_requests(tiny_llama, tmp_path, expected, runner):
    params = SamplingParams(max_tokens=24, temperature=0)
    with make_llm(tiny_llama, tmp_path / "hs", num_kv_blocks=30, max_num_batched_tokens=9, **runner) as llm:
        check(llm.generate(prompts([30, 31, 32, 33], seed=3), params), expected)
        assert llm.scheduler.num_preemptions > 0
        check_sound(llm)
    assert len(files(tmp_path / "hs")) == 4


def test_a_prompt_that_is_preempted_half_way(tiny_llama, tmp_path, expected):
    old, young = prompts([40, 31], seed=4)
    settings = {"num_kv_blocks": 20, "max_num_batched_tokens": 4}
    with make_llm(tiny_llama, tmp_path / "hs", **settings) as llm:
        llm.add_request(old, SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
        young_id = llm.add_request(young, SHORT)
        outputs, computed = [], []
        while llm.has_unfinished_requests():
            if (request := llm.scheduler._requests.get(young_id)) is not None and request.num_output_tokens == 0:
                computed.append(request.num_computed_tokens)
            outputs += [output for output in llm.step() if output.finished]
        assert any(0 == after < before for before, after in pairwise(computed)), computed
        check(outputs, expected)
        check_sound(llm)


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_an_aborted_request_leaves_no_file(tiny_llama, tmp_path, num_steps):
    """Before its first step, within its prompt, and after it (3 steps)."""
    with make_llm(tiny_llama, tmp_path / "hs", max_num_batched_tokens=10) as llm:
        request_id = llm.add_request(prompts([30])[0], SamplingParams(max_tokens=50, temperature=0, ignore_eos=True))
        for _ in range(num_steps):
            llm.step()
        llm.abort_request(request_id)
        outputs = []
        while llm.has_requests():
            outputs += llm.step()
        assert [output.kv_transfer_params for output in outputs] == [None]
        check_sound(llm)
    assert files(tmp_path / "hs") == []


def test_shutting_down_amid_a_request_leaves_no_file(tiny_llama, tmp_path):
    with make_llm(tiny_llama, tmp_path / "hs") as llm:
        llm.add_request(prompts([30])[0], SamplingParams(max_tokens=50, temperature=0, ignore_eos=True))
        llm.step()
        llm.step()
    assert files(tmp_path / "hs") == []


@pytest.mark.parametrize("request_id", ["../../escaped", "/etc/passwd", "a/b/c", "..", "\u0000x", "é" * 300])
def test_no_id_escapes_from_the_folder(tiny_llama, tmp_path, expected, request_id):
    with make_llm(tiny_llama, tmp_path / "hs") as llm:
        params = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": {"hidden_states_path": "/etc/x"}})
        llm.add_request(prompts([5])[0], params, request_id=request_id)
        outputs = llm.step()
        assert Path(outputs[0].kv_transfer_params["hidden_states_path"]).parent == tmp_path / "hs"
        check(outputs, expected)
    assert files(tmp_path) == ["hs"]


@pytest.mark.parametrize(
    ("states", "text"),
    [
        ([4], r"hidden_state_layers=\[4\]: this model has the hidden states 0 \(embeddings\) to 3"),
        ([2, 1], r"hidden_state_layers=\[2, 1\] must be in order"),
        ([1, 1], r"hidden_state_layers=\[1, 1\] must be in order"),
        ([-1], "hidden_state_layers=-1 must be a whole number of at least 0"),
        ([1.5], "hidden_state_layers=1.5 must be a whole number"),
        ([], "gets no hidden states from this engine: give it hidden_state_layers"),
    ],
)
def test_wrong_layers_are_refused(tiny_llama, tmp_path, states, text):
    with pytest.raises(ConfigError, match=text):
        make_llm(tiny_llama, tmp_path / "hs", hidden_state_layers=states)


def test_hosts_that_cannot_are_refused(tiny_llama, tmp_path):
    with pytest.raises(ConfigError, match="there is no connector to take them"):
        LLM(tiny_llama, hidden_state_layers=[1])
    with pytest.raises(ConfigError, match="no decoder layers can be found in a StubModel"):
        make_llm(StubModel(), tmp_path / "hs")
