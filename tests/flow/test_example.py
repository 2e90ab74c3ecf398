"""ExampleConnector: a shared folder is a cache, and whatever is wrong in it, tokens are right."""

from __future__ import annotations

import stat

import pytest
import torch
from safetensors.torch import load_file

from kvferry import LLM, SamplingParams
from kvferry.errors import ConfigError, TierCorrupt
from kvferry.examples.example import _read, _write
from kvferry.testing.stub_model import StubModel

pytestmark = pytest.mark.usefixtures("runner")

BLOCK = 16


@pytest.fixture
def make_llm(tmp_path):
    engines = []

    def make(policy="recompute", extra=None, model=None, before=None, **settings):
        """`before`: another connector that loads first, in a MultiConnector."""
        extra = {"shared_storage_path": str(tmp_path / "kv"), "weights_version": "stub", **(extra or {})}
        transfer = {"kv_connector": "ExampleConnector", "kv_connector_extra_config": extra}
        if before is not None:
            children = {"connectors": [before, transfer]}
            transfer = {"kv_connector": "MultiConnector", "kv_connector_extra_config": children}
        transfer |= {"kv_role": "kv_both", "kv_load_failure_policy": policy}
        settings = {"block_size": BLOCK, "num_kv_blocks": 64, "max_num_batched_tokens": 512, **settings}
        engines.append(LLM(model or StubModel(), kv_transfer_config=transfer, **settings))
        return engines[-1]

    yield make
    for llm in engines:
        llm.check_integrity()
        assert llm.counters.hook_errors == {}
        assert llm.counters.contract_errors == {}
        llm.shutdown()
    assert not list(tmp_path.glob("kv/*/tmp-*")), "nothing half-written stays"


@pytest.fixture
def stored(tmp_path):
    """The folders of the stored blocks, oldest first."""
    return lambda: sorted(
        (f for f in tmp_path.glob("kv/*/*") if not f.name.startswith("tmp-")), key=lambda f: f.stat().st_mtime_ns
    )


def prompt(num_tokens, seed=0):
    return [(seed * 7919 + i * 31 + i * i) % 1000 for i in range(num_tokens)]


def run(llm, tokens, max_tokens=3, **kwargs):
    output = llm.generate(tokens, SamplingParams(max_tokens=max_tokens, temperature=0), **kwargs)[0]
    if output.error is None:
        assert output.outputs[0].token_ids == StubModel().expected_tokens(tokens, max_tokens)
    return output


def forget(llm):
    """Empty the engine's own cache, and spoil its blocks."""
    assert llm.reset_prefix_cache()
    llm.runner._kv.storage.fill_(0x55)


def folder_of(stored, tokens, block):
    """The folder of one block of a prompt, found by the content that must be in it."""
    size = StubModel().token_bytes * BLOCK
    content = StubModel().expected_kv(tokens, 0)[block * size : (block + 1) * size]
    (folder,) = (f for f in stored() if _bytes(f / "model.layers.0.self_attn.attn.0.safetensors") == content)
    return folder


def _bytes(file):
    return bytes(load_file(file)["kv"].flatten().view(torch.uint8).numpy())


