"""From the end of prefill in one engine process to decode in another: what a hand-over costs beside its transfer.

Two embedded engines (SmolLM2-135M, float32, one torch thread each), `P2PConnector` over shared memory, no proxy. All
times are of the machine's monotonic clock, which both processes read:

prefill finished     `LLM.step` of the prefill engine has returned the request's end, with `kv_transfer_params`
                     (they go to the decode engine through a pipe, and are part of the hand-over)
first token          `LLM.step` of the decode engine has returned the first token. It is prefill's: the decode engine
                     takes it over with the KV, and computes nothing for it
first decode token   the next one: the first that the decode engine computed, in one decode step
decode step          median time of the later steps of the same request, hence with the same batch; before each of
                     them the engine rests as long as it waited for the first token, for a step after a rest takes up
                     to 50 ms longer on this machine (without connector too). Beside others nobody rests.
transfer             what the transport needed, from the submission of the job to its last byte, as the engine that
                     moves the bytes counts it (pull: the decode engine; push: the prefill engine)

before decode        first token - prefill finished - transfer: the part of the overhead that no decode step blurs

overhead = first decode token - prefill finished - transfer - decode step. The goal is at most 10 ms where the decode
engine has nothing else to do. Beside other requests (reported) a hand-over also waits for the ends of their steps.

Through the proxy (reported): two `kvferry serve` processes behind `kvferry proxy`, one client that streams.

overhead = second token at the client - request sent - prefill alone - transfer - decode step, where `prefill alone` is
a request for one token that the client sends to the prefill engine itself, just before: what HTTP costs twice (the
proxy's hops, the decode engine's request) is in the overhead.

Each round hands over every prompt length in every mode, so that other work on the machine hits all alike. A decode
step of 100 ms is 20 ms longer or shorter at times, so it takes many rounds to see a few ms beside it; cases without a
goal are in every third. The prefill engine has the prompts in its prefix cache after the first round, which is not
counted; the decode engine forgets its own before each hand-over, and loads all tokens. Writes
bench/results/p2p_handover.{json,png}.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import re
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx2
import record

LENGTHS = (512, 1500, 3000)
MODES = ("pull", "push")
GOAL_S = 0.010
NUM_TOKENS = 8
NUM_BLOCKS = sum(LENGTHS) // 16 + 100
NUM_OTHERS = 4
REPORTED_EVERY = 3
"""Rounds from one to the next in which cases without a goal are measured."""
_REST_S = 0.0005  # as in `LLM.generate`


def prompt_of(length: int) -> list[int]:
    """Token ids."""
    chance = random.Random(length)
    return [chance.randrange(1000, 40000) for _ in range(length)]


def start_engine(mode: str) -> Any:
    """An engine with one thread, in the process that calls."""
    import torch

    from kvferry import LLM

    torch.set_num_threads(1)
    config = {
        "kv_connector": "P2PConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"transport": "shm", "mode": mode},
    }
    return LLM("smollm2", dtype="float32", num_kv_blocks=NUM_BLOCKS, kv_transfer_config=config)


def sampling(max_tokens: int, **transfer_params: Any) -> Any:
    """Greedy, never ends early, tells every token at once."""
    from kvferry import SamplingParams
    from kvferry.engine.config import RequestOutputKind

    return SamplingParams(
        max_tokens=max_tokens, temperature=0, ignore_eos=True, output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": transfer_params} if transfer_params else None,
    )  # fmt: skip


def step(llm: Any) -> list[Any]:
    """One step, and a short rest when it did nothing, as `LLM.generate` does it."""
    outputs: list[Any] = llm.step()
    if not llm.has_moved:
        time.sleep(_REST_S)
    return outputs


def prefill_engine(mode: str, orders: Connection, to_decode: Connection) -> None:
    """Prefill each prompt that is ordered, tell the decode engine, then the seconds the last transfer took."""
    llm = start_engine(mode)
    orders.send("ready")
    while (prompt := orders.recv()) is not None:
        llm.add_request(prompt, sampling(1, do_remote_decode=True))
        before_s = stored_s(llm)
        while not (outputs := llm.step()):
            pass
        to_decode.send((time.monotonic(), outputs[0].kv_transfer_params))
        while llm.has_requests():  # pushes, and takes its blocks back
            step(llm)
        orders.send(stored_s(llm) - before_s)
    llm.shutdown()


def stored_s(llm: Any) -> float:
    """Seconds of all transfers that this engine has made to others."""
    return sum(medium.store_s for medium in llm.connector_stats.media.values())


def loaded_s(llm: Any) -> float:
    """Seconds of all transfers that this engine has made from others."""
    return sum(medium.load_s for medium in llm.connector_stats.media.values())


def decode_engine(orders: Connection, sources: dict[str, Connection]) -> None:
    """Take each prompt over that is ordered, and tell when its tokens came."""
    llm = start_engine("pull")
    orders.send("ready")
    while (order := orders.recv()) is not None:
        prompt, mode, num_others = order
        assert llm.reset_prefix_cache(), "blocks are still held"
        others = [llm.add_request([100 + i] * 64, sampling(1000)) for i in range(num_others)]
        for _ in range(4 if others else 0):
            llm.step()
        orders.send("go")
        while others and not sources[mode].poll():
            llm.step()
        sample = take_over(llm, prompt, *sources[mode].recv(), rests=not others)
        for request_id in others:
            llm.abort_request(request_id)
        while llm.has_requests():
            step(llm)
        orders.send(sample)
    llm.shutdown()


def take_over(llm: Any, prompt: list[int], finished_s: float, params: dict[str, Any], *, rests: bool) -> dict[str, Any]:
    """One sample, all times in seconds; without the transfer's if the other engine makes it."""
    before_s = loaded_s(llm)
    request_id = llm.add_request(prompt, sampling(NUM_TOKENS, **params))
    times_s: list[float] = []
    steps_s: list[float] = []
    is_over = False
    while not is_over:
        if rests and len(times_s) > 1:
            rest(times_s[0] - finished_s)
        begun_s = time.monotonic()
        for output in step(llm):
            if output.request_id == request_id:
                assert output.num_external_tokens == len(prompt), output
                times_s += [time.monotonic()] * len(output.outputs[0].token_ids)
                steps_s.append(times_s[-1] - begun_s)
                is_over = output.finished
    assert len(times_s) == len(steps_s) == NUM_TOKENS
    return {
        "first_token_s": times_s[0] - finished_s,
        "first_decode_token_s": times_s[1] - finished_s,
        "transfer_s": loaded_s(llm) - before_s,
        "decode_step_s": statistics.median(steps_s[2:]),
        "decode_steps_s": steps_s[2:],
    }


