"""Both sides of the ExampleHiddenStatesConnector by hand, as vLLM calls them: rows are paged, files are only ours."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvferry.clock import FakeClock
from kvferry.config import KVTransferConfig
from kvferry.contract import FullAttentionSpec, KVConnectorFactory, make_kv_cache_config
from kvferry.contract.host import host_info
from kvferry.contract.identity import peer_facts, settings_identity
from kvferry.contract.kv_cache import KVConnectorOutput
from kvferry.contract.views import RequestView, ScheduledRequest, StepView
from kvferry.errors import ConfigError, TierCorrupt, TierUnavailable
from kvferry.examples.hidden_states import (
    HiddenStatesMetadata,
    HiddenStatesSchedulerSide,
    HiddenStatesWorkerSide,
    load_hidden_states,
)
from kvferry.offloading.config import ChunkGeometry
from kvferry.offloading.identity import store_namespace

BLOCK, KERNEL_BLOCK, STATES, HIDDEN, NUM_BLOCKS = 8, 4, 2, 3, 16
KV = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=4, dtype=torch.float32)
PAGES = FullAttentionSpec(block_size=BLOCK, num_kv_heads=STATES, head_size=HIDDEN, dtype=torch.float32, head_size_v=0)
LAYER = "cache_only_layers.5"


def speculative(method: str = "extract_hidden_states", ids: tuple[int, ...] = (3, 1)) -> Any:
    draft = SimpleNamespace(hf_config=SimpleNamespace(eagle_aux_hidden_state_layer_ids=list(ids)))
    return SimpleNamespace(method=method, draft_model_config=draft)


def info(folder: Path, rank: int = 0, pp: int = 1, spec: Any = None, **extra: Any) -> Any:
    settings = {"shared_storage_path": str(folder), **extra}
    config = SimpleNamespace(
        kv_transfer_config=KVTransferConfig("C", kv_role="kv_producer", kv_connector_extra_config=settings),
        model_config=SimpleNamespace(model="m", max_model_len=512),
        parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=pp, rank=rank),
        speculative_config=spec or speculative(),
    )
    return host_info(config, make_kv_cache_config(NUM_BLOCKS, [{"attn": KV}, {LAYER: PAGES}]))


class Host:
    """Both sides, pages whose rows tell their place, and requests as vLLM has them."""

    def __init__(self, folder: Path, rank: int = 0, **extra: Any) -> None:
        self.folder = folder
        self.scheduler = HiddenStatesSchedulerSide(info(folder, **extra))
        self.worker = HiddenStatesWorkerSide(info(folder, rank, **extra))
        rows = torch.arange(NUM_BLOCKS * BLOCK * STATES * HIDDEN, dtype=torch.float32)
        by_token = rows.view(-1, KERNEL_BLOCK, STATES, HIDDEN)  # two kernel blocks to a block
        self.pages = by_token.transpose(1, 2)
        self.worker.register_kv_caches({"attn": torch.zeros(NUM_BLOCKS, 1, 16, 8), LAYER: self.pages})
        self.requests: dict[str, Any] = {}

    def add(self, request_id: str, num_tokens: int, **more: Any) -> Any:
        tokens = list(range(100, 100 + num_tokens))
        fields = {"all_token_ids": tokens, "num_tokens": num_tokens, "status": SimpleNamespace(name="RUNNING"), **more}
        self.requests[request_id] = SimpleNamespace(request_id=request_id, **fields)
        self.scheduler.on_new_request(RequestView(self.requests[request_id]))
        return self.requests[request_id]

    def step(self, *parts: tuple[str, int, int, list[int]], has_rows: bool = True, **view: Any) -> HiddenStatesMetadata:
        """Each part: request, tokens computed before, tokens computed now, its blocks in the group of hidden states."""
        items = [ScheduledRequest(name, first, num, ([1, 2, 3, 4], blocks)) for name, first, num, blocks in parts]
        metadata = self.scheduler.build_connector_meta(StepView(items, **view))
        self.worker.handle_preemptions(metadata)
        self.worker.start_load_kv(metadata)
        if has_rows:
            self.worker.save_kv_layer(LAYER, self.pages, None)
        self.worker.save_kv_layer("attn", torch.zeros(1), None)
        self.worker.wait_for_save(metadata)
        return metadata

    def finish(self, request_id: str, status: str = "FINISHED_LENGTH_CAPPED") -> str | None:
        self.requests[request_id].status.name = status
        keep, params = self.scheduler.request_finished(RequestView(self.requests[request_id]), ([], []))
        assert keep is False
        return None if params is None else params["hidden_states_path"]

    def row(self, blocks: list[int], token: int) -> list[list[float]]:
        """What lies at a token's place, by the order in which the pages were numbered."""
        first = (blocks[token // BLOCK] * BLOCK + token % BLOCK) * STATES * HIDDEN
        return [[float(first + state * HIDDEN + i) for i in range(HIDDEN)] for state in range(STATES)]

    def settle(self) -> list[str]:
        assert self.worker._writer.drain(10)
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def host(tmp_path: Path) -> Any:
    made = Host(tmp_path / "hs")
    yield made
    made.worker.shutdown()
    made.scheduler.shutdown()


def test_rows_of_cached_and_computed_blocks_alike(host: Host) -> None:
    blocks = [7, 2, 11]
    host.add("r", 19)
    host.step(("r", 8, 5, blocks[:2]))  # the first block was a hit
    assert host.settle() == []
    host.step(("r", 13, 6, blocks))
    host.pages.zero_()  # the blocks belong to others by now
    host.step(("r", 19, 1, [*blocks, 3]))
    path = host.finish("r")
    assert path is not None
    assert host.settle() == [Path(path).name]
    found = load_hidden_states(path)
    assert found["token_ids"].tolist() == list(range(100, 119))
    assert found["hidden_states"].tolist() == [host.row(blocks, token) for token in range(19)]


def test_one_file_for_a_request_that_is_preempted_later(host: Host) -> None:
    host.add("r", 8)
    host.step(("r", 0, 8, [5]))
    host.step(("r", 0, 9, [6, 7]), preempted_req_ids=frozenset())
    path = host.finish("r")
    assert path is not None
    assert host.settle() == [Path(path).name]
    assert load_file(path)["hidden_states"].tolist() == [host.row([5], token) for token in range(8)]


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    host = Host(tmp_path / "hs", rank=1)
    host.add("r", 8)
    host.step(("r", 0, 8, [5]))
    assert host.settle() == []
    host.worker.shutdown()


@pytest.mark.parametrize("status", ["FINISHED_ABORTED", "FINISHED_ERROR", "FINISHED_IGNORED"])
def test_no_file_of_a_request_that_was_cut_short(host: Host, status: str) -> None:
    host.add("r", 8)
    host.step(("r", 0, 8, [5]))
    assert len(host.settle()) == 1
    assert host.finish("r", status) is None
    host.step(finished_req_ids=frozenset({"r"}))
    assert host.settle() == []


def test_a_request_that_never_ran_has_no_path(host: Host) -> None:
    host.add("r", 8)
    assert host.finish("r") is None


def test_what_was_computed_over_a_failed_load_is_replaced(host: Host) -> None:
    for name in ("hit", "other"):
        host.add(name, 8)
    items = [ScheduledRequest("hit", 0, 8, ([3], [5])), ScheduledRequest("other", 0, 8, ([9], [6]))]
    first = host.scheduler.build_connector_meta(StepView(items))
    host.scheduler.update_connector_output(KVConnectorOutput(invalid_block_ids={3}))
    again = host.scheduler.build_connector_meta(StepView(items))
    old, kept = (part.file.name for part in first.parts if part.file is not None)
    assert again.discards == [old]
    assert [part.request_id for part in again.parts if part.file is not None] == ["hit"]
    assert Path(str(host.finish("hit"))).name != old
    assert Path(str(host.finish("other"))).name == kept


def test_a_step_without_rows_is_told(host: Host) -> None:
    host.add("a", 12)
    host.step(("a", 0, 8, [5, 6]), has_rows=False)
    host.step(("a", 8, 4, [5, 6]))
    path = host.finish("a")
    assert path is not None
    assert host.settle() == [f"{Path(path).name}.error"]
    with pytest.raises(TierUnavailable, match="did not hand on all of its hidden states"):
        load_hidden_states(path)
    host.step(finished_req_ids=frozenset({"a"}))
    host.add("a", 12)  # another of the same name
    host.step(("a", 0, 12, [5, 6]))
    assert load_hidden_states(str(host.finish("a")))["token_ids"].shape == (12,)


def test_too_many_files_waiting_are_dropped_and_told(tmp_path: Path) -> None:
    host, gate = Host(tmp_path / "hs", max_pending_files=1), threading.Event()
    host.worker._next_sweep_s = float("inf")
    started = threading.Event()
    host.worker._submit(lambda: (started.set(), gate.wait(10)))  # type: ignore[arg-type,func-returns-value]
    assert started.wait(10)
    for name in ("a", "b"):
        host.add(name, 8)
        host.step((name, 0, 8, [5]))
    gate.set()
    paths = [str(host.finish(name)) for name in ("a", "b")]
    assert load_hidden_states(paths[0])["token_ids"].shape == (8,)
    with pytest.raises(TierUnavailable, match="max_pending_files"):
        load_hidden_states(paths[1])
    host.worker.shutdown()


def test_a_write_that_fails_is_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvferry.examples import hidden_states

    def full(path: Path, data: bytes) -> None:
        if path.suffix == ".safetensors":
            raise OSError(28, "No space left on device")
        real(path, data)

    real = hidden_states._write_file
    monkeypatch.setattr(hidden_states, "_write_file", full)
    host.add("r", 8)
    host.step(("r", 0, 8, [5]))
    with pytest.raises(TierUnavailable, match="No space left on device"):
        load_hidden_states(str(host.finish("r")))


def test_links_are_not_followed(tmp_path: Path) -> None:
    from kvferry.examples import hidden_states

    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "file.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        hidden_states._write_file(tmp_path / "file", b"data")
    assert victim.read_text() == "precious"
    (tmp_path / "file").symlink_to(victim)
    hidden_states._write_file(tmp_path / "file", b"data")
    assert victim.read_text() == "precious"
    assert (tmp_path / "file").read_bytes() == b"data"
    assert not (tmp_path / "file").is_symlink()


def test_sweep(host: Host) -> None:
    clock = FakeClock()
    host.worker.clock, host.worker._next_sweep_s = clock, 60.0
    stem, old_s = "r-0123456789abcdef.safetensors", time.time() - 90000
    ours = [stem, f"{stem}.tmp", f"{stem}.error", f"{stem}.error.tmp"]
    for name in [*ours, "notes.safetensors", "r-0123.safetensors", "a-0123456789abcdef.safetensors.bak"]:
        (host.folder / name).write_text(name)
        os.utime(host.folder / name, (old_s, old_s))
    (host.folder / "new-0123456789abcdef.safetensors").write_text("new")
    (host.folder / "link-0123456789abcdef.safetensors").symlink_to(host.folder / "notes.safetensors")
    host.step()
    assert len(host.settle()) == 9, "not due yet"
    clock.advance(60)
    host.step()
    kept = {"notes.safetensors", "r-0123.safetensors", "a-0123456789abcdef.safetensors.bak"}
    assert set(host.settle()) == kept | {"new-0123456789abcdef.safetensors", "link-0123456789abcdef.safetensors"}


def test_without_ttl_nothing_is_swept(tmp_path: Path) -> None:
    host = Host(tmp_path / "hs", ttl_s=None)
    old = host.folder / "r-0123456789abcdef.safetensors"
    old.write_text("old")
    os.utime(old, (0, 0))
    host.step()
    assert host.settle() == [old.name]
    host.worker.shutdown()


def test_waiting_ends_at_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(TierUnavailable, match=r"did not appear within 0\.0 s"):
        load_hidden_states(tmp_path / "x.safetensors", timeout_s=0.0)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"ttl_s": -1}, "ttl_s=-1 must be at least 1"),
        ({"ttl_s": "1"}, "ttl_s='1' must be float or null"),
        ({"max_pending_files": 0}, "max_pending_files=0 must be at least 1"),
        ({"shared_storage_path": ""}, "shared_storage_path must not be empty"),
        ({"shared_storage_paht": "x"}, "did you mean 'shared_storage_path'"),
        ({"shared_storage_path": "/dev/null"}, "shared_storage_path='/dev/null'"),
        ({"shared_storage_path": "/dev/null/x"}, "shared_storage_path='/dev/null/x'"),
        ({"pp": 2}, "pipeline_parallel_size=2"),
        ({"spec": speculative("eagle3")}, "gets no hidden states from this engine"),
    ],
)
def test_bad_settings(tmp_path: Path, extra: dict[str, Any], text: str) -> None:
    for side in (HiddenStatesSchedulerSide, HiddenStatesWorkerSide):
        with pytest.raises(ConfigError, match=text):
            side(info(tmp_path / "hs", **extra))