def test_files_hold_each_layer_of_each_block_and_are_private(make_llm, stored, tmp_path):
    run(make_llm(), tokens := prompt(70))
    assert len(stored()) == 4
    for block in range(4):
        folder = folder_of(stored, tokens, block)
        size = StubModel().token_bytes * BLOCK
        second = StubModel().expected_kv(tokens, 1)[block * size : (block + 1) * size]
        assert _bytes(folder / "model.layers.1.self_attn.attn.0.safetensors") == second
        assert len(list(folder.iterdir())) == 2
    for path in [tmp_path / "kv", *tmp_path.glob("kv/**/*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize(("num_tokens", "hit"), [(90, 80), (80, 64), (81, 80), (15, 0), (16, 0), (17, 16)])
def test_a_new_engine_loads_what_the_last_one_stored(make_llm, num_tokens, hit):
    tokens = prompt(num_tokens)
    first = make_llm()
    assert run(first, tokens).num_external_tokens == 0
    first.shutdown()
    output = run(make_llm(), tokens)
    assert (output.num_cached_tokens, output.num_external_tokens) == (hit, hit)


def test_generated_tokens_are_stored_too(make_llm, stored):
    llm = make_llm()
    tokens = prompt(30)
    answer = run(llm, tokens, max_tokens=40).outputs[0].token_ids
    forget(llm)
    assert run(llm, [*tokens, *answer]).num_external_tokens == 64


def test_chunked_prefill(make_llm):
    llm = make_llm(max_num_batched_tokens=24)
    tokens = prompt(150)
    run(llm, tokens)
    forget(llm)
    assert run(llm, tokens).num_external_tokens == 144
    assert llm.counters.load_failures == 0


def test_local_blocks_are_not_loaded_again(make_llm):
    llm = make_llm()
    tokens = prompt(90)
    run(llm, tokens)
    forget(llm)
    run(llm, tokens[:33])
    output = run(llm, tokens)
    assert (output.num_cached_tokens, output.num_external_tokens) == (80, 48)


def test_two_engines_share_a_folder(make_llm, stored):
    left, right = make_llm(), make_llm()
    tokens = prompt(90)
    run(left, tokens)
    assert run(right, tokens).num_external_tokens == 80
    longer = [*tokens, *prompt(60, seed=1)]
    assert run(right, longer).num_external_tokens == 0, "the engine's own cache has it"
    forget(left)
    assert run(left, longer).num_external_tokens == 144
    assert len(stored()) == 9


def test_salt_weights_and_block_size_separate(make_llm):
    llm = make_llm()
    tokens = prompt(90)
    run(llm, tokens, cache_salt="a")
    forget(llm)
    assert run(llm, tokens).num_external_tokens == 0
    assert run(llm, tokens, cache_salt="b").num_external_tokens == 0
    assert run(make_llm(extra={"weights_version": "other"}), tokens, cache_salt="a").num_external_tokens == 0
    assert run(make_llm(block_size=32), tokens, cache_salt="a").num_external_tokens == 0
    assert run(make_llm(), tokens, cache_salt="a").num_external_tokens == 80


def spoil_byte(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "flipped byte": spoil_byte,
    "truncated file": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "empty file": lambda file: file.write_bytes(b""),
    "other layer's file": lambda file: file.write_bytes(
        file.with_name("model.layers.0.self_attn.attn.0.safetensors").read_bytes()
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_damaged_file(make_llm, stored, policy, damage):
    llm = make_llm(policy)
    tokens = prompt(90)
    run(llm, tokens)
    forget(llm)
    DAMAGES[damage](folder_of(stored, tokens, 2) / "model.layers.1.self_attn.attn.0.safetensors")
    output = run(llm, tokens)
    assert llm.counters.load_failures == 1
    if policy == "fail":
        assert output.outputs[0].finish_reason == "error"
        assert output.outputs[0].token_ids == []
        assert run(llm, tokens).num_external_tokens == 32, "the bad block is not claimed again"
    else:
        assert (output.num_cached_tokens, output.num_external_tokens) == (32, 32)
    assert llm.counters.load_failures == 1
    forget(llm)
    assert run(llm, tokens).num_external_tokens == 80, "it was computed and stored again"
    assert run(make_llm(), tokens).num_external_tokens == 80, "for everyone"
    assert llm.counters.load_failures == 1


def test_a_folder_that_is_not_whole_is_no_hit_and_is_replaced(make_llm, stored):
    llm = make_llm()
    tokens = prompt(90)
    run(llm, tokens)
    forget(llm)
    (folder_of(stored, tokens, 2) / "model.layers.1.self_attn.attn.0.safetensors").unlink()
    assert run(llm, tokens).num_external_tokens == 32
    assert llm.counters.load_failures == 0
    forget(llm)
    assert run(llm, tokens).num_external_tokens == 80


def test_what_was_computed_beside_a_failed_load_is_not_stored(make_llm, stored):
    """The step in which the load fails computes blocks 4 to 6 from what the pool held before."""
    llm = make_llm("fail")
    first, longer = prompt(70), [*prompt(64), *prompt(50, seed=1)]
    run(llm, first)
    forget(llm)
    spoil_byte(folder_of(stored, first, 3) / "model.layers.0.self_attn.attn.0.safetensors")
    before = set(stored())
    assert run(llm, longer).error is not None
    assert set(stored()) == before
    assert run(llm, longer).num_external_tokens == 48
    forget(llm)
    assert run(llm, longer).num_external_tokens == 112


def test_nor_beside_the_failed_load_of_another_connector(make_llm):
    drops = {"fail_block_indexes": [3], "report_by": "block_ids"}
    other = {"kv_connector": "LoadRecoveryExampleConnector", "kv_connector_extra_config": drops}
    llm = make_llm(before=other)
    first, longer = prompt(70), [*prompt(64), *prompt(50, seed=1)]
    run(llm, first)
    forget(llm)
    run(llm, longer)
    assert llm.counters.load_failures == 1
    assert run(make_llm(), longer).num_external_tokens == 112, "what was computed again is what is stored"


def test_many_requests_under_pressure(make_llm, stored):
    """Loads, saves, preemptions and a damaged file in every round, all in one batch."""
    llm = make_llm(num_kv_blocks=16, max_num_batched_tokens=24)
    prompts = [prompt(40 + 9 * i, seed=i % 3) for i in range(6)]
    expected = [StubModel().expected_tokens(tokens, 20) for tokens in prompts]
    for block in range(3):
        outputs = llm.generate(prompts, SamplingParams(max_tokens=20, temperature=0))
        assert [output.outputs[0].token_ids for output in outputs] == expected
        forget(llm)
        spoil_byte(folder_of(stored, prompts[3], block) / "model.layers.1.self_attn.attn.0.safetensors")
    assert llm.scheduler.num_preemptions > 0
    assert llm.counters.load_failures > 0


def test_a_full_disk_costs_no_answer(make_llm, stored, monkeypatch, caplog):
    llm = make_llm()

    def fail(file, label, page):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("kvferry.examples.example._write", fail)
        run(llm, prompt(90))
    assert stored() == []
    assert "0 blocks not loaded, 5 not saved: no space left" in caplog.text
    forget(llm)
    run(llm, prompt(90))
    assert len(stored()) == 5


def test_no_flipped_byte_gets_through(tmp_path):
    page = torch.arange(24, dtype=torch.float32).view(1, 3, 2, 4)
    _write(tmp_path / "page", "label", page)
    assert torch.equal(_read(tmp_path / "page", "label", page), page)
    data = (tmp_path / "page").read_bytes()
    for i in range(len(data)):
        for flip in (0x01, 0x80):
            (tmp_path / "page").write_bytes(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
            try:
                assert torch.equal(_read(tmp_path / "page", "label", page), page), (i, flip)
            except TierCorrupt:
                continue
    for size in range(len(data)):
        (tmp_path / "page").write_bytes(data[:size])
        with pytest.raises(TierCorrupt):
            _read(tmp_path / "page", "label", page)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"extra": {"weights_version": None}}, "weights_version"),
        ({"extra": {"shared_storage_path": ""}}, "shared_storage_path must not be empty"),
        ({"extra": {"shared_storage_path": 3}}, "shared_storage_path=3 must be text"),
        ({"extra": {"shared_storage_path": "/proc/none"}}, "shared_storage_path='/proc/none'"),
        ({"extra": {"shared_path": "x"}}, "shared_path is unknown"),
        ({"block_size": 4}, "block_size=4"),
    ],
)
def test_bad_settings(make_llm, kwargs, text):
    with pytest.raises(ConfigError, match=text):
        make_llm(**kwargs)


def test_the_folder_must_be_named():
    transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    with pytest.raises(ConfigError, match="shared_storage_path is missing"):
        LLM(StubModel(), kv_transfer_config=transfer, block_size=BLOCK, num_kv_blocks=16)


def test_several_groups_are_refused(make_llm):
    model = StubModel(num_layers=2, windows=[None, 64])
    with pytest.raises(ConfigError, match=r"ExampleConnector.*does not support hybrid KV caches"):
        make_llm(model=model, disable_hybrid_kv_cache_manager=False)