def rest(seconds: float) -> None:
    """As an engine does that waits for others."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        time.sleep(_REST_S)


class Pair:
    """The processes: a prefill engine per mode, and one decode engine."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.orders: dict[str, Connection] = {}
        sources, targets = {}, {}
        for mode in MODES:
            sources[mode], targets[mode] = context.Pipe(duplex=False)
        self.processes = []
        for name in (*MODES, "decode"):
            self.orders[name], theirs = context.Pipe()
            is_decode = name == "decode"
            target, arguments = (decode_engine, (theirs, sources)) if is_decode else (
                prefill_engine, (name, theirs, targets[name])
            )  # fmt: skip
            self.processes.append(context.Process(target=target, args=arguments, daemon=True))
        for process in self.processes:
            process.start()
        for connection in self.orders.values():
            self.hear(connection)

    def hear(self, connection: Connection) -> Any:
        """The next answer. SystemExit when a process has died."""
        while not connection.poll(0.5):
            if not all(process.is_alive() for process in self.processes):
                raise SystemExit("an engine process has died")
        return connection.recv()

    def sample(self, prompt: list[int], mode: str, num_others: int) -> dict[str, Any]:
        """One hand-over."""
        decode, prefill = self.orders["decode"], self.orders[mode]
        decode.send((prompt, mode, num_others))
        self.hear(decode)
        prefill.send(prompt)
        sample = self.hear(decode)
        stored = self.hear(prefill)
        sample["transfer_s"] = sample["transfer_s"] or stored
        sample["overhead_s"] = overhead(sample)
        return sample

    def close(self) -> None:
        """End all processes."""
        for connection in self.orders.values():
            connection.send(None)
        for process in self.processes:
            process.join(30)


