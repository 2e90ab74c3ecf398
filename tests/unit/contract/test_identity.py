"""The weights of an identity are those that the engine loaded."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry.config import KVTransferConfig
from kvferry.contract import FullAttentionSpec, make_kv_cache_config
from kvferry.contract.host import HostInfo, _hub_commit, _process_started_s, host_info
from kvferry.contract.identity import KeyMaker, check_identity, model_identity, peer_facts, settings_identity
from kvferry.contract.numerics import named_paths
from kvferry.contract.views import RequestView
from kvferry.errors import ConfigError
from kvferry.kv.fingerprint import fingerprint_folder, stamp_folder
from kvferry.p2p.geometry import EngineGeometry, GroupGeometry, RankGeometry, differences
from kvferry.types import AttentionKind


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
    fields = {
        "kv_transfer_config": KVTransferConfig("P2PConnector", kv_role="kv_both"),
        "parallel_config": SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, rank=0),
        "model_config": SimpleNamespace(model=str(folder), max_model_len=64),
    }
    config = SimpleNamespace(**(fields | more))
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
    with pytest.raises(ConfigError, match=r"changed while this engine loaded them.*start it again.*weights_version"):
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


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "config.json"])
def test_drafts_without_safetensors_are_told_apart_by_their_files(folder: Path, tmp_path: Path, name: str) -> None:
    """EAGLE's drafts are often one pytorch_model.bin; they were told apart by their path alone."""
    (draft := tmp_path / "draft").mkdir()
    (draft / "config.json").write_text("{}")
    found = set()
    for content in (b"{}", b"[]"):
        (draft / name).write_bytes(content)
        for path in [draft, draft / name]:
            found.add(settings_identity(replace(info(folder), draft_model=str(path)))["draft_model"])
    assert len(found) == (2 if name == "config.json" else 4)
    assert str(draft) not in found
    changed_s = (draft / name).stat().st_ctime
    with pytest.raises(ConfigError, match="changed while this engine loaded them"):
        settings_identity(replace(info(folder), draft_model=str(draft), loaded_after_s=changed_s - 1))
    assert (
        settings_identity(replace(info(folder), draft_model="organization/name"))["draft_model"] == "organization/name"
    )


def test_media_are_named_only_while_the_files_of_their_processor_are_those_that_were_read(folder: Path) -> None:
    """vLLM reads them before the engine's own process begins, and again for requests with processor settings."""
    (processor := folder / "processor_config.json").write_text('{"n_fft": 400}')
    item = SimpleNamespace(identifier="audio", mm_position=SimpleNamespace(offset=0, length=8))
    fields = {"request_id": "r", "num_tokens": 16, "prompt_token_ids": [1] * 16, "all_token_ids": [1] * 16}
    text, media = (RequestView(SimpleNamespace(**fields, mm_features=features)) for features in ([], [item]))
    host, changed_s = info(folder), max(path.stat().st_ctime for path in (processor, folder))
    assert host.media_read_after_s is None, "the model takes no media"
    is_media = SimpleNamespace(model=str(folder), max_model_len=64, multimodal_config=SimpleNamespace())
    started_s = info(folder, model_config=is_media).media_read_after_s
    assert started_s is not None
    assert started_s <= changed_s, "this process began before the folder was written"
    for read_after_s in (changed_s - 1, changed_s + 1):
        keys = KeyMaker.of(replace(host, media_read_after_s=read_after_s), "1")
        assert keys.chain(text) is not None
        assert (keys.chain(media) is not None) is (read_after_s > changed_s)
        assert (keys.no_media is None) is (read_after_s > changed_s)
    assert keys.is_certain(None)
    processor.write_text('{"n_fft": 8000}')
    assert not keys.is_certain(None)
    processor.write_text('{"n_fft": 400}')
    assert not keys.is_certain(None), "what was read in between is uncertain"


