"""The weights of an identity are those that the engine loaded."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry.config import KVTransferConfig
from kvferry.connectors.identity import KeyMaker, check_identity, model_identity, peer_facts, settings_identity
from kvferry.contract import FullAttentionSpec, make_kv_cache_config
from kvferry.contract.host import HostInfo, _process_started_s, host_info
from kvferry.errors import ConfigError
from kvferry.fingerprint import fingerprint_folder, stamp_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(1000))
    return made


def info(folder: Path, **more: Any) -> HostInfo:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=4, dtype=torch.float32)
    config = SimpleNamespace(
        kv_transfer_config=KVTransferConfig("P2PConnector", kv_role="kv_both"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, rank=0),
        model_config=SimpleNamespace(model=str(folder), max_model_len=64),
        **more,
    )
    return host_info(config, make_kv_cache_config(4, {"layer": spec}))


def test_a_rewrite_with_the_times_set_back_is_seen(folder: Path) -> None:
    before, weights = fingerprint_folder(folder), folder / "model.safetensors"
    status = weights.stat()
    deadline_s = time.monotonic() + 10
    while weights.stat().st_ctime_ns == status.st_ctime_ns:  # the file system's clock ticks slowly
        assert time.monotonic() < deadline_s
        weights.write_bytes(bytes(999) + b"x")
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights.stat().st_mtime_ns == status.st_mtime_ns
    assert fingerprint_folder(folder) != before


def test_weights_that_change_while_they_are_loaded_end_the_start(folder: Path) -> None:
    stamp = stamp_folder(folder)
    host = replace(info(folder), weights_stamp=stamp)
    assert model_identity(host, None) == fingerprint_folder(folder)
    (folder / "model.safetensors").write_bytes(bytes(1001))
    with pytest.raises(ConfigError, match=r"changed while this engine loaded them.*start it again"):
        model_identity(host, None)
    assert model_identity(host, "7") == "version:7"
    changed_s = (folder / "model.safetensors").stat().st_ctime
    assert model_identity(replace(info(folder), loaded_after_s=changed_s + 1), None)
    with pytest.raises(ConfigError, match="changed while this engine loaded them"):
        model_identity(replace(info(folder), loaded_after_s=changed_s - 1), None)


def tell_start(queue: Any) -> None:
    queue.put((_process_started_s(), time.time()))


def test_a_process_made_for_an_engine_knows_when_it_began() -> None:
    assert _process_started_s() is None, "tests' own process may have written the weights"
    context = multiprocessing.get_context("spawn")
    queue, before_s = context.Queue(), time.time()
    child = context.Process(target=tell_start, args=(queue,))
    child.start()
    started_s, now_s = queue.get(timeout=60)
    child.join(60)
    assert before_s - 0.1 <= started_s <= now_s


def test_the_media_processors_files_are_part_of_the_settings(folder: Path) -> None:
    plain = settings_identity(info(folder))
    (folder / "preprocessor_config.json").write_text('{"size": 224}')
    small = settings_identity(info(folder))
    (folder / "preprocessor_config.json").write_text('{"size": 448}')
    large = settings_identity(info(folder))
    assert plain != small != large
    assert dict(peer_facts(info(folder), None))["media_processor"] == large["media_processor"]


def test_the_draft_model_is_part_of_the_settings(folder: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(bytes(10))
    speculative = SimpleNamespace(method="eagle", draft_model_config=SimpleNamespace(model=str(draft)))
    one = settings_identity(info(folder, speculative_config=speculative))
    (draft / "model.safetensors").write_bytes(bytes(11))
    other = settings_identity(info(folder, speculative_config=speculative))
    assert settings_identity(info(folder)) != one != other


def test_of_very_many_settings_each_counts_for_peers(folder: Path) -> None:
    settings = {f"hf_config.{i:04}": "1" for i in range(5000)}
    facts = peer_facts(replace(info(folder), numerics=settings), None)
    assert len(facts) < 1024
    last = peer_facts(replace(info(folder), numerics={**settings, "hf_config.4999": "2"}), None)
    first = peer_facts(replace(info(folder), numerics={**settings, "hf_config.0000": "2"}), None)
    assert len({facts, last, first}) == 3


def test_a_folder_without_safetensors_is_told_before_anything_is_read(folder: Path) -> None:
    """What doctor asks, too."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="weights_version"):
        check_identity(info(folder), None)
    check_identity(info(folder), "1")


def test_weights_that_change_in_the_running_engine_are_certain_no_more(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Engines map the files: one that is overwritten in place changes the running model."""
    host = info(folder)
    keys, vouched = KeyMaker.of(host, None), KeyMaker.of(host, "1")
    assert keys.is_certain(None)
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.write(b"other")
    assert not keys.is_certain(None)
    assert not keys.is_certain(None)
    assert "changed" in keys.why_not(None)
    assert vouched.is_certain(None)
    assert caplog.text.count("neither stored nor loaded") == 1
