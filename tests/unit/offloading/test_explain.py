"""Why a prefix is a hit or not, as the OffloadingConnector tells it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.unit.offloading.mini_host import CONTENT, HEADS, LAYERS, OTHER_TABLE, TABLE, TOKENS, MiniHost, chain_of

from kvferry.contract.explain import PrefixRange
from kvferry.contract.views import RequestView
from kvferry.kv.keys import store_key

CHUNK_BYTES = 64 * LAYERS * HEADS * CONTENT * 4
TAIL = PrefixRange(192, 200, "nowhere", "less than one chunk of 64 tokens")


def explained(host: MiniHost, tokens: list[int] = TOKENS, num_local: int = 0, **fields: Any) -> list[PrefixRange]:
    return host.side.explain_prefix(RequestView(host.request("probe", tokens, **fields)), num_local)


def key_of(host: MiniHost, chunk: int) -> Any:
    return store_key(chain_of(host, TOKENS).value_at(64 * (chunk + 1)), 0, 0)


def test_from_never_stored_over_host_to_disk(make_host: Any, tmp_path: Path) -> None:
    tier = {"type": "fs", "path": str(tmp_path / "kv")}
    host: MiniHost = make_host({"secondary_tiers": [tier], "cpu_bytes_to_use": 3 * CHUNK_BYTES})
    assert explained(host) == [PrefixRange(0, 192, "nowhere", "never stored"), TAIL]
    host.run_and_store("a", TOKENS, TABLE)
    assert explained(host) == [PrefixRange(0, 192, "host", "in host memory"), TAIL]
    assert explained(host, num_local=80)[0] == PrefixRange(80, 192, "host", "in host memory")
    assert explained(host, num_local=200) == []
    assert host.side.store.flush(20)
    host.run_and_store("b", [7] * 64, OTHER_TABLE)
    assert explained(host) == [
        PrefixRange(0, 64, "fs", "in fs, not in host memory"),
        PrefixRange(64, 192, "host", "in host memory"),
        TAIL,
    ]
    assert "probe" not in host.side._requests, "asking leaves nothing behind"


def test_what_lies_behind_a_hole_is_of_no_use(make_host: Any) -> None:
    host: MiniHost = make_host()
    host.run_and_store("a", TOKENS, TABLE)
    host.side.store.invalidate(key_of(host, 1), "bad luck")
    assert explained(host) == [
        PrefixRange(0, 64, "host", "in host memory"),
        PrefixRange(64, 128, "nowhere", "invalidated: bad luck"),
        PrefixRange(128, 192, "host", "in host memory, but of no use: a chunk before it is missing"),
        TAIL,
    ]


def test_one_missing_shard_is_a_missing_chunk(make_host: Any) -> None:
    host: MiniHost = make_host(tp=2)
    host.run_and_store("a", TOKENS[:128], TABLE)
    other_rank = store_key(chain_of(host, TOKENS).value_at(64), 0, 1)
    host.side.store.invalidate(other_rank, "bad luck")
    assert explained(host)[0] == PrefixRange(0, 64, "nowhere", "invalidated: bad luck")


def test_request_whose_load_failed_would_not_load_it(make_host: Any) -> None:
    host: MiniHost = make_host()
    host.run_and_store("a", TOKENS, TABLE)
    view, claim, _ = host.lookup("b", TOKENS)
    host.side._arena.bump(next(iter(host.side._state(view).pins.values())).slot)
    host.load(view, OTHER_TABLE, claim)
    failed = host.side.explain_prefix(view, 0)[0]
    assert failed.reason == "in host memory, but this request's earlier load failed, so it claims nothing more"


def test_what_tokens_do_not_identify_is_not_cacheable(make_host: Any) -> None:
    host: MiniHost = make_host()
    for fields, reason in (
        ({"prompt_embeds": object()}, "not cacheable: the prompt is not (only) token ids"),
        (
            {"lora_request": SimpleNamespace(lora_path="/no")},
            "not cacheable: LoRA adapter /no: it cannot be read: ",
        ),
    ):
        (run,) = explained(host, **fields)
        assert (run.first_token, run.end_token, run.place) == (0, 200, "nowhere")
        assert run.reason.startswith(reason)


def test_groups_are_told_apart(make_host: Any) -> None:
    host: MiniHost = make_host(window=64)
    host.run_and_store("a", TOKENS, (TABLE[0], OTHER_TABLE[0]))
    host.side.store.invalidate(store_key(chain_of(host, TOKENS).value_at(64), 1, 0), "bad luck")
    assert [(r.group_id, r.first_token, r.end_token, r.place) for r in explained(host)] == [
        (0, 0, 192, "host"),
        (0, 192, 200, "nowhere"),
        (1, 0, 64, "nowhere"),
        (1, 64, 192, "host"),  # a window needs no chunk before it
        (1, 192, 200, "nowhere"),
    ]


def test_a_store_without_room_is_remembered(make_host: Any) -> None:
    host: MiniHost = make_host({"cpu_bytes_to_use": CHUNK_BYTES})
    host.run_and_store("a", TOKENS[:128], TABLE)
    assert explained(host)[:2] == [
        PrefixRange(0, 64, "host", "in host memory"),
        PrefixRange(64, 128, "nowhere", "computed, but not stored: no slot is free in host memory"),
    ]