def test_what_stands_where_settings_point_to_is_part_of_the_settings(folder: Path, tmp_path: Path) -> None:
    """Some of vLLM's loaders take weights from `model_weights`, quantisations from a file that an override names."""
    other, file = tmp_path / "other", tmp_path / "quant.json"
    other.mkdir()

    def named(additional: object = None, **model: object) -> str:
        config = info(folder, additional_config=additional)
        model_config = SimpleNamespace(model=str(folder), **model)
        paths = named_paths(SimpleNamespace(model_config=model_config, additional_config=additional))
        return settings_identity(replace(config, named_paths=paths))["named_files"]

    found = []
    for content in (b"1", b"2"):
        (other / "model-rank-0-part-0.safetensors").write_bytes(content)
        file.write_bytes(content)
        found.append(named(model_weights=str(other)))
        by_file = {
            named(hf_overrides={"quantization_config_file": str(file)}),
            named(hf_overrides={"text_config": {"files": [str(file)]}}),
            named({"scales": str(file)}),
        }
        assert len(by_file) == 1
        found += by_file
    assert len({"none", *found}) == 5
    assert named() == named(model_weights=str(folder), hf_overrides={"a": "/no/file"}) == "none"


def named_by(folder: Path, hf_config: dict[str, Any] | None = None, **model: Any) -> str:
    shown = SimpleNamespace(to_dict=lambda: hf_config or {})
    config = info(folder, model_config=SimpleNamespace(model=str(folder), max_model_len=64, hf_config=shown, **model))
    return settings_identity(config)["named_files"]


@pytest.mark.parametrize(
    "place", ["adapters/retrieval/adapter_model.safetensors", "adapters/retrieval/adapter_config.json",
              "whisper-large-v3/model.safetensors", "audio_tokenizer/pytorch_model.bin"],
)  # fmt: skip
def test_weights_in_subfolders_of_the_model_are_part_of_the_settings(folder: Path, place: str) -> None:
    """vLLM's Jina embeddings merge an adapter of there into the weights: rewritten, the old one's KV was loaded."""
    assert named_by(folder) == "none"
    (folder / place).parent.mkdir(parents=True)
    (folder / place).parent.joinpath("model.safetensors").write_bytes(b"")
    found = []
    for content in (b"{}", b"{ }"):
        (folder / place).write_bytes(content)
        found.append(named_by(folder))
    assert len({"none", *found}) == 3
    assert named_by(folder, weights_stamp=stamp_folder(folder)) == "none", "our own engine reads no subfolders"


@pytest.mark.parametrize("place", [".git", "checkpoint-500"])
def test_what_no_model_reads_of_a_folder_is_no_part_of_the_settings(folder: Path, place: str) -> None:
    (folder / place).mkdir()
    (folder / place / "model.safetensors").write_bytes(b"1")
    assert named_by(folder) == "none"


def test_what_the_models_configuration_points_to_is_part_of_the_settings(folder: Path, tmp_path: Path) -> None:
    """Ultravox loads its language model from another folder, `auto_map` may name code in one."""
    other, code = tmp_path / "language-model", tmp_path / "code"
    for each in (other, code):
        each.mkdir()
    found = []
    for content in (b"1", b"2"):
        (other / "model.safetensors").write_bytes(content)
        (code / "modeling.py").write_bytes(content)
        found.append(named_by(folder, {"text_model_id": str(other)}))
        found.append(named_by(folder, {"text_config": {"text_model_id": str(other)}}))
        found.append(named_by(folder, {"auto_map": {"AutoModel": f"{code}--modeling.Model"}}))
    assert found[0] == found[1]
    assert found[3] == found[4]
    assert len({"none", *found}) == 5
    came_from = {"_name_or_path": str(other), "text_config": {"_name_or_path": str(other)}}
    assert named_by(folder, came_from) == named_by(folder, {"name": "org/none", "folder": str(folder)}) == "none"


def test_peers_whose_weights_have_only_a_hubs_name_compare_that(folder: Path) -> None:
    """Of two finetunings of one model all else is equal."""
    rank = RankGeometry(1, (1,), (GroupGeometry(16, AttentionKind.FULL, None),), ())
    one, other = (
        EngineGeometry((rank,), peer_facts(replace(info(folder), model=name), None)) for name in ("org/a", "org/b")
    )
    assert differences(one, one) == []
    assert differences(one, other) == ["model: source org/a, destination org/b"]
    version = peer_facts(replace(info(folder), model="org/a"), "7")
    assert version == peer_facts(replace(info(folder), model="org/b"), "7")
    assert "model" not in dict(peer_facts(info(folder), None))


def test_an_engine_without_overridden_model_classes_says_so_to_peers(folder: Path) -> None:
    """The embedded engine has no such setting, and took KV of vLLM engines that compute with another class."""
    rank = RankGeometry(1, (1,), (GroupGeometry(16, AttentionKind.FULL, None),), ())
    model = SimpleNamespace(model=str(folder), max_model_len=64, model_class_overrides={"A": "fleet:A"})
    hosts = info(folder, model_config=model), info(folder)
    other, plain = (EngineGeometry((rank,), peer_facts(host, None)) for host in hosts)
    assert differences(other, plain) == ['model_class_overrides: source {"A":"fleet:A"}, destination {}']


