"""The demo's disaggregated act: one engine process prefills, another decodes with its KV, over shared memory.

    decode engine    computes prompt and answer itself, then forgets: its pool is overwritten
    prefill engine   computes the same prompt, and its first token
    decode engine    answers with that KV, of which it has computed nothing

Both compute with one thread, so that two processes do as well on two cores as one. Each reads the KV that is compared
from its own pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.cli.child import EngineProcess
from kvferry.cli.demo_answer import Answer, compare_tokens, conversation
from kvferry.cli.demo_report import HandoverResult, Proof

if TYPE_CHECKING:
    from rich.console import Console

_DOCUMENT_PART = 3  # a third of it is enough here, for it is prefilled twice by one thread


@dataclass(frozen=True, slots=True)
class HandoverAct:
    """What the act is about; `run` adds what it proves to `proofs`."""

    model: str
    document: str
    question: str
    num_kv_blocks: int
    """Of each engine: enough for document, question and answer."""
    folder: Path
    console: Console
    proofs: list[Proof]

    def run(self) -> HandoverResult:
        """Both engines, from start to end. ChildError, with the engine's log, when one of them breaks."""
        with self._engine("prefill") as prefill, self._engine("decode") as decode:
            shape = self._open(prefill, decode)
            with self.console.status("the decode engine computes the prompt itself"):
                local = Answer(**decode.call("compute"))
            self._say("recomputed", local.ttft_s)
            emptied = decode.call("forget")
            with self.console.status("the prefill engine computes the prompt"):
                answer = prefill.call("prefill")
            params = answer.pop("params")
            source = Answer(**answer)
            answer = decode.call("decode", params=params)
            num_bytes = answer.pop("num_bytes")
            handed = Answer(**answer)
            self._say("handed over", handed.ttft_s)
            for line in conversation(self.question, handed.text):
                self.console.print(line)
            self._prove_moved(emptied, source, handed, num_bytes)
            self._prove_given_back(prefill)
            rate = decode.call("copy_rate", num_bytes=num_bytes.get("shm", 0))["bytes_per_s"]
            for engine in (decode, prefill):
                engine.stop()
        return self._result(shape, source, local, handed, num_bytes.get("shm", 0) / rate)

    def _engine(self, name: str) -> EngineProcess:
        engine = EngineProcess(self.folder / f"{name}.log", num_threads=1)
        self.console.print(f"[dim]engine process {engine.pid} ({name})[/dim]")
        return engine

    def _open(self, *engines: EngineProcess) -> dict[str, Any]:
        """Both at once."""
        document = self.document[: len(self.document) // _DOCUMENT_PART]
        with self.console.status("loading the model in both processes"):
            for engine in engines:
                engine.ask(
                    "open_peer", model=self.model, document=document, questions=[self.question],
                    num_kv_blocks=self.num_kv_blocks, folder=str(self.folder),
                )  # fmt: skip
            *_, shape = [engine.answer("open_peer") for engine in engines]
        return shape

    def _say(self, title: str, ttft_s: float) -> None:
        self.console.print(f"  {title:>11}  first token after {ttft_s:.3f} s", highlight=False)

    def _prove(self, held: bool, claim: str) -> None:
        self.proofs.append(Proof(held, f"handed over: {claim}"))

    def _prove_moved(self, emptied: dict[str, Any], source: Answer, handed: Answer, num_bytes: dict[str, int]) -> None:
        self._prove(
            emptied["num_poisoned"] == emptied["num_blocks"],
            f"the decode engine's pool of {emptied['num_blocks']} blocks was overwritten with "
            f"0x{emptied['poison']:02x} before",
        )
        self._prove(
            handed.tokens_from_peer == source.tokens_computed == handed.prompt_tokens and not handed.tokens_computed,
            f"the prefill engine computed {source.tokens_computed} of {source.prompt_tokens} prompt tokens, the decode "
            f"engine {handed.tokens_computed}; it loaded {handed.tokens_from_peer}",
        )
        moved = {name: count for name, count in num_bytes.items() if count}
        self._prove(set(moved) == {"shm"}, f"bytes moved, by transport: {moved}")

    def _prove_given_back(self, prefill: EngineProcess) -> None:
        num_held = prefill.call("take_back")["num_held_blocks"]
        self._prove(num_held == 0, f"the prefill engine holds {num_held} blocks afterwards")

    def _result(
        self, shape: dict[str, Any], source: Answer, local: Answer, handed: Answer, limit_s: float
    ) -> HandoverResult:
        num_blocks = len(source.block_digests)
        kv_equal = num_blocks > 0 and handed.block_digests == source.block_digests
        self._prove(kv_equal, f"the KV bytes of all {num_blocks} blocks are equal in both engines' pools")
        tokens_equal, remark = compare_tokens(handed, local)
        self._prove(tokens_equal, f"it answers as it does when it computes the prompt itself{remark}")
        self._prove(
            handed.ttft_s < local.ttft_s,
            f"the decode engine's first token came after {handed.ttft_s:.3f} s instead of {local.ttft_s:.3f} s",
        )
        return HandoverResult(
            ttft_s=handed.ttft_s,
            limit_s=limit_s,
            recompute_ttft_s=local.ttft_s,
            prefill_s=source.ttft_s,
            prompt_tokens=handed.prompt_tokens,
            tokens_from_peer=handed.tokens_from_peer,
            kv_bytes_per_token=shape["kv_bytes_per_token"],
            kv_bytes_equal=kv_equal,
            tokens_equal=tokens_equal,
        )
