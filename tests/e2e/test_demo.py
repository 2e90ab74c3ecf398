"""`make demo` for real: real model, real processes, SIGKILL, a flipped byte, KV from one process to another."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from kvferry.cli.child import ChildError, EngineProcess

KVFERRY = Path(sys.executable).parent / "kvferry"
AS_IN_QUICKSTART = "kvferry demo --json demo.json --plot demo.png"
SHIPPED = files("kvferry.cli") / "data" / "gpl-1.txt"


def run(folder: Path, *arguments: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the command from another working directory."""
    return subprocess.run(
        [str(KVFERRY), *arguments], cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(660)
def test_demo_proves_every_act(tmp_path: Path) -> None:
    done = run(tmp_path, *shlex.split(AS_IN_QUICKSTART)[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    report = json.loads((tmp_path / "demo.json").read_text())
    acts = {act["name"]: act for act in report["acts"]}
    assert list(acts) == ["cold", "host", "disk", "corrupt"]
    for act in acts.values():
        assert act["kv_bytes_equal"] is True
        assert act["tokens_equal"] is True
        assert act["ttft_s"] > 0
        assert act["limit_s"] > 0
        moved = act["tokens_from_host"] + act["tokens_from_disk"]
        assert moved + act["tokens_computed"] == act["prompt_tokens"]
    shared = report["context"]["shared_tokens"]
    assert 2500 < shared < 3500, "about 3,000 tokens"
    assert acts["cold"]["tokens_computed"] == acts["cold"]["prompt_tokens"]
    assert 0.95 * shared <= acts["host"]["tokens_from_host"] <= shared
    assert 0.95 * shared <= acts["disk"]["tokens_from_disk"] <= shared
    assert 0 < acts["corrupt"]["tokens_from_disk"] < 0.95 * shared
    assert acts["cold"]["ttft_s"] > 2 * acts["host"]["ttft_s"], "a hit must be worth having"
    assert acts["cold"]["ttft_s"] > 2 * acts["disk"]["ttft_s"], "a hit must be worth having"
    assert re.search(r"refused by key [0-9a-f]{72}", done.stdout)
    check_handover(report["handover"], done.stdout)
    said = " ".join(done.stdout.split())
    for question in report["context"]["questions"]:
        assert f"question: {question}" in said
    for answer in report["context"]["answers"].values():
        assert f"answer: {' '.join(answer.split())}" in said
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def check_handover(act: dict[str, Any], said: str) -> None:
    """The decode engine computed nothing, has the prefill engine's bytes, and is right."""
    assert act["kv_bytes_equal"] is True
    assert act["tokens_equal"] is True
    assert 800 < act["tokens_from_peer"] == act["prompt_tokens"] < 1200, "a third of the document"
    assert 0 < act["limit_s"] < act["ttft_s"]
    assert act["recompute_ttft_s"] > 1.5 * act["ttft_s"], "a hand-over must be worth having"
    moved = act["tokens_from_peer"] * act["kv_bytes_per_token"]
    assert f"bytes moved, by transport: {{'shm': {moved}}}" in said
    assert left_behind(re.findall(r"engine process (\d+) ", said)) == []


def left_behind(pids: list[str]) -> list[str]:
    """Processes that live, and shared memory that they made."""
    assert pids
    segments = [path.name for path in Path("/dev/shm").glob("kvferry-*") if path.name.split("-")[2] in pids]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()] + segments


@pytest.mark.timeout(660)
def test_interrupted_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    """Ctrl-C goes to the whole process group; the engine has its host memory by then."""
    command = ["env", "--default-signal=INT", str(KVFERRY), "demo"]  # pytest itself may run in the background
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True) as demo:
        assert demo.stdout is not None
        pids = re.findall(r"engine process (\d+) ", demo.stdout.readline())
        while "/dev/shm/kvferry-" not in Path(f"/proc/{pids[0]}/maps").read_text():
            assert demo.poll() is None
            time.sleep(0.01)
        os.killpg(demo.pid, signal.SIGINT)
        said = demo.stdout.read()
    assert demo.returncode not in (0, 1), said
    assert left_behind(pids) == []


@pytest.mark.slow
@pytest.mark.timeout(660)
def test_failed_proof_is_exit_status_1(tmp_path: Path) -> None:
    """Host memory for six chunks cannot bring back a prefix of ten; the answers are right all the same."""
    document = tmp_path / "own.txt"
    document.write_text(SHIPPED.read_text()[2000:4800])
    done = run(
        tmp_path, "demo", "--document", str(document), "--host-bytes", str(6 * 64 * 46080), "--json", "demo.json"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout
    assert all(act["tokens_equal"] for act in json.loads((tmp_path / "demo.json").read_text())["acts"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--document", "no-such-file.txt"], "no-such-file.txt"),
        (["--host-bytes", "1000"], "cpu_bytes_to_use"),
    ],
)
def test_mistakes_are_one_clear_line_and_exit_status_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run(tmp_path, "demo", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_engine_process_that_breaks_is_an_error_with_its_log(tmp_path: Path) -> None:
    with EngineProcess(tmp_path / "log") as engine, pytest.raises(ChildError, match="open comes first"):
        engine.call("ask", timeout_s=120, question=0)


def test_engine_process_that_is_silent_is_given_up_and_killed(tmp_path: Path) -> None:
    with EngineProcess(tmp_path / "log") as engine:
        with pytest.raises(ChildError, match="gave no answer to 'settle' in time"):
            engine.call("settle", timeout_s=0.0)
        pid = engine.pid
    assert not Path(f"/proc/{pid}").exists()