def test_peers_whose_weights_come_from_a_hub_compare_the_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a name stands for on a hub changes: an engine that starts later gets other weights under it."""
    rank = RankGeometry(1, (1,), (GroupGeometry(16, AttentionKind.FULL, None),), ())
    commits = {("org/a", None): "1" * 40, ("org/a", "old"): "2" * 40}

    def cached(name: str, file: str, cache_dir: str | None, revision: str | None) -> str | None:
        if name.startswith("s3:"):
            raise ValueError(name)
        is_there = (name, revision) in commits and file == "config.json" and cache_dir is None
        return str(tmp_path / commits[name, revision] / file) if is_there else None

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(try_to_load_from_cache=cached))

    def engine(model: str, revision: str | None = None) -> EngineGeometry:
        model_config = SimpleNamespace(model=model, revision=revision)
        commit = _hub_commit(SimpleNamespace(model_config=model_config))
        return EngineGeometry((rank,), peer_facts(replace(info(folder), model=model, hub_commit=commit), None))

    one, other, local = engine("org/a"), engine("org/a", "old"), engine(str(folder))
    assert differences(one, engine("org/a")) == []
    assert differences(one, other) == [
        f"weights: source org/a at commit {'1' * 40}, destination org/a at commit {'2' * 40}"
    ]
    assert [text.partition(":")[0] for text in differences(one, local)] == ["weights"]
    for unknown in ("org/b", "s3://bucket/a"):
        assert "weights" not in dict(engine(unknown).facts)


def test_files_that_settings_name_must_be_as_they_were_when_the_engine_read_them(folder: Path, tmp_path: Path) -> None:
    scales, processor = tmp_path / "quant.json", folder / "preprocessor_config.json"
    for file, host in ((scales, replace(info(folder), named_paths=(str(scales),))), (processor, info(folder))):
        file.write_text("{}")
        changed_s = file.stat().st_ctime
        assert settings_identity(replace(host, loaded_after_s=changed_s + 1))
        with pytest.raises(ConfigError, match="changed while this engine loaded them"):
            settings_identity(replace(host, loaded_after_s=changed_s - 1))


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


@pytest.mark.parametrize("load_format", ["npcache", "ipc_cache", "tensorizer", "of_a_plugin"])
def test_weights_from_elsewhere_are_not_named_by_the_folders_files(folder: Path, load_format: str) -> None:
    host = info(folder, load_config=SimpleNamespace(load_format=load_format))
    with pytest.raises(ConfigError, match=f"load_format {load_format} .*weights_version"):
        model_identity(host, None)
    assert model_identity(host, "7") == "version:7"
    assert "weights" not in dict(peer_facts(host, None))
    assert "weights" in dict(peer_facts(info(folder), None))


@pytest.mark.parametrize("is_prefix_cached", [False, True])
@pytest.mark.parametrize("media_cache_gb", [0, 4])
def test_media_that_the_host_numbers_do_not_name_kv(folder: Path, is_prefix_cached: bool, media_cache_gb: int) -> None:
    """With both of its caches off vLLM calls the first image of every process "renderer0-mm-1-image-0"."""
    media = SimpleNamespace(mm_processor_cache_gb=media_cache_gb)
    model = SimpleNamespace(model=str(folder), max_model_len=64, multimodal_config=media)
    host = info(folder, model_config=model, cache_config=SimpleNamespace(enable_prefix_caching=is_prefix_cached))
    keys = KeyMaker.of(replace(host, media_read_after_s=time.time() + 60), None)
    position = SimpleNamespace(offset=1, length=2)
    image = SimpleNamespace(mm_features=[SimpleNamespace(identifier="renderer0-mm-1-image-0", mm_position=position)])
    assert (keys.chain(RequestView(image)) is None) is (not is_prefix_cached and not media_cache_gb)
    assert keys.chain(RequestView(SimpleNamespace())) is not None, "without media the tokens tell all"


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


def put(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of weights that differ, in folders, and links to them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tmp_path / "root"
    for name, content in {"a/b/cur": b"1", "a/b/new": b"2", "a/c/cur": b"2", "d/b/cur": b"2"}.items():
        put(made / name, content)
    (made / "a/b/cur/second.safetensors").write_bytes(b"3")
    put(made / "blobs", b"1")
    (made / "blobs/other").write_bytes(b"2")
    (made / "linked").mkdir()
    for name, target in {
        "link": str(made / "a/b/cur"), "above": "a/b", "inner": "a/b/cur", "outer": "a/../inner",
        "linked/model.safetensors": "../blobs/model.safetensors",
    }.items():  # fmt: skip
        (made / name).symlink_to(target)
    return made


def time_between(root: Path) -> float:
    """By the file system's clock: later than all that was done before, and earlier than what will be done."""
    probe, deadline_s = root.parent / "probe", time.monotonic() + 10
    times: set[float] = set()
    while len(times) < 3:
        assert time.monotonic() < deadline_s
        probe.write_text("")
        times.add(probe.stat().st_ctime)
    return sorted(times)[1]