def test_the_folder_is_required() -> None:
    config = info(Path("unused"))
    with pytest.raises(ConfigError, match="shared_storage_path is missing"):
        HiddenStatesSchedulerSide(SimpleNamespace(**{**_fields(config), "extra_config": {}}))  # type: ignore[arg-type]


def _fields(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in (*config.__dataclass_fields__, "world_size")}


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hs").mkdir()
    (tmp_path / "hs").chmod(0o777)
    with pytest.raises(ConfigError, match="other users can write there"):
        HiddenStatesSchedulerSide(info(tmp_path / "hs"))


def test_the_host_tells_the_states_in_the_order_of_the_rows() -> None:
    assert info(Path("unused")).hidden_state_layers == (1, 3)


def test_it_supports_hybrid_caches() -> None:
    transfer = KVTransferConfig("ExampleHiddenStatesConnector", kv_role="kv_producer")
    assert KVConnectorFactory.supports_hma_config(transfer)


def written(host: Host) -> Path:
    host.add("r", 5)
    host.step(("r", 0, 5, [5]))
    path = host.finish("r")
    assert path is not None
    host.settle()
    return Path(path)


def load_unless_corrupt(path: Path) -> dict[str, torch.Tensor] | None:
    try:
        return load_hidden_states(path)
    except TierCorrupt:
        return None


