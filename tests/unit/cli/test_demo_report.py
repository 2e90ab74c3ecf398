"""Table, bars, JSON and picture of the demo."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kvferry.cli.demo_report import Act, DemoReport, HandoverResult, Proof

COLD = Act("cold", 8.0, 7.5, 3000, 0, 0, 3000, kv_bytes_equal=True, tokens_equal=True)
HOST = Act("host", 0.5, 0.4, 3000, 2880, 0, 120, kv_bytes_equal=True, tokens_equal=True)
HANDED = HandoverResult(0.8, 0.2, 4.0, 3.9, 1000, 1000, 46080, kv_bytes_equal=True, tokens_equal=True)


def report(*proofs: Proof, acts: tuple[Act, ...] = (COLD, HOST)) -> DemoReport:
    return DemoReport(list(acts), HANDED, list(proofs), {"model": "stub"})


def printed(subject: DemoReport) -> str:
    out = io.StringIO()
    subject.print(Console(file=out, width=80))
    return out.getvalue()


def test_one_failed_proof_fails_the_report() -> None:
    assert report(Proof(True, "fine")).held
    assert not report(Proof(True, "fine"), Proof(False, "bytes differ")).held


def test_print_shows_proofs_times_limits_and_gain() -> None:
    text = printed(report(Proof(True, "fine"), Proof(False, "bytes differ")))
    assert "FAILED  bytes differ" in text
    assert all(figure in text for figure in ("8.000", "7.500", "0.500", "0.400", "16.0x", "2880"))
    assert max(map(len, text.splitlines())) <= 80


def test_print_says_what_differs() -> None:
    assert "DIFFERS" in printed(report(acts=(COLD, replace(HOST, tokens_equal=False))))


def test_bars_are_in_proportion_and_carry_the_limit() -> None:
    rows = [line for line in printed(report()).splitlines() if line.endswith(" s")]
    assert [row.count("█") + row.count("|") for row in rows] == [40, 3, 20, 4]
    assert ["|" in row for row in rows] == [True, True, False, True], "what is recomputed is held against nothing"


def test_print_says_what_handing_over_gains() -> None:
    assert "1000 tokens" in printed(report())
    assert "5x" in printed(report())


@pytest.mark.parametrize("limit_s", [0.0, 100.0])
def test_a_limit_outside_the_bar_is_drawn_at_its_end(limit_s: float) -> None:
    assert "|" in printed(report(acts=(COLD, replace(HOST, limit_s=limit_s))))


def test_json_has_the_documented_keys(tmp_path: Path) -> None:
    report(Proof(True, "fine")).write_json(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    act = content["acts"][1]
    assert act["name"] == "host"
    assert (content["handover"]["ttft_s"], content["handover"]["recompute_ttft_s"]) == (0.8, 4.0)
    wanted = "ttft_s prompt_tokens tokens_from_host tokens_from_disk tokens_computed kv_bytes_equal tokens_equal"
    assert set(wanted.split()) < set(act)


def test_plot_is_a_png(tmp_path: Path) -> None:
    report().write_plot(tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
