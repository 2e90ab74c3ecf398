"""A small world in which P2P cores meet everything that goes wrong, driven by one random seed.

Engines have memory: a block is a list of cells (one per rank), a cell holds a value. A request's KV is the tuple
(request, group, position, cell), so that one wrong, stale or missing cell is seen. A freed block is overwritten at
once, as if another request had got it. One-sided transfers read and write cell by cell, each at its own time,
also after the core gave the load up; only destroying the connection ends that. Messages are lost, doubled, delayed and
overtake each other. Engines crash and come back at the same address with empty memory and a new generation, freeze,
lose links. Routers mix requests up, so that an engine is sent for the KV of other tokens. About half of them make
digests of cells, some late or never.

The rules are checked here, by what is in memory and what was promised, never by asking the core. `run` answers the
list of broken rules.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from kvferry.p2p import actions as a
from kvferry.p2p import messages as m
from kvferry.p2p.core import P2PCore
from kvferry.p2p.transports.transport import TransferOp, TransferStatus

SETTINGS = a.P2PSettings(
    lease_s=3, claim_s=2, max_lease_s=15, announce_s=8, load_s=5, handshake_s=2, retry_s=0.2, liveness_s=2,
    quarantine_s=0.7, idle_s=20, backoff_s=0.2, max_backoff_s=1, memory_s=60,
)  # fmt: skip
RULES = (a.GroupRule(4), a.GroupRule(4, window_tokens=8))
NUM_RANKS = 2
NUM_BLOCKS = 60
LATEST_MESSAGE_S = 6.0
SLACK_S = 0.05


@dataclass
class Faults:
    """Chances of what goes wrong; zeros are a calm world."""

    loss: float = 0.0
    double: float = 0.0
    late: float = 0.0
    slow: float = 0.0  # transfers
    hang: float = 0.0
    fail: float = 0.0
    unknown: float = 0.0
    crash: float = 0.0  # per engine
    freeze: float = 0.0
    glitch: float = 0.0  # control links
    abort: float = 0.0  # per request and side
    odd_finish: float = 0.0  # producer ends with abort or error

    @classmethod
    def draw(cls, rng: random.Random) -> Faults:
        """A calm world, one with a few faults that happen all the time, or one with a little of many."""
        names = [f.name for f in fields(cls)]
        kind = rng.random()
        if kind < 0.1:
            return cls()
        if kind < 0.4:
            return cls(**dict.fromkeys(rng.sample(names, rng.choice((1, 2, 3))), 0.6))
        return cls(**{name: rng.choice((0.0, 0.0, 0.05, 0.15, 0.4)) for name in names})


@dataclass
class Engine:
    """One life of one engine."""

    name: str
    generation: str
    core: P2PCore
    cells: list[list[Any]]
    free: list[int]
    is_alive: bool = True
    frozen_until: float = 0.0
    tick_s: float = float("inf")
    links: set[str] = field(default_factory=set)  # control links that are up
    connections: dict[int, Connection] = field(default_factory=dict)
    sources: dict[str, tuple[Request, list[list[int]]]] = field(default_factory=dict)
    loads: dict[str, LoadTruth] = field(default_factory=dict)


@dataclass
class Connection:
    """One engine's end of a transport connection: made for one life of the peer."""

    peer: str
    peer_generation: str
    is_broken: bool = False
    is_closed: bool = False


@dataclass
class Request:
    """What the router knows about one request."""

    uid: str
    mode: str
    source: str
    destinations: list[str]
    num_tokens: int
    first_token_ids: tuple[int, ...] = ()
    finished_s: float | None = None
    is_source_aborted: bool = False
    served: set[str] = field(default_factory=set)  # destinations that said they have it, or do not want it


@dataclass
class LoadTruth:
    """What must be true of one load."""

    request: Request
    uid: str
    token_range: tuple[int, int]
    deadline_s: float
    blocks: list[list[int]] | None = None
    ended: a.LoadEnded | None = None
    is_other: bool = False  # of other tokens than those that the producer computed
    is_excused: bool = False  # the engine was frozen meanwhile: its deadline could not be kept


