"""Bytes of a hand-over are proved: the consumer's ranks must make the digests that the producer's ranks made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xxhash
from tests.unit.p2p.pair import RULES, TOKENS, D, P, Pair, digest_at

from kvferry.kv.layout import GroupLayout, KVLayout, LayerLayout
from kvferry.p2p import actions as a
from kvferry.p2p import messages as m
from kvferry.p2p.digester import Digester
from kvferry.p2p.geometry import EngineGeometry, GroupGeometry, LayerGeometry, PageForm, RankGeometry
from kvferry.p2p.proof import first_blocks, proof_form
from kvferry.p2p.transports.transport import TransferStatus
from kvferry.types import AttentionKind

PUSH = {"remote_host": "p", "remote_port": 1, "transfer_mode": "push", "transfer_id": "t"}
MODES = ("pull", "push")


def made_of(job: a.DigestJob | a.TransferJob, rank: int, spoilt: tuple[int, int, int] | None = None) -> Any:
    """What a rank answers whose KV is right, but for one block (rank, group, position)."""
    if isinstance(job, a.DigestJob) and job.check_range is not None:
        of = [replace(job, token_range=tokens, check_range=None) for tokens in (job.token_range, job.check_range)]
        return tuple(digests for each in of for digests in made_of(each, rank, spoilt))
    blocks = job.blocks if isinstance(job, a.DigestJob) else job.local_blocks
    first, end = job.token_range
    out = []
    for group, ids in enumerate(blocks):
        digests = b""
        for position, block in enumerate(ids[: -(-end // 4)]):
            tokens = min(4, end - 4 * position)
            text = f"{rank} {group} {position} {tokens} {spoilt == (rank, group, position)}"
            is_read = block and position >= -(-first // 4)
            digests += xxhash.xxh3_128_digest(text.encode()) if is_read else bytes(16)
        out.append(digests)
    return tuple(out)


class World(Pair):
    """A hand-over of 12 tokens, step by step."""

    def __init__(self, mode: str = "pull", *, makes_digests: bool = True, **settings: Any) -> None:
        super().__init__(makes_digests=makes_digests, **settings)
        self.mode = mode

    def prefill(self, num_tokens: int = 12) -> None:
        self.call(P, "request_started", "r", "t", 1)
        blocks = [[1, 2, 3, 9], [4, 5, 6, 8]]
        self.params = self.call(
            P, "finish", "r", a.FinishReason.LENGTH, blocks, num_tokens, [7], digest_at, mode=self.mode
        )

    def load(self, name: str = D, params: Any = None, request_id: str = "x") -> None:
        super().load(name, params or (self.params if self.mode == "pull" else PUSH), request_id)

    def make(self, name: str, spoilt: tuple[int, int, int] | None = None, ranks: tuple[int, ...] = (0, 1)) -> int:
        """The ranks answer what they were asked for; how many jobs that were."""
        jobs = [x.job for x in self.take(name, a.StartDigests)]
        for job in jobs:
            for rank in ranks:
                self.call(name, "digests_made", job.job_id, rank, made_of(job, rank, spoilt))
        return len(jobs)

    def move(self, spoilt: tuple[int, int, int] | None = None) -> None:
        """The transfer runs; then the consumer's ranks have read what arrived."""
        name = D if self.mode == "pull" else P
        (job,) = [x.job for x in self.take(name, a.StartTransfer)]
        for rank in (0, 1):
            digests = made_of(job, rank, spoilt) if job.is_proved else None
            self.call(name, "transfer_ended", job.job_id, rank, TransferStatus.OK, "", digests=digests)
        if self.mode == "push":
            self.make(D, spoilt)

    def ended(self) -> a.LoadEnded | None:
        found = self.take(D, a.LoadEnded)
        return found[0] if found else None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_late", [False, True])