class Served:
    """Two servers and a proxy, as users start them."""

    def __init__(self, stack: ExitStack) -> None:
        self.client = stack.enter_context(httpx2.Client(timeout=120))
        config = {
            "kv_connector": "P2PConnector", "kv_role": "kv_both", "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"transport": "shm"},
        }  # fmt: skip
        serve = [
            "serve", "smollm2", "--port", "0", "--num-threads", "1", "--dtype", "float32", "--num-kv-blocks",
            str(NUM_BLOCKS), "--kv-transfer-config", json.dumps(config),
        ]  # fmt: skip
        self.prefill, self.decode = (self._start(stack, serve) for _ in range(2))
        proxy = ["proxy", "--port", "0", "--probe-interval-s", "0", "--prefill", self.prefill, "--decode", self.decode]
        self.proxy = self._start(stack, proxy)

    def _start(self, stack: ExitStack, arguments: list[str]) -> str:
        """The URL it listens on."""
        command = [str(Path(sys.executable).parent / "kvferry"), *arguments]
        process = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        )
        stack.callback(process.terminate)
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise SystemExit(f"kvferry {arguments[0]} did not start")
        return found[0]

    def sample(self, prompt: list[int]) -> dict[str, Any]:
        """One hand-over."""
        assert self.client.post(f"{self.decode}/reset_prefix_cache").status_code == 200
        alone_s = self._stream(self.prefill, prompt, 1)[-1]
        before_s = self._loaded_s()
        times_s = self._stream(self.proxy, prompt, NUM_TOKENS)
        steps_s = [after - before for before, after in itertools.pairwise(times_s[1:])]
        sample = {
            "first_token_s": times_s[0] - alone_s,
            "first_decode_token_s": times_s[1] - alone_s,
            "transfer_s": self._loaded_s() - before_s,
            "decode_step_s": statistics.median(steps_s),
            "decode_steps_s": steps_s,
            "prefill_alone_s": alone_s,
        }
        return sample | {"overhead_s": overhead(sample)}

    def _stream(self, url: str, prompt: list[int], num_tokens: int) -> list[float]:
        """When each token came, in seconds since the request was sent."""
        body = {
            "model": "smollm2", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        times_s: list[float] = []
        sent_s = time.monotonic()
        with self.client.stream("POST", f"{url}/v1/completions", json=body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    times_s += [time.monotonic() - sent_s] * sum(len(one.get("token_ids") or ()) for one in choices)
        assert len(times_s) == num_tokens, (reply.status_code, times_s)
        return times_s

    def _loaded_s(self) -> float:
        lines = self.client.get(f"{self.decode}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("kvferry:connector_load_seconds_total"))


def overhead(sample: dict[str, Any]) -> float:
    """See the module."""
    return float(sample["first_decode_token_s"] - sample["transfer_s"] - sample["decode_step_s"])


def measure_proxy(rounds: int, lengths: tuple[int, ...]) -> dict[str, list[dict[str, Any]]]:
    """Samples by case."""
    samples: dict[str, list[dict[str, Any]]] = {f"proxy {length}": [] for length in lengths}
    with ExitStack() as stack:
        served = Served(stack)
        for number in range(rounds + 1):
            for length in lengths:
                sample = served.sample(prompt_of(length))
                if number:
                    samples[f"proxy {length}"].append(sample)
    return samples


def name_of(mode: str, length: int, num_others: int) -> str:
    """Key of a case in the results."""
    return f"{mode} {length}" + (f" beside {num_others}" if num_others else "")


def measure(rounds: int, lengths: tuple[int, ...]) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """(samples by case, the first hand-over of each mode, in which the engines meet)."""
    cases = [(mode, length, others) for length in lengths for others in (0, NUM_OTHERS) for mode in MODES]
    samples: dict[str, list[dict[str, Any]]] = {name_of(*case): [] for case in cases}
    first: dict[str, Any] = {}
    pair = Pair()
    try:
        for number in range(rounds + 1):
            for mode, length, others in cases:
                if others and number % REPORTED_EVERY:
                    continue
                sample = pair.sample(prompt_of(length), mode, others)
                first.setdefault(mode, sample)
                if number:
                    samples[name_of(mode, length, others)].append(sample)
    finally:
        pair.close()
    return samples, first


def summary(samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians in milliseconds by case, and whether the goal is met in all without other requests."""
    keys = ("first_token_s", "first_decode_token_s", "transfer_s", "decode_step_s", "overhead_s")
    medians = {
        name: {f"{key[:-2]}_ms": 1000 * statistics.median(sample[key] for sample in each) for key in keys}
        | {"before_decode_ms": 1000 * statistics.median(one["first_token_s"] - one["transfer_s"] for one in each)}
        for name, each in samples.items()
    }
    goal_cases = [name for name in medians if name.startswith(MODES) and "beside" not in name]
    worst_ms = max(medians[name]["overhead_ms"] for name in goal_cases)
    return {
        "median_ms": medians,
        "goal": f"median overhead at most {1000 * GOAL_S:.0f} ms in all of: {', '.join(goal_cases)}",
        "worst_overhead_ms": worst_ms,
        "met": worst_ms <= 1000 * GOAL_S,
    }


def main() -> None:
    """Measure, print, write the results. The exit status is 1 when the goal is missed."""
    import plots

    parser = record.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=27)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    options = record.parse(parser, rounds=REPORTED_EVERY, lengths=(64,))
    machine = record.machine()
    samples, first = measure(options.rounds, tuple(options.lengths))
    samples |= measure_proxy(options.rounds // REPORTED_EVERY, tuple(options.lengths))
    said = summary(samples)
    for name, medians in said["median_ms"].items():
        print(
            f"{name:20}", "  ".join(f"{key.removesuffix('_ms')} {value:6.1f}" for key, value in medians.items()), "ms"
        )
    print(f"goal: {said['goal']}: {'met' if said['met'] else 'MISSED'}, worst {said['worst_overhead_ms']:.1f} ms")
    content = {"machine": machine, **said, "first_hand_overs": first, "samples": samples}
    plots.save(record.write("p2p_handover", content))
    raise SystemExit(not said["met"])


if __name__ == "__main__":
    main()
