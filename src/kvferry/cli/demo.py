"""`kvferry demo`: questions about one document to four states of the cache, and proofs for each.

    cold      nothing is stored; the whole prompt is computed
    host      the engine's own cache is emptied and poisoned; KV comes from host memory
    disk      the engine process was ended with SIGKILL; a new one finds the KV on disk
    corrupt   one byte of one stored chunk was flipped; that chunk is refused, the rest of the prompt computed

and then two engine processes, one of which prefills for the other: see `demo_handover`. All engines run in child
processes. This process only asks, keeps the cold pool's digests, and looks at the files itself.
"""

from __future__ import annotations

import os
import platform
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.cli.child import ChildError, EngineProcess
from kvferry.cli.demo_answer import Answer, compare_tokens, conversation
from kvferry.cli.demo_handover import HandoverAct
from kvferry.cli.demo_report import Act, DemoReport, HandoverResult, Proof
from kvferry.cli.demo_store import StoredChunks
from kvferry.errors import ConfigError, require_packages
from kvferry.kv.segment import SHM_DIRECTORY, sweep_dead_segments

if TYPE_CHECKING:
    from rich.console import Console

CHUNK_TOKENS = 64
MIN_SHARED_PART = 0.95
_NEEDED = ("torch", "transformers", "safetensors", "gguf", "accelerate")
QUESTIONS = (
    "For what may I charge a fee when I give copies of the program to others?",
    "What happens to my rights under this license if I break its terms?",
    "What must I do when I change a file of the program?",
)
_QUESTION_OF = {"cold": 0, "host": 1, "disk": 2, "corrupt": 1}
_SETTLE_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the user may choose."""

    model: str = "smollm2"
    document: Path | None = None
    """Text file; None means the one kvferry ships."""
    host_bytes: int = 1 << 30
    """Host memory for KV."""
    questions: tuple[str, ...] = QUESTIONS
    """For the cold, host and disk acts; the corrupt act asks the second one again."""


def three_questions(given: Sequence[str]) -> tuple[str, ...]:
    """The acts' questions: the last one given stands for those that are missing; the shipped ones if none is given."""
    if not given:
        return QUESTIONS
    if len(given) > len(QUESTIONS) or not all(question.strip() for question in given):
        raise ConfigError(f"--question={list(given)} must be one to {len(QUESTIONS)} questions, none of them empty")
    return tuple(given[min(index, len(given) - 1)] for index in range(len(QUESTIONS)))


def run_demo(options: DemoOptions, console: Console) -> DemoReport:
    """Run all acts in a temporary folder that is removed afterwards. Blocks for one to three minutes.

    However it ends, no process and no shared memory of the engines is left.
    Raises ConfigError for what the user can mend and ChildError when an engine breaks.
    """
    require_packages("kvferry demo", "engine", _NEEDED)
    document = _read_document(options.document)
    with tempfile.TemporaryDirectory(prefix="kvferry-demo-") as folder:
        try:
            return _Demo(options, document, Path(folder), console).run()
        finally:
            sweep_dead_segments(SHM_DIRECTORY)  # of engines that were killed


def _read_document(path: Path | None) -> str:
    if path is None:
        with as_file(files("kvferry.cli") / "data" / "gpl-1.txt") as shipped:
            return shipped.read_text()
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the document {str(path)!r}: {error}") from error