def swap(path: Path, other: Path) -> None:
    kept = path.with_name("kept")
    path.rename(kept)
    other.rename(path)
    kept.rename(other)


def relink(link: Path, target: str) -> None:
    made = link.with_name("made")
    made.symlink_to(target)
    made.rename(link)


SWAPS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "folder": ("a/b/cur", lambda root: swap(root / "a/b/cur", root / "a/b/new")),
    "folder above": ("a/b/cur", lambda root: swap(root / "a/b", root / "a/c")),
    "two above": ("a/b/cur", lambda root: swap(root / "a", root / "d")),
    "file": ("a/b/cur", lambda root: swap(root / "a/b/cur/model.safetensors", root / "a/b/new/model.safetensors")),
    "file goes": ("a/b/cur", lambda root: (root / "a/b/cur/second.safetensors").unlink()),
    "link": ("link", lambda root: relink(root / "link", "a/b/new")),
    "link behind a link": ("outer", lambda root: relink(root / "inner", "a/b/new")),
    "link on the path": ("above/cur", lambda root: relink(root / "above", "a/c")),
    "target of a file": ("linked", lambda root: swap(root / "blobs/model.safetensors", root / "blobs/other")),
}
"""Path of the weights, and what makes it lead to others whose files are older than the engine."""


def lora(path: Path, **more: int) -> RequestView:
    return RequestView(SimpleNamespace(lora_request=SimpleNamespace(lora_path=str(path), **more)))


