"""The disaggregated act: each thing that can be wrong fails its own proof, and says so."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvferry.cli import demo_handover
from kvferry.cli.demo_handover import HandoverAct
from kvferry.cli.demo_report import Proof

ANSWER: dict[str, Any] = {
    "ttft_s": 2.0, "prompt_tokens": 40, "tokens_from_host": 0, "tokens_from_disk": 0, "tokens_from_peer": 0,
    "tokens_computed": 40, "token_ids": [5, 6, 7], "logit_gaps": [], "text": "x", "block_digests": [],
}  # fmt: skip
HANDED = {"tokens_from_peer": 40, "tokens_computed": 0, "ttft_s": 0.1, "block_digests": ["a", "b", "c"]}
RIGHT: dict[str, dict[str, Any]] = {
    "open_peer": {"kv_bytes_per_token": 100},
    "compute": ANSWER | {"logit_gaps": [1.0, 1.0, 1.0]},
    "forget": {"num_blocks": 9, "num_poisoned": 9, "poison": 90},
    "prefill": ANSWER | {"block_digests": ["a", "b", "c"], "token_ids": [5], "params": {"remote_port": 1}},
    "decode": ANSWER | HANDED | {"num_bytes": {"shm": 4000, "p2p": 0}},
    "take_back": {"num_held_blocks": 0},
    "copy_rate": {"bytes_per_s": 1e6},
}
SAID: list[tuple[str, dict[str, Any]]] = []


class FakeEngine:
    """Answers as `answers` says; keeps what it was asked."""

    answers: dict[str, dict[str, Any]]
    pid = 1

    def __init__(self, log_path: Path, num_threads: int) -> None:
        assert num_threads == 1

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def ask(self, op: str, **arguments: Any) -> None:
        SAID.append((op, arguments))

    def answer(self, op: str) -> dict[str, Any]:
        return copy.deepcopy(self.answers[op])

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        self.ask(op, **arguments)
        return self.answer(op)

    def stop(self) -> None:
        SAID.append(("stop", {}))


def act(monkeypatch: pytest.MonkeyPatch, **faults: dict[str, Any]) -> tuple[Any, list[Proof]]:
    SAID.clear()
    FakeEngine.answers = {op: answer | faults.get(op, {}) for op, answer in RIGHT.items()}
    monkeypatch.setattr(demo_handover, "EngineProcess", FakeEngine)
    proofs: list[Proof] = []
    subject = HandoverAct("stub", "d" * 99, "Why?", 9, Path("x"), Console(file=io.StringIO()), proofs)
    return subject.run(), proofs


def test_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    found, proofs = act(monkeypatch)
    assert [proof.held for proof in proofs] == [True] * 7
    assert (found.ttft_s, found.recompute_ttft_s, found.tokens_from_peer) == (0.1, 2.0, 40)
    assert found.limit_s == pytest.approx(4000 / 1e6)
    assert found.kv_bytes_equal
    assert found.tokens_equal
    ops = [op for op, _ in SAID]
    assert ops.index("forget") < ops.index("decode"), "what the decode engine computed itself must be gone"
    assert dict(SAID)["decode"] == {"params": {"remote_port": 1}}
    assert dict(SAID)["open_peer"]["document"] == "d" * 33
    assert ops.count("stop") == 2


@pytest.mark.parametrize(
    ("op", "fault", "claim"),
    [
        ("forget", {"num_poisoned": 8}, "overwritten"),
        ("decode", {"tokens_computed": 1}, "the decode engine 1"),
        ("decode", {"tokens_from_peer": 39}, "it loaded 39"),
        ("prefill", {"tokens_computed": 24}, "computed 24 of 40"),
        ("decode", {"num_bytes": {"nixl": 4000}}, "bytes moved, by transport: {'nixl': 4000}"),
        ("take_back", {"num_held_blocks": 3}, "holds 3 blocks"),
        ("decode", {"block_digests": ["a", "B", "c"]}, "the KV bytes of all 3 blocks"),
        ("prefill", {"block_digests": []}, "the KV bytes of all 0 blocks"),
        ("decode", {"token_ids": [5, 6, 8]}, "(token 2 differs)"),
        ("decode", {"ttft_s": 2.5}, "after 2.500 s instead of 2.000 s"),
    ],
)
def test_what_is_wrong_fails_its_proof(
    monkeypatch: pytest.MonkeyPatch, op: str, fault: dict[str, Any], claim: str
) -> None:
    _, proofs = act(monkeypatch, **{op: fault})
    (failed,) = [proof.claim for proof in proofs if not proof.held]
    assert claim in failed
