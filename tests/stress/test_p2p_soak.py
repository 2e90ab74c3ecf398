"""Two pairs of engines in processes of their own, one that pulls and one that pushes, under faults at random: kills,
pauses, connections cut in mid-transfer, aborts, resets of the caches, and leases for which nobody comes.

KVFERRY_STRESS_S says for how many seconds (60 unless given), KVFERRY_STRESS_SEED with which seed, and
KVFERRY_STRESS_TRANSPORT over what (shm unless given; nixl in an environment that has it). Every reply is compared with
the stub model's definition, in which one wrong KV byte is another token; at the end nothing may be held anywhere.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

from p2p_kill import MODES, NEAR, PROMPT_TOKENS, Pair, expected, new_prompt

SECONDS = float(os.environ.get("KVFERRY_STRESS_S", "60"))
SEED = int(os.environ.get("KVFERRY_STRESS_SEED", "1"))
DEADLINES = NEAR | {"quarantine_s": 5.0}  # the default: what is slow under load is not given up for lost
TRANSPORT = os.environ.get("KVFERRY_STRESS_TRANSPORT", "shm")


class Soak:
    """One pair, and what is done to it."""

    def __init__(self, pair: Pair, rng: random.Random, counts: Counter[str]) -> None:
        self.pair, self.rng, self.counts = pair, rng, counts

    def requests(self, *, is_disturbed: bool = False) -> None:
        """Some at once, all right; `is_disturbed`: one engine stands still while they run."""
        prompts = [new_prompt() for _ in range(self.rng.randint(1, 3))]
        handed = [self.pair.prefill.prefill(prompt) for prompt in prompts]
        ids = [self.pair.decode.add(*each) for each in zip(prompts, handed, strict=True)]
        if is_disturbed:
            engine = self.rng.choice((self.pair.prefill, self.pair.decode))
            engine.stop()
            time.sleep(self.rng.choice((0.1, 1.0, 6.0)))
            engine.go_on()
        for prompt, request_id in zip(prompts, ids, strict=True):
            self.finish(prompt, request_id)

    def pause(self) -> None:
        self.requests(is_disturbed=True)

    def unclaimed(self) -> None:
        """Nobody comes for it."""
        self.pair.prefill.prefill(new_prompt())

    def abort(self) -> None:
        """The client leaves, at any moment of the load or after it."""
        prompt = new_prompt()
        request_id = self.pair.decode.add(prompt, self.pair.prefill.prefill(prompt))
        time.sleep(self.rng.random() * 0.05)
        self.pair.decode.abort(request_id)
        result = self.pair.decode.result(request_id)
        assert result["reason"] == "abort" or result["tokens"] == expected(prompt)

    def reset(self) -> None:
        """The caches of either engine, with a request under way."""
        prompt = new_prompt()
        request_id = self.pair.decode.add(prompt, self.pair.prefill.prefill(prompt))
        time.sleep(self.rng.random() * 0.05)
        self.rng.choice((self.pair.prefill, self.pair.decode)).ask("reset")
        self.finish(prompt, request_id)

    def cut(self) -> None:
        """All connections of the control channel, with requests under way."""
        prompts = [new_prompt() for _ in range(3)]
        handed = [self.pair.prefill.prefill(prompt) for prompt in prompts]
        ids = [self.pair.decode.add(*each) for each in zip(prompts, handed, strict=True)]
        time.sleep(self.rng.random() * 0.05)
        ports = [self.pair.prefill.port, self.pair.decode.port]
        self.counts["connections cut"] += self.rng.choice((self.pair.prefill, self.pair.decode)).ask("cut", ports)
        for prompt, request_id in zip(prompts, ids, strict=True):
            self.finish(prompt, request_id)

    def finish(self, prompt: list[int], request_id: str) -> None:
        result = self.pair.decode.result(request_id)
        assert result["tokens"] == expected(prompt)
        self.counts["requests"] += 1
        self.counts["handed over"] += result["num_external"] == PROMPT_TOKENS

    def kill(self) -> None:
        """With a request under way, to whichever."""
        prompt = new_prompt()
        params = self.pair.prefill.prefill(prompt)
        victim = self.rng.choice(("prefill", "decode"))
        request_id = self.pair.decode.add(prompt, params)
        time.sleep(self.rng.random() * 0.05)
        getattr(self.pair, victim).kill()
        if victim == "prefill":
            assert self.pair.decode.result(request_id)["tokens"] == expected(prompt)
        self.pair.restart(victim)
        self.pair.hand_over(num_tries=3)

    def step(self) -> None:
        acts = {
            self.requests: 10, self.pause: 3, self.unclaimed: 2, self.abort: 3, self.reset: 3, self.cut: 3, self.kill: 1
        }  # fmt: skip
        act = self.rng.choices([*acts], [*acts.values()])[0]
        self.counts[act.__name__] += 1
        act()


def test_soak(tmp_path: Path) -> None:
    print(f"seed {SEED}, {SECONDS} s over {TRANSPORT}")
    rng, counts = random.Random(SEED), Counter[str]()
    pairs = []
    try:
        for mode in MODES:
            (folder := tmp_path / mode).mkdir()
            pairs.append(Pair(TRANSPORT, folder))
            pairs[-1].start(mode, num_tries=3, **NEAR)
        soaks = [Soak(pair, rng, counts) for pair in pairs]
        end_s = time.monotonic() + SECONDS
        while time.monotonic() < end_s:
            rng.choice(soaks).step()
        for pair in pairs:
            pair.prefill.settle()
            pair.decode.settle()
            pair.hand_over(num_tries=3)
            for engine in (pair.prefill, pair.decode):
                assert len(os.listdir(f"/proc/{engine.process.pid}/fd")) < 100, "descriptors are left open"
    finally:
        for pair in pairs:
            pair.end()
    print(dict(counts.most_common()))
    assert counts["connections cut"] or not counts["cut"], counts
    assert counts["handed over"] > counts["requests"] / 4, counts