def test_no_flipped_bit_of_a_file_is_taken_for_hidden_states(host: Host) -> None:
    path = written(host)
    data, expected = path.read_bytes(), load_file(path)
    for bit in range(8 * len(data)):
        spoilt = bytearray(data)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        if (found := load_unless_corrupt(path)) is not None:  # the key of the digest: as in a file that has none
            assert bit // 8 in range(data.index(b'"digest"'), data.index(b'"digest"') + 8), bit
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_flipped_bit_of_the_states_is_named_as_such_and_can_be_looked_at(host: Host) -> None:
    path = written(host)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 0x40]))
    with pytest.raises(TierCorrupt, match="changed after it was written"):
        load_hidden_states(path)
    assert load_hidden_states(path, verify=False).keys() == load_file(path).keys()


@pytest.mark.parametrize("about", [None, {"model": "m", "identity": ""}])
def test_files_of_before_digests_are_read(tmp_path: Path, about: dict[str, str] | None) -> None:
    tensors = {"hidden_states": torch.ones(2, 1, 3), "token_ids": torch.tensor([4, 5])}
    save_file(tensors, tmp_path / "old.safetensors", about)
    found = load_hidden_states(tmp_path / "old.safetensors", token_ids=[4, 5])
    assert torch.equal(found["hidden_states"], tensors["hidden_states"])