class Piece:
    """One cell on its way."""

    __slots__ = ("destination", "is_read", "source", "value")

    def __init__(self, source: tuple[Engine, int, int], destination: tuple[Engine, int, int]) -> None:
        self.source, self.destination = source, destination
        self.is_read, self.value = False, None


@dataclass(eq=False)
class Transfer:
    """One rank's part of a job."""

    owner: Engine
    target: Engine | None
    connection: Connection
    job: a.TransferJob
    rank: int
    pending: set[Piece] = field(default_factory=set)
    is_damaged: bool = False
    is_reported: bool = False


def digest_of(text: str, num_tokens: int) -> bytes:
    """Of the first so many tokens of a request."""
    return hashlib.sha256(f"{text} {num_tokens}".encode()).digest()


class World:
    """See the module."""

    def __init__(self, seed: int, faults: Faults | None = None) -> None:
        self.rng = random.Random(seed)
        self.proof_rng = random.Random(f"proofs of {seed}")  # of its own: schedules stay what they are
        self.faults = faults or Faults.draw(self.rng)
        self.is_calm = self.faults == Faults()
        self.settings = SETTINGS
        if not self.is_calm and self.rng.random() < 0.1:
            self.settings = replace(SETTINGS, max_claims=2, max_remembered=3, max_peers=2)
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.junk = itertools.count()
        self.broken: list[str] = []
        self.transfers: list[Transfer] = []
        self.engines: dict[str, Engine] = {}
        self.claims: dict[str, tuple[Engine, str]] = {}  # claim -> producer's life, request
        self.promises: dict[str, float] = {}
        self.num_loads = self.num_ok = self.num_steps = 0
        for number in range(self.rng.choice((2, 2, 3, 4))):
            self.start(f"engine{number}:7000")

    # Time.

    def at(self, delay_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (self.now + delay_s, next(self.order), do))

    def run(self) -> list[str]:
        self.script()
        while self.heap and not self.broken:
            self.now, _, do = heapq.heappop(self.heap)
            if self.now > 200:
                break
            self.num_steps += 1
            if self.num_steps > 30_000:
                self.broken.append("the cores keep each other busy for ever")
                break
            do()
        if not self.broken:
            self.check_end()
        return self.broken

    def rule(self, holds: bool, text: str) -> None:
        if not holds:
            self.broken.append(f"{self.now:.3f} {text}")

    # Engines.

    def start(self, name: str) -> None:
        host, port = name.split(":")
        generation = f"{self.rng.getrandbits(128):032x}"
        local = a.LocalEngine(
            f"id-{name}",
            generation,
            host,
            int(port),
            NUM_RANKS,
            b"geometry",
            {"fake": (generation.encode(),) * NUM_RANKS},
            RULES,
            makes_digests=self.proof_rng.random() < 0.5,
        )
        core = P2PCore(local, lambda *_: [], self.settings, lambda: f"{self.rng.getrandbits(128):032x}")
        cells = [[("junk", next(self.junk)) for _ in range(NUM_RANKS)] for _ in range(NUM_BLOCKS)]
        free = list(range(1, NUM_BLOCKS))
        self.rng.shuffle(free)
        self.engines[name] = Engine(name, generation, core, cells, free)

    def call(self, engine: Engine, do: Callable[[P2PCore], Any]) -> Any:
        """Give an awake engine an input, and carry out what it wants."""
        if not engine.is_alive or self.broken:
            return None
        answer = do(engine.core)
        for action in engine.core.take_actions():
            self.act(engine, action)
        due = engine.core.next_deadline()
        self.rule(due > self.now - 1e-9, f"{engine.name} is due at {due} and did nothing")
        if due < engine.tick_s:
            engine.tick_s = due
            self.at(max(due - self.now, 0.0) + 1e-6, lambda: self.tick(engine, due))
        return answer

    def tick(self, engine: Engine, due: float) -> None:
        if engine.tick_s == due:
            self.awake(engine, lambda: self.tick_now(engine))

    def tick_now(self, engine: Engine) -> None:
        engine.tick_s = float("inf")
        self.call(engine, lambda core: core.tick(self.now))

    def awake(self, engine: Engine, do: Callable[[], None]) -> None:
        """Now, or when the engine is not frozen any more."""
        if engine.frozen_until > self.now:
            self.at(engine.frozen_until - self.now + self.rng.random() * 0.01, lambda: self.awake(engine, do))
        elif engine.is_alive:
            do()

    def act(self, engine: Engine, action: a.Action) -> None:  # noqa: C901 (one case per action)
        match action:
            case a.Send():
                self.send(engine, action)
            case a.Connect() if action.peer not in engine.links:  # else there is nothing new to tell
                self.at(self.small(), lambda: self.dialled(engine, action.peer))
            case a.Disconnect():
                engine.links.discard(action.peer)
            case a.OpenPeer():
                blob = action.hello.transports["fake"][0].decode()
                engine.connections[action.connection] = Connection(action.peer, blob)
            case a.ClosePeer():
                self.at(self.small() * self.rng.choice((1, 1, 20)), lambda: self.destroy(engine, action))
                for claim_id, (producer, _) in self.claims.items():
                    if producer is engine:
                        self.promises.pop(claim_id, None)
            case a.StartTransfer():
                for rank in range(NUM_RANKS):
                    self.transfer(engine, action.job, rank)
                victim = self.rng.choice((engine.name, action.job.peer))
                for fault, chance in ((self.crash, self.faults.crash), (self.freeze, self.faults.freeze)):
                    if self.rng.random() < chance / 2:
                        self.at(self.small() * self.rng.choice((1, 20)), lambda fault=fault: fault(victim))
            case a.StartDigests():
                for rank in range(NUM_RANKS):
                    self.digest(engine, action.job, rank)
            case a.Release():
                self.release(engine, action)
            case a.LoadEnded():
                self.load_ended(engine, action)
            case a.BlocksSafe():
                self.give_back(engine, engine.loads[action.request_id])

    def digest(self, engine: Engine, job: a.DigestJob, rank: int) -> None:
        """A rank reads its blocks soon, answers later, or never."""
        answer_s = self.small() * self.proof_rng.choice((1, 1, 1, 100))

        def read() -> None:
            ranges = [tokens for tokens in (job.token_range, job.check_range) if tokens is not None]
            made = tuple(of for tokens in ranges for of in self.digests(engine, job.blocks, tokens, rank))
            tell = lambda: self.call(engine, lambda core: core.digests_made(job.job_id, rank, made, self.now))  # noqa: E731
            if self.is_calm or self.proof_rng.random() < 0.95:
                self.at(answer_s, lambda: self.awake(engine, tell))

        self.awake(engine, read)

    def digests(self, engine: Engine, blocks: Any, token_range: tuple[int, int], rank: int) -> tuple[bytes, ...]:
        """By group, position after position, of what is in the cells now."""
        out = []
        for rule, ids in zip(RULES, blocks, strict=True):
            first, end = -(-token_range[0] // rule.block_tokens), -(-token_range[1] // rule.block_tokens)
            texts = [str(engine.cells[block][rank]) if block else "" for block in ids[first:end]]
            found = [hashlib.md5(text.encode()).digest() if text else bytes(16) for text in texts]
            out.append(bytes(16 * min(first, end)) + b"".join(found))
        return tuple(out)

    def small(self) -> float:
        return 0.001 + self.rng.random() * 0.02

    # Network.

    def send(self, engine: Engine, send: a.Send) -> None:
        self.observe(engine, send)
        data = m.CODEC.encode(send.message)
        copies = 0 if self.rng.random() < self.faults.loss else 1 + (self.rng.random() < self.faults.double)
        for _ in range(copies):
            delay_s = self.small()
            if self.rng.random() < self.faults.late:
                delay_s = self.rng.random() * self.rng.choice((0.3, LATEST_MESSAGE_S))
            self.at(delay_s, lambda: self.deliver(engine.name, send.peer, data))

    def deliver(self, sender: str, receiver: str, data: bytes) -> None:
        if (engine := self.engines[receiver]).is_alive:
            message = m.CODEC.decode(data)
            self.awake(engine, lambda: self.call(engine, lambda core: core.message(sender, message, self.now)))

    def dialled(self, engine: Engine, peer: str) -> None:
        if self.engines[peer].is_alive:
            engine.links.add(peer)
            self.awake(engine, lambda: self.call(engine, lambda core: core.peer_connected(peer, self.now)))
        else:
            self.awake(engine, lambda: self.call(engine, lambda core: core.peer_lost(peer, "refused", self.now)))

    def observe(self, engine: Engine, send: a.Send) -> None:
        """Note what is promised and what is known, from the messages alone."""
        message = send.message
        match message:
            case m.Claim():
                for other in self.engines.values():
                    for uid, (request, _) in other.sources.items():
                        if getattr(request, "lease_id", None) == message.lease_id and request.source == send.peer:
                            self.claims[message.claim_id] = (other, uid)
            case m.Granted():
                self.promises[message.claim_id] = self.now + message.remaining_ms / 1000
            case m.Renewed() if message.claim_id in self.promises:
                self.promises[message.claim_id] = self.now + message.remaining_ms / 1000
            case m.Refused() | m.Verdict() | m.Withdrawn() | m.Pushed():
                self.promises.pop(message.claim_id, None)
        if isinstance(message, m.Confirm | m.Withdraw) and message.claim_id in self.claims:
            producer, uid = self.claims[message.claim_id]
            if uid in producer.sources:
                producer.sources[uid][0].served.add(engine.name)

    # Memory and transfers.

    def take_blocks(self, engine: Engine, num_blocks: int) -> list[int]:
        return [engine.free.pop() for _ in range(num_blocks)]

    def give_back(self, engine: Engine, load: LoadTruth) -> None:
        """The host uses the blocks for something else, at once."""
        for block in itertools.chain(*(load.blocks or [])):
            if block:
                for transfer in self.transfers:
                    for piece in transfer.pending:
                        self.rule(
                            piece.destination[:2] != (engine, block),
                            f"{load.uid}: block {block} is free, and bytes may land in it",
                        )
                self.scribble(engine, block)
        load.blocks = None

    def scribble(self, engine: Engine, block: int) -> None:
        engine.cells[block] = [("junk", next(self.junk)) for _ in range(NUM_RANKS)]
        engine.free.append(block)  # the next one to be taken

    def transfer(self, engine: Engine, job: a.TransferJob, rank: int) -> None:
        connection = engine.connections[job.connection]
        self.rule(connection.peer == job.peer and not connection.is_closed, "a transfer over a closed connection")
        target = self.engines[job.peer]
        is_stale = connection.peer_generation != target.generation
        transfer = Transfer(engine, target, connection, job, rank)
        self.transfers.append(transfer)
        if connection.is_broken or not target.is_alive or (is_stale and self.rng.random() < 0.3):
            self.at(self.small(), lambda: self.report(transfer, TransferStatus.FAILED))
            return
        spread_s = self.small() if self.rng.random() >= self.faults.slow else self.rng.random() * 5
        lands_s = self.small() if self.rng.random() >= self.faults.slow else self.rng.random() * 3
        for local, remote in self.pairs(job):
            # Metadata of an earlier life: addresses mean something else there.
            there = self.rng.randrange(1, NUM_BLOCKS) if is_stale else remote
            here_end, there_end = (engine, local, rank), (target, there, rank)
            piece = Piece(there_end, here_end) if job.op is TransferOp.READ else Piece(here_end, there_end)
            transfer.pending.add(piece)
            self.at(
                self.rng.random() * spread_s,
                lambda piece=piece: self.read(transfer, piece, self.rng.random() * lands_s),
            )
        self.at(spread_s + lands_s, lambda: self.finish_transfer(transfer))
        roll = self.rng.random()
        if roll < self.faults.hang:
            transfer.is_reported = True
        elif roll < self.faults.hang + self.faults.unknown:
            self.at(self.rng.random() * (spread_s + lands_s), lambda: self.report(transfer, TransferStatus.UNKNOWN))
        elif roll < self.faults.hang + self.faults.unknown + self.faults.fail:
            self.at(self.rng.random() * (spread_s + lands_s), lambda: self.fail(transfer))

    def pairs(self, job: a.TransferJob) -> list[tuple[int, int]]:
        pairs = []
        for rule, local, remote in zip(RULES, job.local_blocks, job.remote_blocks, strict=True):
            first, end = job.token_range[0] // rule.block_tokens, -(-job.token_range[1] // rule.block_tokens)
            pairs += [(local[p], remote[p]) for p in range(first, end) if local[p] and remote[p]]
        return pairs

    def read(self, transfer: Transfer, piece: Piece, lands_in_s: float) -> None:
        if piece not in transfer.pending:
            return
        engine, block, cell = piece.source
        if not engine.is_alive:
            transfer.pending.discard(piece)
            transfer.is_damaged = True
            return
        piece.is_read, piece.value = True, engine.cells[block][cell]
        self.at(lands_in_s, lambda: self.land(transfer, piece))

    def land(self, transfer: Transfer, piece: Piece) -> None:
        if piece in transfer.pending:
            transfer.pending.discard(piece)
            engine, block, cell = piece.destination
            engine.cells[block][cell] = piece.value

    def finish_transfer(self, transfer: Transfer) -> None:
        if transfer.pending:
            self.at(0.01, lambda: self.finish_transfer(transfer))
        elif transfer.is_damaged:
            self.report(transfer, self.rng.choice((TransferStatus.FAILED, TransferStatus.UNKNOWN)))
        else:
            self.report(transfer, TransferStatus.OK)

    def fail(self, transfer: Transfer) -> None:
        if not transfer.is_reported:
            transfer.pending.clear()
            self.report(transfer, TransferStatus.FAILED)

    def report(self, transfer: Transfer, status: TransferStatus) -> None:
        if transfer.is_reported:
            return
        transfer.is_reported = True
        if status is TransferStatus.FAILED:
            transfer.connection.is_broken = True
        engine, job = transfer.owner, transfer.job
        is_read = job.is_proved and status is TransferStatus.OK
        made = self.digests(engine, job.local_blocks, job.token_range, transfer.rank) if is_read else None
        for _ in range(1 + (self.rng.random() < self.faults.double)):
            self.awake(
                engine,
                lambda: self.call(
                    engine, lambda core: core.transfer_ended(job.job_id, transfer.rank, status, "sim", self.now, made)
                ),
            )

    def destroy(self, engine: Engine, action: a.ClosePeer) -> None:
        """After this nothing moves between the two lives any more, in either direction."""
        connection = engine.connections[action.connection]
        connection.is_closed = True
        for transfer in self.transfers:
            is_own = transfer.connection is connection
            is_theirs = transfer.owner.generation == connection.peer_generation and transfer.target is engine
            if is_theirs and transfer.job.op is TransferOp.READ and self.rng.random() < 0.7:
                continue  # nothing lands here; a shared mapping, say, can be read on
            if is_own or is_theirs:
                transfer.pending.clear()
                transfer.is_damaged = True
                transfer.is_reported |= is_own
        other = self.engines[action.peer]
        for theirs in other.connections.values():
            if theirs.peer_generation == engine.generation:
                theirs.is_broken = True
        closed = lambda: self.call(engine, lambda core: core.peer_closed(action.peer, action.connection, self.now))  # noqa: E731
        self.awake(engine, closed)

    # Hosts.

    def begin(self, request: Request) -> None:
        """The producer's host starts a request."""
        engine = self.engines[request.source]
        num_blocks = -(-request.num_tokens // 4)
        if not engine.is_alive:
            return
        if len(engine.free) < 2 * num_blocks + 4:
            self.at(0.1, lambda: self.awake(engine, lambda: self.begin(request)))
            return
        blocks = [self.take_blocks(engine, num_blocks + 1) for _ in RULES]  # one block of lookahead
        for group, ids in enumerate(blocks):
            for position, block in enumerate(ids):
                engine.cells[block] = [(request.uid, group, position, cell) for cell in range(NUM_RANKS)]
        engine.sources[request.uid] = (request, blocks)
        if request.mode == "push" or self.rng.random() < 0.5:
            transfer_id = request.uid if request.mode == "push" else None
            self.call(
                engine, lambda c: c.request_started(request.uid, transfer_id, len(request.destinations), self.now)
            )
        self.at(self.rng.random() * 0.5, lambda: self.awake(engine, lambda: self.end(engine, request)))

    def end(self, engine: Engine, request: Request) -> None:
        """The producer's host finishes it."""
        if request.is_source_aborted or request.uid not in engine.sources:
            return
        _, blocks = engine.sources[request.uid]
        reason = self.rng.choice((a.FinishReason.LENGTH, a.FinishReason.STOP))
        if self.rng.random() < self.faults.odd_finish:
            reason = self.rng.choice((a.FinishReason.ABORT, a.FinishReason.ERROR))
        is_normal = reason in (a.FinishReason.LENGTH, a.FinishReason.STOP)
        request.first_token_ids = (self.rng.randrange(1000),)
        if len(request.destinations) > 1:
            self.call(engine, lambda c: c.request_started(request.uid, None, len(request.destinations), self.now))
        request.finished_s = self.now
        params = None

        def finish(core: P2PCore) -> None:
            nonlocal params
            params = core.finish(
                request.uid, reason, blocks, request.num_tokens, request.first_token_ids,
                lambda num_tokens: digest_of(request.uid, num_tokens), self.now, mode=request.mode,
            )  # fmt: skip
            request.lease_id = params and params["remote_lease_id"]

        self.call(engine, finish)
        self.rule((params is not None) == is_normal, f"{request.uid}: {reason} answered {params and 'params'}")
        if params is None:
            self.free_source(engine, request.uid)
        elif request.mode == "pull":
            late = self.rng.random() < self.faults.late
            for name in request.destinations:
                self.at(
                    self.rng.random() * (5 if late else 0.2), lambda name=name: self.announce(request, name, params)
                )

    def free_source(self, engine: Engine, uid: str) -> None:
        _, blocks = engine.sources.pop(uid)
        for block in itertools.chain(*blocks):
            for transfer in self.transfers:
                if transfer.owner is engine:  # a reader elsewhere finds out; our own writer would not
                    for piece in transfer.pending:
                        self.rule(
                            piece.is_read or piece.source[:2] != (engine, block), f"{uid}: freed under our own write"
                        )
            self.scribble(engine, block)

    def release(self, engine: Engine, action: a.Release) -> None:
        uid = action.request_id
        self.rule(uid in engine.sources, f"{uid} released twice")
        request, _ = engine.sources[uid]
        if request.mode == "pull" and not request.is_source_aborted:
            is_served = len(request.served) >= len(request.destinations)
            is_over = self.now >= request.finished_s + SETTINGS.lease_s - 1e-6
            self.rule(is_served or is_over, f"{uid}: released before its lease ended, served: {sorted(request.served)}")
            for claim_id, until in self.promises.items():
                if self.claims.get(claim_id, (None, None))[:2] == (engine, uid):
                    self.rule(
                        until <= self.now + 0.002,
                        f"{uid}: released although a claim was promised {until - self.now} s more",
                    )
        self.free_source(engine, uid)

    def announce(self, request: Request, name: str, params: dict[str, Any]) -> None:
        """The consumer's host gets the request."""
        engine = self.engines[name]
        first = (
            self.rng.randrange(0, request.num_tokens + 1, 4) if request.num_tokens and self.rng.random() < 0.4 else 0
        )
        load = LoadTruth(request, request.uid, (first, request.num_tokens), self.now + SETTINGS.announce_s)
        if not engine.is_alive or request.uid in engine.loads:
            return
        engine.loads[request.uid] = load
        # A router took the parameters of another request. Of a load without tokens a pull asks nobody.
        load.is_other = self.rng.random() < 0.15 and first < request.num_tokens
        self.num_loads += not load.is_other
        before = dict(params)
        digest = digest_of(f"not {request.uid}" if load.is_other else request.uid, request.num_tokens)
        tokens = m.TokenProof(request.num_tokens, digest)

        def start() -> None:
            load.deadline_s = self.now + SETTINGS.announce_s
            self.call(engine, lambda core: core.announce(request.uid, params, tokens, self.now))
            self.rule(params == before, "the client's params were changed")
            wait_s = self.rng.random() * self.rng.choice((0.01, 0.01, 1.0, 1.0 if self.is_calm else 9.0))
            self.at(wait_s, lambda: self.awake(engine, lambda: self.park(engine, load)))
            if self.rng.random() < self.faults.abort:
                abort = lambda: self.call(engine, lambda core: core.abort(request.uid, self.now))  # noqa: E731
                self.at(self.rng.random() * 3, lambda: self.awake(engine, abort))

        self.awake(engine, start)

    def park(self, engine: Engine, load: LoadTruth) -> None:
        num_blocks = -(-load.request.num_tokens // 4)
        if len(engine.free) < 2 * num_blocks:
            self.at(0.2, lambda: self.awake(engine, lambda: self.park(engine, load)))
            return
        if load.ended:
            return
        blocks = [self.take_blocks(engine, num_blocks) for _ in RULES]
        load.blocks, load.deadline_s = blocks, self.now + SETTINGS.load_s
        accepted = self.call(engine, lambda core: core.park(load.uid, blocks, load.token_range, self.now))
        self.rule(bool(accepted) or load.ended is not None, f"{load.uid}: park refused an open load")
        if not accepted and load.blocks is not None:
            self.give_back(engine, load)

    def load_ended(self, engine: Engine, ended: a.LoadEnded) -> None:
        load = engine.loads[ended.request_id]
        self.rule(load.ended is None, f"{load.uid} ended twice")
        load.ended = ended
        self.rule(load.is_excused or self.now <= load.deadline_s + SLACK_S, f"{load.uid} ended after its deadline")
        self.rule(not self.is_calm or ended.ok != load.is_other, f"{load.uid} ended in a calm world: {ended.reason}")
        if ended.ok:
            self.num_ok += 1
            self.rule(not load.is_other, f"WRONG BYTES accepted in {load.uid}: the KV of other tokens")
            self.check_bytes(engine, load)
            self.at(self.rng.random() * 4, lambda: self.awake(engine, lambda: self.decoded(engine, load)))
        elif ended.is_proved:
            self.check_bytes(engine, load)
            is_wrong = bool(self.broken)
            self.broken.clear()
            self.rule(is_wrong, f"{load.uid} failed for its bytes, which are right: {ended.reason}")
        if not ended.ok and not ended.blocks_quarantined:
            self.give_back(engine, load)

    def decoded(self, engine: Engine, load: LoadTruth) -> None:
        self.check_bytes(engine, load)
        self.give_back(engine, load)

    def check_bytes(self, engine: Engine, load: LoadTruth) -> None:
        """Every cell a decoder reads holds what the producer computed for this request."""
        first, end = load.token_range
        for group, rule in enumerate(RULES):
            reach = rule.window_tokens or end
            for token in range(max(first, load.request.num_tokens - reach), end):
                block = (load.blocks or [])[group][token // rule.block_tokens]
                for cell in range(NUM_RANKS):
                    expected = (load.uid, group, token // rule.block_tokens, cell)
                    found = engine.cells[block][cell]
                    self.rule(found == expected, f"WRONG BYTES accepted in {load.uid}: {found}, expected {expected}")
                    if self.broken:
                        return

    # What happens.

    def script(self) -> None:
        names = list(self.engines)
        for number in range(self.rng.randrange(2, 7)):
            source = self.rng.choice(names)
            others = [name for name in names if name != source]
            count = min(len(others), self.rng.choice((1, 1, 2)))
            mode = self.rng.choice(("pull", "push"))
            request = Request(
                f"r{number}", mode, source, self.rng.sample(others, count), self.rng.choice((0, 1, 7, 12, 21))
            )
            start_s = self.rng.random() * (2 if self.is_calm else 8)
            if self.is_calm and self.rng.random() < 0.4:
                start_s += 2 * SETTINGS.idle_s  # the others have forgotten us meanwhile
            self.at(
                start_s, lambda request=request: self.awake(self.engines[request.source], lambda: self.begin(request))
            )
            if mode == "push":
                host, port = source.split(":")
                params = {
                    "remote_host": host,
                    "remote_port": int(port),
                    "transfer_id": request.uid,
                    "transfer_mode": "push",
                }
                for name in request.destinations:
                    delay_s = start_s + self.rng.random() * 1.5 - (0.5 if start_s > 0.5 else 0.0)
                    self.at(
                        delay_s, lambda request=request, name=name, params=params: self.announce(request, name, params)
                    )
            if self.rng.random() < self.faults.abort:
                self.at(start_s + self.rng.random() * 3, lambda request=request: self.abort_source(request))
        for name in names:
            for fault, chance in ((self.crash, self.faults.crash), (self.freeze, self.faults.freeze)):
                if self.rng.random() < 2 * chance:
                    self.at(self.rng.random() * 10, lambda name=name, fault=fault: fault(name))
            for other in names:
                if self.rng.random() < self.faults.glitch:
                    self.at(self.rng.random() * 10, lambda name=name, other=other: self.lose(name, other))

    def abort_source(self, request: Request) -> None:
        engine = self.engines[request.source]

        def abort() -> None:
            if request.uid in engine.sources:
                request.is_source_aborted = True
                self.call(engine, lambda core: core.abort(request.uid, self.now))
                if request.finished_s is None and request.uid in engine.sources:
                    self.free_source(engine, request.uid)

        self.awake(engine, abort)

    def lose(self, name: str, other: str) -> None:
        engine = self.engines[name]
        engine.links.discard(other)
        self.awake(engine, lambda: self.call(engine, lambda core: core.peer_lost(other, "link lost", self.now)))

    def freeze(self, name: str) -> None:
        engine = self.engines[name]
        engine.frozen_until = max(engine.frozen_until, self.now + self.rng.random() * 6)
        for load in engine.loads.values():
            load.is_excused = True

    def crash(self, name: str) -> None:
        """Memory is gone; what was read already may still land at others; a new life starts at the same address."""
        dead = self.engines[name]
        if not dead.is_alive:
            return
        dead.is_alive = False
        for transfer in self.transfers:
            for piece in list(transfer.pending):
                if piece.destination[0] is dead or (
                    piece.source[0] is dead and not piece.is_read and self.rng.random() < 0.5
                ):
                    transfer.pending.discard(piece)
                    transfer.is_damaged = True
                elif piece.source[0] is dead and not piece.is_read:
                    block, cell = piece.source[1:]
                    piece.is_read, piece.value = True, dead.cells[block][cell]
                    self.at(self.rng.random() * 2, lambda transfer=transfer, piece=piece: self.land(transfer, piece))
            if transfer.owner is dead:
                transfer.is_reported = True
        if self.rng.random() < 0.7:
            for other in list(self.engines):
                self.at(self.small(), lambda other=other: self.lose(other, name))
        self.at(self.rng.random() * self.rng.choice((0.1, 3)), lambda: self.start(name))

    def check_end(self) -> None:
        """After everything: each load ended, each block is free, the books are empty."""
        for engine in self.engines.values():
            if not engine.is_alive:
                continue
            engine.core.check_integrity()
            for load in engine.loads.values():
                self.rule(load.ended is not None, f"{load.uid} never ended")
                self.rule(load.blocks is None, f"{load.uid}: blocks leaked at {engine.name}")
            self.rule(not engine.sources, f"{list(engine.sources)} never released at {engine.name}")
            self.rule(
                len(engine.free) == NUM_BLOCKS - 1, f"{engine.name}: {NUM_BLOCKS - 1 - len(engine.free)} blocks leaked"
            )
            books = engine.core.snapshot()
            self.rule(not books["producer"], f"{engine.name} keeps leases: {books['producer']}")
            self.rule(not books["consumer"], f"{engine.name} keeps loads: {books['consumer']}")
            self.rule(not books["num_open_calls"], f"{engine.name} repeats {books['num_open_calls']} requests for ever")
        if self.is_calm:
            self.rule(self.num_ok == self.num_loads, f"{self.num_ok} of {self.num_loads} loads in a calm world")
