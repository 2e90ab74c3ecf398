"""What proving bytes costs: time to the first token of requests that hit, with the proof on and off, in turns.

host   `OffloadingConnector`: prompts that lie in host memory, `verify_host_loads` true and false; to the first token,
       which one forward computes
p2p    `P2PConnector` over shared memory, `verify_loads` true and false in both engines, pull and push: from the end of
       prefill to the first token that the decode engine computes itself (`own`, a hit's first token in vLLM), and to
       the one that prefill sampled and hands over (`first`). `client` is what a client waits for, without HTTP: the
       prefill of a prompt that no cache has, and the hand-over to `first`; its share is the median time that the proof
       adds to `first`, over the median of the whole, since a prefill varies by more than that from run to run

SmolLM2-135M, one torch thread per engine, engines in processes of their own that rest while others are measured; one
case after the other, for all their engines at once would take 20 GiB. Each round measures every prompt length, with
proof and without in turns, first one then the other first; a ratio is that of the two in one round. Writes
bench/results/proof.json. The goal (issue 14): at most 3 % for what is on by default.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import record
from p2p_handover import prompt_of, sampling, step, take_over

LENGTHS = (512, 1500, 3000)
MODES = ("pull", "push")
CASES = ("host", *MODES)


def start(connector: str, num_blocks: int, **extra: Any) -> Any:
    """An engine with one thread, in the process that calls."""
    import torch

    from kvferry import LLM

    torch.set_num_threads(1)
    config = {
        "kv_connector": connector,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": extra,
    }
    return LLM("smollm2", dtype="float32", num_kv_blocks=num_blocks, kv_transfer_config=config)


def host_engine(orders: Connection, lengths: tuple[int, ...], verifies: bool) -> None:
    """Store all prompts, then answer each that is ordered with the seconds to its first token."""
    num_blocks = sum(lengths) // 16 + 100
    llm = start("OffloadingConnector", num_blocks, cpu_bytes_to_use=1 << 30, verify_host_loads=verifies)
    for length in lengths:
        llm.generate(prompt_of(length), sampling(1))
    orders.send("ready")
    while (length := orders.recv()) is not None:
        while llm.has_requests():
            step(llm)
        assert llm.reset_prefix_cache(), "blocks are still held"
        begun_s = time.monotonic()
        llm.add_request(prompt_of(length), sampling(1))
        while not (outputs := step(llm)):
            pass
        assert outputs[0].num_external_tokens >= length - 64, outputs[0]
        orders.send({"first": time.monotonic() - begun_s})
    llm.shutdown()


def prefill_engine(orders: Connection, lengths: tuple[int, ...], mode: str, verifies: bool) -> None:
    """Prefill each prompt that is ordered; answer when that ended, how long it took, and the parameters."""
    num_blocks = sum(lengths) // 16 + 100
    llm = start("P2PConnector", num_blocks, transport="shm", mode=mode, verify_loads=verifies)
    orders.send("ready")
    while (length := orders.recv()) is not None:
        assert llm.reset_prefix_cache(), "blocks are still held"
        begun_s = time.monotonic()
        llm.add_request(prompt_of(length), sampling(1, do_remote_decode=True))
        while not (outputs := llm.step()):
            pass
        ended_s = time.monotonic()
        orders.send((ended_s, ended_s - begun_s, outputs[0].kv_transfer_params))
        while llm.has_requests():  # pushes, and takes its blocks back
            step(llm)
    llm.shutdown()


def decode_engine(orders: Connection, lengths: tuple[int, ...], verifies: bool) -> None:
    """Take each prompt over that is ordered, and tell when its tokens came."""
    num_blocks = sum(lengths) // 16 + 100
    llm = start("P2PConnector", num_blocks, transport="shm", verify_loads=verifies)
    orders.send("ready")
    while (order := orders.recv()) is not None:
        length, ended_s, params = order
        assert llm.reset_prefix_cache(), "blocks are still held"
        sample = take_over(llm, prompt_of(length), ended_s, params, rests=True)
        while llm.has_requests():
            step(llm)
        orders.send({"first": sample["first_token_s"], "own": sample["first_decode_token_s"]})
    llm.shutdown()


class Engines:
    """The processes of one case by name; one works at a time, but for prefill and decode of one hand-over."""

    def __init__(self, lengths: tuple[int, ...], case: str) -> None:
        context = multiprocessing.get_context("spawn")
        makers: dict[str, Any] = {}
        for verifies in (True, False):
            if case == "host":
                makers[f"host {verifies}"] = host_engine, (lengths, verifies)
            else:
                makers[f"decode {verifies}"] = decode_engine, (lengths, verifies)
                makers[f"{case} {verifies}"] = prefill_engine, (lengths, case, verifies)
        self.orders: dict[str, Connection] = {}
        self.processes = []
        for name, (target, arguments) in makers.items():
            self.orders[name], theirs = context.Pipe()
            self.processes.append(context.Process(target=target, args=(theirs, *arguments), daemon=True))
            self.processes[-1].start()
            assert self.orders[name].recv() == "ready"

    def ask(self, name: str, order: Any) -> Any:
        """What an engine answers."""
        self.orders[name].send(order)
        return self.orders[name].recv()

    def sample(self, case: str, length: int, verifies: bool) -> dict[str, float]:
        """One of a case: a hit in host memory, or a hand-over."""
        if case == "host":
            hit: dict[str, float] = self.ask(f"host {verifies}", length)
            return hit
        ended_s, prefill_s, params = self.ask(f"{case} {verifies}", length)
        sample: dict[str, float] = self.ask(f"decode {verifies}", (length, ended_s, params))
        return {**sample, "client": prefill_s + sample["first"]}

    def close(self) -> None:
        """End all."""
        for orders in self.orders.values():
            orders.send(None)
        for process in self.processes:
            process.join(30)


def measure(rounds: int, lengths: tuple[int, ...], cases: tuple[str, ...]) -> list[dict[str, Any]]:
    """Per case and length: samples, and the median of the rounds' ratios."""
    samples: dict[tuple[str, int, str], list[list[float]]] = {}
    for case in cases:
        engines = Engines(lengths, case)
        try:
            for number in range(rounds + 1):
                for length in lengths:
                    pair: dict[bool, dict[str, float]] = {}
                    for verifies in (True, False) if number % 2 else (False, True):
                        pair[verifies] = engines.sample(case, length, verifies)
                    for what in pair[True] if number else ():  # the first round is not counted
                        both = [pair[True][what], pair[False][what]]
                        samples.setdefault((case, length, what), []).append(both)
        finally:
            engines.close()
    rows = {(case, length, what): row_of(case, length, what, found) for (case, length, what), found in samples.items()}
    for (case, length, what), row in rows.items():
        if what == "client":
            row["added_s"] = rows[case, length, "first"]["added_s"]
            row["added_share"] = row["added_s"] / row["median_s"]["unproved"]
    return list(rows.values())