def test_equal_bytes_are_proved(mode: str, is_late: bool) -> None:
    world = World(mode)
    world.prefill()
    if not is_late:
        assert world.make(P) == 1
    world.load()
    if is_late:
        world.move()
        assert world.ended() is None, "the producer's digests are not there yet"
        assert not world.take(P, a.Release)
        world.make(P)
        world.make(D)
    else:
        world.move()
    assert world.ended() == a.LoadEnded("x", True, "", False, 12, is_proved=True)
    assert world.take(P, a.Release) == [a.Release("r", "done")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spoilt", [(0, 0, 0), (1, 0, 2), (0, 1, 1), (1, 1, 2)])
@pytest.mark.parametrize("where", [P, D])
def test_one_block_that_differs_fails_the_load(mode: str, spoilt: tuple[int, int, int], where: str) -> None:
    world = World(mode)
    world.prefill()
    world.make(P, spoilt if where == P else None)
    world.load()
    world.move(spoilt if where == D else None)
    assert world.ended() == a.LoadEnded("x", False, m.OTHER_BYTES, False, 0, is_proved=True)
    assert world.take(P, a.Release) == [a.Release("r", "done")]
    world.advance(100)
    assert world.ended() is None


@pytest.mark.parametrize("mode", MODES)
def test_the_digests_of_the_prompts_step_are_used_when_it_is_leased(mode: str) -> None:
    world = World(mode)
    world.call(P, "request_started", "r", "t", 1)
    job = world.call(P, "prompt_ends", "r", [[1, 2, 3], [4, 5, 6]], 12)
    for rank in (0, 1):
        world.call(P, "digests_made", job.job_id, rank, made_of(job, rank))
    world.prefill()
    assert not world.take(P, a.StartDigests)
    world.load()
    world.move()
    ended = world.ended()
    assert ended is not None
    assert ended.is_proved


def test_a_prompt_that_is_computed_again_has_digests_of_the_second_time() -> None:
    world = World()
    world.call(P, "request_started", "r", "t", 1)
    first, second = (world.call(P, "prompt_ends", "r", [[1, 2, 3], [4, 5, 6]], 12) for _ in range(2))
    for job, spoilt in ((second, None), (first, (0, 0, 0))):
        for rank in (0, 1):
            world.call(P, "digests_made", job.job_id, rank, made_of(job, rank, spoilt))
    world.prefill()
    world.load()
    world.move()
    assert world.ended() == a.LoadEnded("x", True, "", False, 12, is_proved=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_producer_whose_digests_do_not_come_is_not_waited_for_for_ever(mode: str) -> None:
    world = World(mode, proof_s=1.0)
    world.prefill()
    world.load()
    world.move()
    world.advance(0.9)
    assert world.ended() is None
    world.advance(0.2)
    assert world.ended() == a.LoadEnded("x", True, "", False, 12, is_proved=False)
    assert world.take(P, a.Release) == [a.Release("r", "done")]
    assert world.make(P) == 1, "nobody wants to know any more"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", [P, D])
def test_a_rank_that_cannot_compare_leaves_it_unproved(mode: str, where: str) -> None:
    world = World(mode)
    world.prefill()
    for start in world.take(P, a.StartDigests):
        world.call(P, "digests_made", start.job.job_id, 0, made_of(start.job, 0))
        world.call(P, "digests_made", start.job.job_id, 1, made_of(start.job, 1) if where == D else None)
    world.load()
    name = D if mode == "pull" else P
    (job,) = [x.job for x in world.take(name, a.StartTransfer)]
    for rank in (0, 1):
        digests = made_of(job, rank) if where == P or rank == 0 else None
        world.call(name, "transfer_ended", job.job_id, rank, TransferStatus.OK, "", digests=digests)
    for start in world.take(D, a.StartDigests):
        world.call(D, "digests_made", start.job.job_id, 0, made_of(start.job, 0))
        world.call(D, "digests_made", start.job.job_id, 1, None)
    assert world.ended() == a.LoadEnded("x", True, "", False, 12, is_proved=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("without", [P, D])
def test_an_engine_that_makes_no_digests_is_believed(mode: str, without: str) -> None:
    world = World(mode)
    world.makes_digests = False
    world.restart(without)
    world.prefill()
    world.make(P)
    world.load()
    world.move()
    assert world.ended() == a.LoadEnded("x", True, "", False, 12, is_proved=False)


def test_only_what_was_loaded_counts() -> None:
    """Tokens that the consumer had itself, and blocks outside of the window."""
    for spoilt, is_ok in (((0, 0, 0), True), ((0, 0, 1), False), ((0, 1, 0), True), ((0, 1, 1), False)):
        world = World()
        world.prefill()
        world.make(P, spoilt)
        world.call(D, "announce", "x", world.params, TOKENS)
        world.call(D, "park", "x", [[11, 12, 13], [0, 15, 16]], (4, 12))
        world.move()
        ended = world.ended()
        assert ended is not None
        assert (ended.ok, ended.is_proved) == (is_ok, True), spoilt


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spoilt", [None, (1, 0, 2)])
def test_who_wants_fewer_tokens_gets_digests_of_these(mode: str, spoilt: tuple[int, int, int] | None) -> None:
    """Of a block that is no more what it was as a whole, nothing is proved to anybody."""
    world = World(mode)
    world.prefill()
    world.make(P)
    tokens = m.TokenProof(10, digest_at(10))
    world.call(D, "announce", "x", world.params if mode == "pull" else PUSH, tokens)
    world.call(D, "park", "x", [[11, 12, 13], [0, 15, 16]], (0, 10))
    (start,) = world.take(P, a.StartDigests)
    assert start.job.token_range == (8, 10), "whole blocks keep the digests of before"
    assert start.job.check_range == (8, 12), "and the one that was whole is read so once more"
    for rank in (0, 1):
        world.call(P, "digests_made", start.job.job_id, rank, made_of(start.job, rank, spoilt))
    world.move(spoilt)
    ended = world.ended()
    assert ended is not None
    assert (ended.ok, ended.is_proved) == (spoilt is None, True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [m.Confirm, m.Verdict, m.Pushed, m.PushedSeen])
@pytest.mark.parametrize("spoilt", [None, (0, 0, 1)])
def test_messages_of_the_proof_may_be_lost_once(mode: str, kind: type, spoilt: Any) -> None:
    world, lost = World(mode), []

    def is_lost(message: m.Message) -> bool:
        if isinstance(message, kind) and not lost:
            lost.append(message)
            return True
        return False

    world.lost = is_lost
    world.prefill()
    world.make(P, spoilt)
    world.load()
    world.move()
    world.advance(3)
    world.make(D)
    ended = world.ended()
    assert ended is not None
    assert (ended.ok, ended.is_proved) == (spoilt is None, True)
    world.advance(100)
    assert world.ended() is None


@pytest.mark.parametrize("mode", MODES)
def test_a_lease_taken_back_while_it_is_proved_is_no_lie(mode: str) -> None:
    world = World(mode)
    world.prefill()
    world.load()
    world.move()
    world.call(P, "abort", "r")
    world.make(P, (0, 0, 0))
    world.make(D)
    ended = world.ended()
    assert ended is not None
    assert not ended.is_proved
    assert ended.ok == (mode == "push"), "what was pushed was right when it was written"
    assert world.take(P, a.Release) == [a.Release("r", "aborted")]


@pytest.mark.parametrize("mode", MODES)
def test_who_wants_fewer_whole_blocks_waits_for_nothing(mode: str) -> None:
    world = World(mode)
    world.prefill()
    world.make(P)
    world.call(D, "announce", "x", world.params if mode == "pull" else PUSH, m.TokenProof(8, digest_at(8)))
    world.call(D, "park", "x", [[11, 12], [0, 15]], (0, 8))
    assert not world.take(P, a.StartDigests)
    world.move()
    ended = world.ended()
    assert ended is not None
    assert (ended.ok, ended.is_proved) == (True, True)


def test_a_proof_of_another_form_is_none() -> None:
    """Whatever a peer claims of its groups and ranks."""
    for firsts, ranks in (((0,), 2), ((0, 0, 0), 2), ((0, 1), 1), ((9, 9), 2)):
        world = World()
        world.prefill()
        world.make(P)
        world.load()
        job = world.take(D, a.StartTransfer)[0].job
        world.lost = lambda message: isinstance(message, m.Confirm)
        for rank in (0, 1):
            world.call(D, "transfer_ended", job.job_id, rank, TransferStatus.OK, "", digests=made_of(job, rank))
        (confirm,) = [x for _, _, x in world.sent if isinstance(x, m.Confirm)]
        assert confirm.proof is not None
        proof = m.BytesProof(firsts, 12, (b"0" * 16,) * ranks)
        sent = m.Confirm(proof, generation=confirm.generation, claim_id=confirm.claim_id, to=confirm.to)
        world.lost = lambda message: False
        world.call(P, "message", D, sent)
        ended = world.ended()
        assert ended is not None
        assert not (ended.ok and ended.is_proved)


@pytest.mark.parametrize("mode", MODES)
def test_a_hand_over_of_no_tokens_has_nothing_to_prove(mode: str) -> None:
    world = World(mode)
    world.call(P, "request_started", "r", "t", 1)
    params = world.call(P, "finish", "r", a.FinishReason.LENGTH, [[], []], 0, [7], digest_at, mode=mode)
    world.call(D, "announce", "x", params if mode == "pull" else PUSH, m.TokenProof(0, digest_at(0)))
    world.call(D, "park", "x", [[], []], (0, 0))
    ended = world.ended()
    assert ended is not None
    assert ended.ok


def test_first_blocks_are_those_that_both_have() -> None:
    both = ((1, 2, 3), (0, 5, 6))
    assert first_blocks(both, both, RULES, (0, 12)) == (0, 1)
    assert first_blocks(both, ((1, 2, 3), (4, 0, 6)), RULES, (0, 12)) == (0, 2)
    assert first_blocks(both, both, RULES, (4, 10)) == (1, 1)
    assert first_blocks(both, both, RULES, (5, 12)) == (2, 2), "a block that is loaded in part is not proved"
    assert first_blocks(both, ((1, 2), (4, 5)), RULES, (0, 12)) is None
    assert first_blocks(both, ((1, 2, 3),), RULES, (0, 12)) is None


# ---- digests of memory ----------------------------------------------------------------------------------------

HEADS, TOKENS_PER_PAGE, RATIO, K, V, SIZE, BLOCKS = 2, 4, 2, 3, 5, 2, 6
CONTENT_BYTES = (K + V) * SIZE


def world_of(order: str, form: PageForm, gap: int = 0) -> tuple[Digester, np.ndarray, EngineGeometry]:
    """Two layers of one group; kernel blocks of a layer lie behind each other, `gap` bytes apart."""
    page = HEADS * TOKENS_PER_PAGE * CONTENT_BYTES
    by_head = (TOKENS_PER_PAGE * CONTENT_BYTES, CONTENT_BYTES, SIZE)
    strides = by_head if order == "HNC" else (CONTENT_BYTES, HEADS * CONTENT_BYTES, SIZE)
    layers = [
        LayerLayout(
            f"layer.{i}", "float16", 0, i * BLOCKS * RATIO * (page + gap), page + gap, RATIO,
            (HEADS, TOKENS_PER_PAGE, K + V), strides, SIZE,
        )
        for i in range(2)
    ]  # fmt: skip
    memory = np.random.default_rng(3).integers(0, 256, 2 * BLOCKS * RATIO * (page + gap), dtype=np.uint8)
    group = GroupLayout(0, RATIO * TOKENS_PER_PAGE, tuple(layers))
    parts = (("k", K), ("v", V))
    described = tuple(LayerGeometry(0, y, tuple(range(HEADS)), parts, form) for y in layers)
    groups = (GroupGeometry(RATIO * TOKENS_PER_PAGE, AttentionKind.FULL),)
    rank = RankGeometry(BLOCKS, (memory.nbytes,), groups, described)
    return Digester(KVLayout(BLOCKS, (group,)), rank, [memory.ctypes.data]), memory, EngineGeometry((rank,))


def bytes_of_token(memory: np.ndarray, order: str, form: PageForm, gap: int, block: int, token: int) -> set[int]:
    """The addresses of a token's elements, by the definition of order and form."""
    page, out = HEADS * TOKENS_PER_PAGE * CONTENT_BYTES, set()
    for layer in range(2):
        at = (layer * BLOCKS * RATIO + block * RATIO + token // TOKENS_PER_PAGE) * (page + gap)
        t = token % TOKENS_PER_PAGE
        for head in range(HEADS):
            for element in range(K + V):
                if order == "NHC":
                    place = (t * HEADS + head) * (K + V) + element
                elif form is PageForm.CONTENT:
                    place = (head * TOKENS_PER_PAGE + t) * (K + V) + element
                elif element < K:
                    place = head * TOKENS_PER_PAGE * (K + V) + element * TOKENS_PER_PAGE + t
                else:
                    place = head * TOKENS_PER_PAGE * (K + V) + K * TOKENS_PER_PAGE + t * V + element - K
                out |= {at + place * SIZE, at + place * SIZE + 1}
    return out


@pytest.mark.parametrize(
    ("order", "form"), [("HNC", PageForm.CONTENT), ("NHC", PageForm.CONTENT), ("HNC", PageForm.K_BY_ELEMENT)]
)
@pytest.mark.parametrize("num_tokens", [8, 16, 11, 3, 13])
def test_a_digest_is_of_the_bytes_of_its_tokens_and_of_no_others(order: str, form: PageForm, num_tokens: int) -> None:
    gap = 10
    digester, memory, _ = world_of(order, form, gap)
    try:
        job = a.DigestJob("j", None, ((4, 2),), (0, num_tokens))
        before = digester.digests(job)
        assert len(before[0]) == 16 * -(-num_tokens // 8)
        inside: set[int] = set()
        for token in range(num_tokens):
            inside |= bytes_of_token(memory, order, form, gap, (4, 2)[token // 8], token % 8)
        for address in range(memory.nbytes):
            memory[address] ^= 0x20
            assert (digester.digests(job) != before) == (address in inside), address
            memory[address] ^= 0x20
    finally:
        digester.close()


def test_where_blocks_lie_does_not_count_but_their_order_within_a_page_does() -> None:
    made = {}
    for name, order, gap in (("a", "HNC", 0), ("b", "HNC", 10), ("c", "NHC", 0)):
        digester, _, engine = world_of(order, PageForm.CONTENT, gap)
        digester.close()
        made[name] = proof_form(engine)
    assert made["a"] == made["b"] != made["c"]


def test_blocks_that_are_cut_into_other_pages_have_another_form() -> None:
    """Digests of a block that is filled in part go page by page."""

    def engine(tokens_per_page: int, ratio: int) -> EngineGeometry:
        page = tokens_per_page * 4
        y = LayerLayout("a", "int8", 0, 0, page, ratio, (1, tokens_per_page, 4), (page, 4, 1), 1)
        groups = (GroupGeometry(16, AttentionKind.FULL),)
        layer = LayerGeometry(0, y, (0,), (("k", 2), ("v", 2)))
        return EngineGeometry((RankGeometry(2, (2 * 64,), groups, (layer,)),))

    assert proof_form(engine(16, 1)) != proof_form(engine(8, 2))


def test_a_job_ends_also_when_its_blocks_cannot_be_read() -> None:
    digester, _, _ = world_of("HNC", PageForm.CONTENT)
    try:
        digester.submit(a.DigestJob("bad", None, ((),), (0, 8)))
        digester.submit(a.DigestJob("good", None, ((1,),), (0, 8)))
        found: dict[str, Any] = {}
        while len(found) < 2:
            found |= dict(digester.poll())
        assert found["bad"] is None
        assert found["good"] == digester.digests(a.DigestJob("", None, ((1,),), (0, 8)))
    finally:
        digester.close()
