"""NIXL (UCX): between hosts, and where KV lies in GPU memory. Needs the packages of the extra "nixl".

    target      an agent that peers reach: its metadata is our blob; it never starts anything
    initiator   an agent that starts our transfers; thrown away and made anew when a hung peer is closed

What shapes this file (measured with nixl 1.5.1 on UCX tcp and cma, see docs of the seam for the words):

- On one host the copy runs inside the post call, with the GIL free: hence the own thread, and posts of bounded size.
- Making descriptors for each transfer takes under 1 % of its time, even for 16 KiB pieces, so none are prepared.
- Failures arrive as exceptions, wrong descriptors as None.
- Neither releasing a request nor removing the peer stops it: all of a read was seen landing after both, and a write to
  a peer that hung went on taking its bytes from our memory (59 of 67 MB) once that woke up. Destroying the agent stops
  both: nothing of a read landed, nothing more was taken for a write. What the network held of that (2 MB) landed in the
  peer still: no fence for its memory, until its process has ended.
- Its progress thread spins: an idle agent takes a whole core. So there is none; the own thread makes progress.
- A peer that is stopped leaves requests in progress for ever.
- No call tells whether a peer that wrote to us is dead. On one machine the lock on its life sign (a page in /dev/shm)
  does; what it had put into sockets is then taken in by our own progress within `_DRAIN_S`, if that had
  `_DRAIN_TURNS`. Of a writer on another machine that vanished nothing is known: blocks it may write to stay out of use.

Metadata of peers is native code's input: it is used only when the envelope around it is ours, and blobs come through
the control channel, which is authenticated when a key is set.
"""

from __future__ import annotations

import importlib
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from kvferry.errors import ConfigError, HostError, TransferError, install_hint
from kvferry.kv.segment import PAGE_BYTES, SHM_DIRECTORY, Segment, is_segment_path
from kvferry.p2p.transports.threaded import Step, ThreadedTransport, Transfer, decode_blob
from kvferry.p2p.transports.transport import Ints, PeerHandle, TransferOp, TransportCapabilities, TransportSetup

_POST_BYTES = 64 << 20
_DRAIN_S = 1.0
_DRAIN_TURNS = 200
_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class _Region(msgspec.Struct, frozen=True):
    address: _Number
    num_bytes: _Number
    device_id: _Number


class _NixlBlob(msgspec.Struct, frozen=True, tag_field="transport", tag="nixl 1"):
    memory: Literal["DRAM", "VRAM"]
    regions: tuple[_Region, ...]
    metadata: bytes
    life: str = ""
    """Path of the life sign; empty: there is none."""
    nonce: bytes = b""


class _NixlPeer(PeerHandle):
    def __init__(self, blob: _NixlBlob) -> None:
        super().__init__("nixl", [region.num_bytes for region in blob.regions])
        self.blob = blob
        self.agent_name: str | None = None  # as known to the initiator; None: not connected to it
        self.life: Segment | None = None
        self.ended: tuple[float, int] | None = None  # when it was first seen dead: time, turn of `_serve`
        self.is_left = False  # closed, and something may still land there: the owner's thread looks at its life alone
        self.is_over = False  # it was, and has ended
        self.addresses = np.array([region.address for region in blob.regions], dtype=np.int64)
        self.device_ids = np.array([region.device_id for region in blob.regions], dtype=np.int64)

    def is_dead(self) -> bool:
        """For certain; nobody waits on its memory, nothing lands in it."""
        return self.life is not None and not self.life.is_owner_alive()


class _Posts:
    """A transfer's requests: those under way, and how far it has been posted."""

    def __init__(self, pieces_per_post: list[tuple[int, int]]) -> None:
        self.next = pieces_per_post
        self.open: list[tuple[Any, tuple[int, int]]] = []


def load_nixl() -> Any:
    """NIXL's Python API. ConfigError, with the remedy, when it cannot be imported."""
    try:
        return importlib.import_module("nixl._api")
    except ImportError as error:  # also its own, when it does not fit the CUDA found
        raise ConfigError(f"the NIXL transport cannot be used ({error}): {install_hint('nixl')}") from error