def row_of(case: str, length: int, what: str, pairs: list[list[float]]) -> dict[str, Any]:
    """What the samples (proved, unproved) of each round come to."""
    return {
        "case": case, "num_tokens": length, "what": what,
        "median_s": {"proved": statistics.median(x for x, _ in pairs),
                     "unproved": statistics.median(y for _, y in pairs)},
        "added_share": statistics.median(x / y for x, y in pairs) - 1,
        "added_s": statistics.median(x - y for x, y in pairs),
        "samples_s": pairs,
    }  # fmt: skip


def main() -> None:
    """Measure, print, write bench/results/proof.json."""
    parser = record.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of prompts, in tokens")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    options = record.parse(parser, rounds=1, lengths=[64])
    results = measure(options.rounds, tuple(options.lengths), tuple(options.cases))
    print(f"load average {os.getloadavg()}")
    print(f"{'case':6} {'tokens':>6} {'to':8} {'proved':>9} {'unproved':>9} {'added':>9}   share")
    for row in results:
        proved, unproved = (1000 * row["median_s"][name] for name in ("proved", "unproved"))
        print(
            f"{row['case']:6} {row['num_tokens']:6} {row['what']:8} {proved:6.1f} ms {unproved:6.1f} ms"
            f" {1000 * row['added_s']:6.1f} ms   {100 * row['added_share']:+.1f} %"
        )
    record.write("proof", {"machine": record.machine(), "results": results})


if __name__ == "__main__":
    main()