def test_a_file_that_is_cut_is_corrupt(host: Host) -> None:
    path = written(host)
    data = path.read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(TierCorrupt, match="changed after it was written"):
            load_hidden_states(path)


def test_a_file_says_what_it_is_of(host: Host, tmp_path: Path) -> None:
    adapter = SimpleNamespace(lora_path=str(tmp_path / "none"))
    picture = SimpleNamespace(identifier="p", mm_position=SimpleNamespace(offset=0, length=2))
    variants: list[dict[str, Any]] = [
        {}, {}, {"cache_salt": "a"}, {"mm_features": [picture]}, {"lora_request": adapter},
    ]  # fmt: skip
    identities = []
    for number, fields in enumerate(variants):
        request = host.add(f"r{number}", 5, **fields)
        (part,) = host.step((f"r{number}", 0, 5, [5])).parts
        path = host.finish(f"r{number}")
        assert path is not None
        host.settle()
        with safe_open(path, "pt") as file:
            assert file.metadata()["identity"] == part.file.identity
        identities.append(part.file.identity)
        assert load_hidden_states(path, token_ids=request.all_token_ids)["token_ids"].tolist() == [*range(100, 105)]
        with pytest.raises(TierCorrupt, match="of 5 other tokens"):
            load_hidden_states(path, token_ids=[*range(101, 106)])
        assert load_hidden_states(path, layers=[3, 1])["token_ids"].shape == (5,)
        with pytest.raises(TierCorrupt, match=r"of layers \[1, 3\], not of \[1, 2\]"):
            load_hidden_states(path, layers=(1, 2))
    assert identities[0] == identities[1] != ""
    assert len(set(identities)) == 4
    assert identities[-1] == "", "nobody knows what the adapter held"