def test_two_adapters_of_one_number_are_not_told_apart_by_the_host(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM asks for the number alone whether an adapter is loaded, and computes with the first for both."""
    keys, first, second = KeyMaker("m", (), 1), root / "a/b/cur", root / "a/b/new"
    assert keys.chain(lora(first, lora_int_id=1)) is not None
    assert keys.chain(lora(root / "a/c/cur", lora_int_id=2)) is not None
    assert keys.is_certain(str(first))
    assert keys.chain(lora(second, lora_int_id=1)) is None
    assert keys.chain(lora(first, lora_int_id=1)) is None, "which of them is loaded now is uncertain"
    assert not keys.is_certain(str(first))
    assert keys.chain(lora(second, lora_int_id=3)) is None
    assert keys.is_certain(str(root / "a/c/cur"))
    assert "lora_int_id 1 stands for" in keys.why_not(str(second))
    assert caplog.text.count("neither stored nor loaded") == 2


@pytest.mark.parametrize("name", SWAPS)
def test_weights_that_are_exchanged_for_older_files_are_noticed(root: Path, name: str) -> None:
    where, change = SWAPS[name]
    path, started_s = root / where, time_between(root)
    early = KeyMaker("m", (), 1, started_s=started_s)
    assert early.chain(lora(path)) is not None
    host = replace(info(path), loaded_after_s=started_s)
    assert model_identity(host, None) == fingerprint_folder(path)
    change(root)
    late = KeyMaker("m", (), 1, started_s=started_s)
    assert late.chain(lora(path)) is None, "the engine may have loaded it before"
    assert not early.is_certain(str(path))
    with pytest.raises(ConfigError, match="changed while this engine loaded them"):
        model_identity(host, None)
    with pytest.raises(ConfigError, match="changed while this engine loaded them"):
        settings_identity(replace(host, model="another", draft_model=str(path)))
    assert KeyMaker("m", (), 1, started_s=time_between(root)).chain(lora(path)) is not None, "a restart helps"


def test_an_adapter_that_was_another_for_a_while_is_certain_no_more(root: Path) -> None:
    """It may have been loaded again meanwhile."""
    folder, link = root / "a/b/cur", root / "link"
    keys = KeyMaker("m", (), 1, started_s=time_between(root))
    for path in (folder, link):
        assert keys.chain(lora(path)) is not None
    relink(link, "a/b/new")
    relink(link, str(folder))
    assert not keys.is_certain(str(link))
    assert keys.is_certain(str(folder))
    swap(folder, root / "a/b/new")
    swap(folder, root / "a/b/new")
    assert not keys.is_certain(str(folder))


def test_what_comes_and_goes_beside_weights_harms_nothing(root: Path) -> None:
    path, started_s = root / "a/b/cur", time_between(root)
    early, late = (KeyMaker("m", (), 1, started_s=started_s) for _ in range(2))
    host = replace(info(path), loaded_after_s=started_s)
    assert early.chain(lora(path)) is not None
    put(root / "a/b/more", b"4")
    assert late.chain(lora(path)) is not None, "the folder around has not been renamed: the one around it is old"
    put(root / "a/more", b"4")
    (root / "more").touch()
    assert model_identity(host, None) == fingerprint_folder(path)
    for keys in (early, late):
        assert keys.is_certain(str(path))
    strict = KeyMaker("m", (), 1, started_s=started_s)
    assert strict.chain(lora(path)) is None, "any of the folders may have been renamed"
    assert "on its path changed" in strict.why_not(str(path))


def test_a_relative_path_means_the_folder_that_it_meant_at_the_start(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / "a/b")
    keys = KeyMaker("m", (), 1, started_s=time_between(root))
    assert keys.chain(lora(Path("cur"))) is not None
    monkeypatch.chdir(root / "a/c")
    assert not keys.is_certain("cur")
    assert KeyMaker("m", (), 1, started_s=time_between(root)).chain(lora(Path("cur"))) is not None
    monkeypatch.chdir(root / "a/b")
    assert keys.chain(lora(Path("../b/cur"))) is not None
    monkeypatch.chdir(root / "a/c")
    assert keys.chain(lora(Path("../c/cur"))) is None


def test_links_in_a_circle_are_no_folder(root: Path) -> None:
    (root / "one").symlink_to("two")
    (root / "two").symlink_to("one")
    keys = KeyMaker("m", (), 1)
    assert keys.chain(lora(root / "one/cur")) is None
    assert "cannot be read" in keys.why_not(str(root / "one/cur"))


def differing(one: HostInfo, other: HostInfo) -> list[str]:
    rank = RankGeometry(1, (1,), (GroupGeometry(16, AttentionKind.FULL, None),), ())
    a, b = (EngineGeometry((rank,), peer_facts(host, "1")) for host in (one, other))
    return [line.partition(":")[0] for line in differences(a, b)]


def test_what_only_one_peer_has_counts_where_the_other_could_have_it(folder: Path) -> None:
    plain = info(folder, additional_config={}, engram_config=None)
    set_up = info(folder, additional_config={"x": 1}, engram_config=None)
    assert differing(plain, info(folder, additional_config=None, engram_config={})) == []
    assert differing(plain, set_up) == differing(set_up, plain) == ["additional_config"]
    assert differing(info(folder), set_up) == [], "our engine has no such setting"
    (folder / "preprocessor_config.json").write_text("{}")
    processed = peer_facts(plain, "1")
    (folder / "preprocessor_config.json").unlink()
    assert {name for name, _ in {*processed} ^ {*peer_facts(plain, "1")}} == {"media_processor"}
    assert dict(peer_facts(plain, "1"))["media_processor"] == "none"
    by_name = replace(plain, model="organization/name")
    assert differing(plain, by_name) == differing(by_name, plain) == []


def test_a_draft_of_the_models_own_is_another_than_one_from_elsewhere(folder: Path, root: Path) -> None:
    """A draft on one side only makes no difference here: its layers, if it has any, are missing on the other."""

    def drafting(model: Path) -> HostInfo:
        return info(folder, speculative_config=SimpleNamespace(draft_model_config=SimpleNamespace(model=str(model))))

    own, other = drafting(folder), drafting(root / "a/b/new")
    assert differing(own, other) == differing(other, own) == ["draft_model"]
    assert differing(own, drafting(folder)) == differing(info(folder), other) == []
    target = SimpleNamespace(model=str(folder))
    by_tokens = SimpleNamespace(draft_model_config=target, target_model_config=target)
    assert settings_identity(info(folder, speculative_config=by_tokens)) == settings_identity(info(folder))