@dataclass(slots=True)
class _Demo:
    options: DemoOptions
    document: str
    folder: Path
    console: Console
    proofs: list[Proof] = field(default_factory=list)
    answers: dict[str, Answer] = field(default_factory=dict)
    limits_s: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self) -> DemoReport:
        """All acts in order, then the verdict."""
        with self._engine("cold + host") as engine:
            shape = self._open(engine)
            self._cold(engine)
            stored = self._settle(engine, shape)
            self._host(engine, shape)
            status = engine.kill()
        self._prove(status == -signal.SIGKILL, f"the engine process was ended with SIGKILL (exit status {status})")
        with self._engine("disk") as engine:
            self._open(engine)
            self._disk(engine, shape, stored)
            engine.stop()
        with self._engine("corrupt") as engine:
            self._corrupt(engine, shape, stored)
            engine.stop()
        with self._engine("reference") as engine:
            acts = self._verdict(engine, shape)
            engine.stop()
        return DemoReport(acts, self._hand_over(shape), self.proofs, self._context(shape, stored))

    # ---- the acts ---------------------------------------------------------------------------------------------

    def _cold(self, engine: EngineProcess) -> None:
        answer = self._ask(engine, "cold")
        self._prove(answer.tokens_loaded == 0, f"cold: all {answer.prompt_tokens} prompt tokens were computed")

    def _settle(self, engine: EngineProcess, shape: dict[str, Any]) -> StoredChunks:
        """Wait until the first prompt's chunks are on disk, and check them against the pool."""
        with self.console.status("waiting for the last chunk to be on disk"):
            engine.call("settle", timeout_s=_SETTLE_TIMEOUT_S)
        stored = StoredChunks.find(self._store_folder, shape["keys"])
        if not stored.files:
            raise ChildError(f"no chunk of the prompt reached the disk\n{engine.log_tail()}")
        digests = stored.block_digests(CHUNK_TOKENS // shape["block_tokens"])
        expected = self.answers["cold"].prompt_tokens // CHUNK_TOKENS
        self.facts["stored_equals_pool"] = digests == self.answers["cold"].block_digests[: len(digests)]
        self._prove(
            len(stored.files) == expected and self.facts["stored_equals_pool"],
            f"cold: {len(stored.files)} of {expected} chunks are on disk, and hold the bytes of the pool",
        )
        return stored

    def _host(self, engine: EngineProcess, shape: dict[str, Any]) -> None:
        emptied = engine.call("forget")
        self._prove(
            emptied["num_poisoned"] == emptied["num_blocks"],
            f"host: the engine forgot its cache, {emptied['num_poisoned']} of {emptied['num_blocks']} blocks of its "
            f"pool are overwritten with 0x{emptied['poison']:02x}",
        )
        answer = self._ask(engine, "host")
        self._prove_shared("host", answer.tokens_from_host, shape)
        copied_s = self._measure_copy(engine, answer, shape)
        self.limits_s["host"] = copied_s + self._measure_tail(engine, "host")

    def _disk(self, engine: EngineProcess, shape: dict[str, Any], stored: StoredChunks) -> None:
        stored.leave_page_cache()
        answer = self._ask(engine, "disk")
        self._prove_shared("disk", answer.tokens_from_disk, shape)
        self.facts["read_bytes_per_s"] = stored.read_rate()
        moved_s = self._moved_from_disk_s(engine, answer, shape)
        self.limits_s["disk"] = moved_s + self._measure_tail(engine, "disk")

    def _corrupt(self, engine: EngineProcess, shape: dict[str, Any], stored: StoredChunks) -> None:
        index = len(stored.files) * 2 // 3
        key = shape["keys"][index]
        stored.flip_byte(index)
        self._open(engine)
        stored.leave_page_cache()
        answer = self._ask(engine, "corrupt")
        refusals = [line for line in engine.log().splitlines() if "load failed" in line and key in line]
        self._prove(len(refusals) == 1, f"corrupt: one byte of chunk {index} flipped; refused by key {key}")
        self._prove(
            answer.tokens_from_disk == index * CHUNK_TOKENS,
            f"corrupt: the {answer.tokens_from_disk} tokens before it were loaded, {answer.tokens_computed} computed",
        )
        moved_s = self._moved_from_disk_s(engine, answer, shape)
        self.limits_s["corrupt"] = moved_s + self._measure_tail(engine, "corrupt")
        self.facts["corrupt_chunk"] = {"index": index, "key": key}

    def _verdict(self, engine: EngineProcess, shape: dict[str, Any]) -> list[Act]:
        """Ask an engine without connector and prefix cache, and compare."""
        self._open(engine, has_store=False)
        reference = [self._ask_about(engine, f"reference {i}", i) for i in range(len(self.options.questions))]
        self.limits_s["cold"] = reference[_QUESTION_OF["cold"]].ttft_s
        acts = []
        for name, question in _QUESTION_OF.items():
            answer = self.answers[name]
            tokens_equal, remark = compare_tokens(answer, reference[question])
            kv_equal = self._kv_equal(name, answer, shape)
            self._prove(tokens_equal, f"{name}: answers as an engine without connector and prefix cache does{remark}")
            self._prove(kv_equal, f"{name}: the KV bytes are those the cold process computed")
            acts.append(self._act(name, answer, kv_equal, tokens_equal))
        return acts

    def _hand_over(self, shape: dict[str, Any]) -> HandoverResult:
        """With KV caches for a whole prompt and its answer; the act's is shorter."""
        answer, question = self.answers["cold"], self.options.questions[_QUESTION_OF["cold"]]
        num_blocks = (answer.prompt_tokens + len(answer.token_ids)) // shape["block_tokens"] + 2
        act = HandoverAct(
            self.options.model, self.document, question, num_blocks, self.folder, self.console, self.proofs
        )
        return act.run()

    # ---- asking and measuring ---------------------------------------------------------------------------------

    @property
    def _store_folder(self) -> Path:
        return self.folder / "store"

    def _engine(self, name: str) -> EngineProcess:
        engine = EngineProcess(self.folder / f"{name.replace(' ', '')}.log")
        self.console.print(f"[dim]engine process {engine.pid} ({name})[/dim]")
        return engine

    def _open(self, engine: EngineProcess, *, has_store: bool = True) -> dict[str, Any]:
        with self.console.status("loading the model (a GGUF is dequantised once, at first use)"):
            return engine.call(
                "open",
                model=self.options.model,
                document=self.document,
                questions=self.options.questions,
                chunk_tokens=CHUNK_TOKENS,
                store=str(self._store_folder) if has_store else None,
                host_bytes=self.options.host_bytes,
            )

    def _ask(self, engine: EngineProcess, act: str) -> Answer:
        self.answers[act] = self._ask_about(engine, act, _QUESTION_OF[act])
        return self.answers[act]

    def _ask_about(self, engine: EngineProcess, title: str, question: int) -> Answer:
        with self.console.status(f"{title}: {self.options.questions[question]}"):
            answer = Answer(**engine.call("ask", question=question))
        self.console.print(f"  {title:>11}  first token after {answer.ttft_s:.2f} s", highlight=False)
        for line in conversation(self.options.questions[question], answer.text):
            self.console.print(line)
        return answer

    def _measure_tail(self, engine: EngineProcess, act: str) -> float:
        """Seconds to the first token when all but the computed tail is in the engine's own cache."""
        known = self.answers[act].tokens_loaded
        with self.console.status("measuring the prefill of the tail"):
            first_token = 200 + 100 * list(_QUESTION_OF).index(act)
            answer = engine.call(
                "time_tail", question=_QUESTION_OF[act], num_known_tokens=known, first_token=first_token
            )
        return float(answer["seconds"])

    def _measure_copy(self, engine: EngineProcess, answer: Answer, shape: dict[str, Any]) -> float:
        num_bytes = answer.tokens_loaded * shape["kv_bytes_per_token"]
        self.facts["copy_bytes_per_s"] = engine.call("copy_rate", num_bytes=num_bytes)["bytes_per_s"]
        return float(num_bytes / self.facts["copy_bytes_per_s"])

    def _moved_from_disk_s(self, engine: EngineProcess, answer: Answer, shape: dict[str, Any]) -> float:
        num_bytes = answer.tokens_loaded * shape["kv_bytes_per_token"]
        return float(num_bytes / self.facts["read_bytes_per_s"]) + self._measure_copy(engine, answer, shape)

    # ---- proofs -----------------------------------------------------------------------------------------------

    def _prove(self, held: bool, claim: str) -> None:
        self.proofs.append(Proof(held, claim))

    def _prove_shared(self, name: str, num_tokens: int, shape: dict[str, Any]) -> None:
        shared = shape["shared_tokens"]
        self._prove(
            num_tokens >= MIN_SHARED_PART * shared,
            f"{name}: {num_tokens} of the {shared} tokens both prompts begin with came from there "
            f"({num_tokens / shared:.1%}, at least {MIN_SHARED_PART:.0%} are due)",
        )

    def _kv_equal(self, name: str, answer: Answer, shape: dict[str, Any]) -> bool:
        """Loaded blocks against the cold process's; for the cold act, what was stored against its pool."""
        if name == "cold":
            return bool(self.facts["stored_equals_pool"])
        num_blocks = answer.tokens_loaded // shape["block_tokens"]
        cold = self.answers["cold"].block_digests
        return num_blocks > 0 and answer.block_digests[:num_blocks] == cold[:num_blocks]

    def _act(self, name: str, answer: Answer, kv_equal: bool, tokens_equal: bool) -> Act:
        return Act(
            name=name,
            ttft_s=answer.ttft_s,
            limit_s=self.limits_s[name],
            prompt_tokens=answer.prompt_tokens,
            tokens_from_host=answer.tokens_from_host,
            tokens_from_disk=answer.tokens_from_disk,
            tokens_computed=answer.tokens_computed,
            kv_bytes_equal=kv_equal,
            tokens_equal=tokens_equal,
        )

    def _context(self, shape: dict[str, Any], stored: StoredChunks) -> dict[str, Any]:
        packages = ("kvferry", "torch", "transformers")
        return {
            "model": self.options.model,
            "dtype": "float32",
            "block_tokens": shape["block_tokens"],
            "chunk_tokens": CHUNK_TOKENS,
            "num_chunks": len(stored.files),
            "kv_bytes_per_token": shape["kv_bytes_per_token"],
            "shared_tokens": shape["shared_tokens"],
            "questions": list(self.options.questions),
            "answers": {name: answer.text for name, answer in self.answers.items()},
            "copy_bytes_per_s": self.facts["copy_bytes_per_s"],
            "read_bytes_per_s": self.facts["read_bytes_per_s"],
            "corrupt_chunk": self.facts["corrupt_chunk"],
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "num_cpus": os.cpu_count(),
            "load_average": list(os.getloadavg()),
        }