@pytest.mark.parametrize("fields", [{}, {"cache_salt": "a"}, {"lora_request": SimpleNamespace(lora_path="/none")}])
def test_two_requests_files_that_were_exchanged_are_noticed_also_with_equal_tokens(
    host: Host, fields: dict[str, Any]
) -> None:
    paths = []
    for name, more in (("first", {}), ("second", fields)):
        host.add(name, 5, **more)
        host.step((name, 0, 5, [5]))
        paths.append(Path(host.finish(name) or ""))
        host.settle()
    first, second = (path.read_bytes() for path in paths)
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    for path, other in zip(paths, reversed(paths), strict=True):
        with pytest.raises(TierCorrupt, match=f"another request's file: it was written as '{other.name}'"):
            load_hidden_states(path, token_ids=[*range(100, 105)])
        assert load_hidden_states(path, verify=False)["token_ids"].shape == (5,)


def test_which_states_are_paged_is_part_of_what_the_caches_hold(tmp_path: Path) -> None:
    """Whoever stores or serves the KV cache stores them too."""
    one, again, other = (info(tmp_path, spec=speculative(ids=ids)) for ids in ((1, 2), (2, 1), (2, 3)))
    assert settings_identity(one) == settings_identity(again) != settings_identity(other)
    assert dict(peer_facts(one, "1"))["hidden_state_layers"] == "[1, 2]"
    geometry = ChunkGeometry(64, 16, (), 0, 0)
    names = [store_namespace(host, geometry, {}).digest for host in (one, again, other)]
    assert names[0] == names[1] != names[2]


def test_states_that_are_not_paged_make_no_other_cache(tmp_path: Path) -> None:
    """The embedded engine's: their layers are part of what their files are of, and of nothing else."""
    host = replace(info(tmp_path), groups=info(tmp_path).groups[:1])
    assert settings_identity(host) == settings_identity(replace(host, hidden_state_layers=()))
    request = RequestView(SimpleNamespace(all_token_ids=[1]))
    one, other = (
        HiddenStatesSchedulerSide(replace(host, hidden_state_layers=layers))._identity(request)
        for layers in ((1,), (2,))
    )
    assert "" != one != other != ""