class NixlTransport(ThreadedTransport):
    """Memory of one kind (all CPU, or all CUDA). `ucx_params` go to the UCX backend as they are."""

    capabilities = TransportCapabilities("nixl", devices=("cpu", "cuda"))
    serve_interval_s = 0.001
    drain_s = 10.0

    @classmethod
    def from_config(cls, setup: TransportSetup) -> NixlTransport:
        """Its settings (the user's `ucx`) go to the UCX backend as texts."""
        return cls(setup.engine_id, {key: str(value) for key, value in setup.config.items()})

    @classmethod
    def check(cls, config: Mapping[str, Any], where: str) -> None:
        """ConfigError when NIXL is not installed."""
        load_nixl()

    def __init__(self, engine_id: str, ucx_params: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._api = load_nixl()
        bindings = self._api.nixlBind
        names = [name for name in dir(bindings) if name.startswith("nixl") and name.endswith("Error")]
        self._errors = tuple(getattr(bindings, name) for name in names)
        self._disconnected = bindings.nixlRemoteDisconnectError
        self._engine_id = engine_id
        self._life: Segment | None = None
        self._num_turns = 0
        self._ucx_params = dict(ucx_params or {})

    def peer_has_ended(self, peer: PeerHandle) -> bool:
        """The lock on its life sign is free, and has been long enough for what it sent to have landed."""
        assert isinstance(peer, _NixlPeer)
        if peer.is_over:
            return True
        if (peer.is_closing and peer.unknown_ops != {TransferOp.WRITE}) or not peer.is_dead():
            return False
        if peer.ended is None:
            peer.ended = time.monotonic(), self._num_turns
        seen_s, seen_turn = peer.ended
        has_ended = time.monotonic() - seen_s >= _DRAIN_S and self._num_turns - seen_turn >= _DRAIN_TURNS
        if has_ended and peer.is_left and peer.life is not None:
            peer.is_over = True
            peer.life.close()
        return has_ended

    # ---- agents -----------------------------------------------------------------------------------------------

    def _register(self) -> bytes:
        kinds = {region.device.partition(":")[0] for region in self.regions}
        if len(kinds) != 1:
            raise ConfigError(f"NIXL moves memory of one kind, the KV pool has {', '.join(sorted(kinds))}")
        self._memory: Literal["DRAM", "VRAM"] = "DRAM" if kinds == {"cpu"} else "VRAM"
        places = tuple(
            _Region(region.address, region.num_bytes, int(region.device.partition(":")[2] or 0))
            for region in self.regions
        )
        self._addresses = np.array([place.address for place in places], dtype=np.int64)
        self._device_ids = np.array([place.device_id for place in places], dtype=np.int64)
        self._rows = [(place.address, place.num_bytes, place.device_id, "") for place in places]
        try:
            self._target = self._make_agent()
            self._initiator = self._make_agent()
            metadata = self._target.get_agent_metadata()
        except ConfigError:
            raise
        except Exception as error:  # plugins are loaded here: what they raise is not known
            raise ConfigError(f"NIXL cannot register the KV pool: {type(error).__name__}: {error}") from error
        nonce, path = secrets.token_bytes(16), ""
        with suppress(OSError):  # no room: then nobody can tell whether we live
            self._life = Segment.create(
                engine_id=self._engine_id, num_bytes=PAGE_BYTES, header=nonce, folder=SHM_DIRECTORY
            )
            path = self._life.path
        return msgspec.msgpack.encode(_NixlBlob(self._memory, places, metadata, path, nonce))

    def _make_agent(self) -> Any:
        name = f"{self._engine_id}-{secrets.token_hex(8)}"
        agent = self._api.nixl_agent(name, self._api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        agent.create_backend("UCX", self._ucx_params)
        if agent.register_memory(self._rows, self._memory) is None:
            raise ConfigError(f"NIXL does not accept the KV pool's memory: {self._rows}")
        return agent

    def _parse(self, blob: bytes) -> PeerHandle:
        return _NixlPeer(decode_blob(blob, _NixlBlob))

    def _open_peer(self, peer: PeerHandle) -> None:
        assert isinstance(peer, _NixlPeer)
        if peer.life is None and is_segment_path(peer.blob.life):
            with suppress(HostError):  # on another machine, or in a container of its own
                peer.life = Segment.attach(
                    peer.blob.life, PAGE_BYTES, peer.blob.nonce, what="life sign", populate=False
                )
        try:
            if self._initiator is None:
                self._initiator = self._make_agent()
            name = self._initiator.add_remote_agent(peer.blob.metadata)
        except self._errors as error:
            raise TransferError(f"NIXL cannot connect: {type(error).__name__}: {error}") from error
        peer.agent_name = peer.name = name if isinstance(name, str) else name.decode()

    def _close_peer(self, peer: PeerHandle, open_ops: set[TransferOp]) -> set[TransferOp]:
        assert isinstance(peer, _NixlPeer)
        is_hung = bool(peer.unknown_ops) or any(t.peer is peer and t.state and t.state.open for t in self._active)
        if peer.agent_name is not None:  # else an earlier replacement was its fence too
            if is_hung:
                self._replace_initiator()
            elif not any(each is not peer and _agent_of(each) == peer.agent_name for each in self._peers):
                self._initiator.remove_remote_agent(peer.agent_name)  # else it is connected twice, and once from now on
        landing = open_ops & {TransferOp.WRITE} if is_hung and not peer.is_dead() else set()
        peer.is_left = bool(landing)
        if peer.life is not None and not landing:
            peer.life.close()
        return landing

    def _replace_initiator(self) -> None:
        """Destroy it, the only fence there is. Other peers' transfers go on with the new one, from their last post.

        Of peers that are closing too, or cannot be opened again, what was posted is as unknown as the hung peer's.
        """
        posted = [transfer for transfer in self._active if transfer.state is not None and transfer.state.open]
        for transfer in posted:
            if not transfer.is_halted:
                transfer.state.next[:0] = [span for _, span in transfer.state.open]
            for handle, _ in transfer.state.open:
                self._release(handle)
            transfer.state.open = []
        self._initiator.agent = None
        self._initiator = None
        for peer in self._peers:
            assert isinstance(peer, _NixlPeer)
            was_open, peer.agent_name = peer.agent_name is not None, None
            if was_open and not peer.is_closing:
                self._try_open(peer)
        for transfer in posted:
            assert isinstance(transfer.peer, _NixlPeer)
            if transfer.peer.agent_name is None:
                transfer.peer.unknown_ops.add(transfer.op)

    def _serve(self) -> None:
        """Answer peers: connections, and over TCP also their reads and writes."""
        self._target.get_new_notifs()
        self._num_turns += 1

    def _shut_down(self) -> None:
        self._initiator = self._target = None
        if self._life is not None:
            self._life.close()

    def _release(self, handle: Any) -> None:
        with suppress(*self._errors):  # still running: it ends with the agent
            self._initiator.release_xfer_handle(handle)

    def _is_dead(self, peer: PeerHandle) -> bool:
        assert isinstance(peer, _NixlPeer)
        return peer.is_dead()

    # ---- transfers --------------------------------------------------------------------------------------------

    def _halt(self, transfer: Transfer) -> None:
        transfer.state = transfer.state or _Posts([])
        transfer.state.next = []

    def _advance(self, transfer: Transfer) -> Step:
        if transfer.state is None:
            transfer.state = _Posts(_spans(transfer.pieces.length))
        posts: _Posts = transfer.state
        try:
            if posts.next:
                self._post(transfer, posts.next.pop(0))
                return Step.MOVED
            before = len(posts.open)
            posts.open = [(handle, span) for handle, span in posts.open if not self._is_done(transfer, handle, span)]
        except self._disconnected as error:
            for handle, _ in posts.open:
                self._release(handle)
            posts.open = []
            raise TransferError(f"NIXL lost the peer: {error}") from error
        if not posts.open:
            return Step.DONE
        return Step.WAITING if len(posts.open) == before else Step.MOVED

    def _post(self, transfer: Transfer, span: tuple[int, int]) -> None:
        peer, pieces, cut = transfer.peer, transfer.pieces, slice(*span)
        assert isinstance(peer, _NixlPeer)
        source = pieces.source_region[cut], pieces.source_offset[cut]
        destination = pieces.destination_region[cut], pieces.destination_offset[cut]
        local, remote = (destination, source) if transfer.op is TransferOp.READ else (source, destination)
        lengths = pieces.length[cut]
        handle = self._initiator.initialize_xfer(
            transfer.op.name,
            self._descriptors(_rows(*local, self._addresses, self._device_ids, lengths), self._memory),
            self._descriptors(_rows(*remote, peer.addresses, peer.device_ids, lengths), peer.blob.memory),
            peer.agent_name,
        )
        transfer.state.open.append((handle, span))
        if self._ended(self._initiator.transfer(handle)):
            transfer.state.open.pop()
            self._count(transfer, handle, span)

    def _is_done(self, transfer: Transfer, handle: Any, span: tuple[int, int]) -> bool:
        is_done = self._ended(self._initiator.check_xfer_state(handle))
        if is_done:
            self._count(transfer, handle, span)
        return is_done

    def _count(self, transfer: Transfer, handle: Any, span: tuple[int, int]) -> None:
        self._release(handle)
        self._landed(transfer, int(transfer.pieces.length[slice(*span)].sum()))

    def _ended(self, state: str) -> bool:
        if state not in ("DONE", "PROC"):
            raise RuntimeError(f"NIXL answers {state!r}")
        return state == "DONE"

    def _descriptors(self, rows: Ints, memory: str) -> Any:
        descriptors = self._initiator.get_xfer_descs(rows.astype(np.uint64), memory)
        if descriptors is None:
            # Not TransferError, which would say that nothing lands: earlier posts of this transfer may be under way.
            raise RuntimeError(f"NIXL does not accept {len(rows)} descriptors of {memory} memory")
        return descriptors


def _agent_of(peer: PeerHandle) -> str | None:
    assert isinstance(peer, _NixlPeer)
    return peer.agent_name


def _rows(region: Ints, offset: Ints, addresses: Ints, device_ids: Ints, length: Ints) -> Ints:
    return np.stack([addresses[region] + offset, length, device_ids[region]], axis=1)


def _spans(lengths: Ints) -> list[tuple[int, int]]:
    """Runs of pieces [start, stop) of about _POST_BYTES each; a larger piece is a run of its own."""
    posts = np.cumsum(lengths) // _POST_BYTES
    cuts = [*np.flatnonzero(np.diff(posts, prepend=-1)).tolist(), len(lengths)]
    return list(pairwise(cuts))
