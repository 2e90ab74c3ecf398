"""What two engines say to each other about a hand-over: typed, bounded, and safe to receive twice, late or never.

    D (consumer)                          P (producer)
    Hello            ───────────────►                      once per connection, both ways; asked again after a restart
                     ◄───────────────     Hello | HelloRefused
    Claim            ───────────────►                      pull: "I am going to read this lease, of these tokens"
                     ◄───────────────     Granted | Refused
    Renew            ───────────────►                      pull and push: "I still need it"
                     ◄───────────────     Renewed | Refused
    Confirm          ───────────────►                      pull, after the last byte: "was it valid all the time, and
                     ◄───────────────     Verdict          are these the bytes?"
    Register         ───────────────►                      push: "write the KV of this transfer id into these blocks"
                     ◄───────────────     Renewed, and later Pushed
    PushedSeen       ───────────────►
    Withdraw         ───────────────►                      "I gave up"
                     ◄───────────────     Withdrawn        from now on nothing of this claim is held, read or written

Every message carries the sender's generation (its start nonce), every exchange its claim id. A request is repeated
until it is answered; an answer may be repeated at any time. No message carries a moment in time, only time that is
left. Both sides prove which tokens' KV they mean: the consumer sends the digest of its own first n tokens, the producer
answers that of the first n it computed, and each goes on only when they are equal. Of the bytes, both make a digest of
each block (`kvferry.p2p.proof`) where both are set to; what of a hand-over they make of these goes with Confirm (pull),
where the producer compares, or Pushed, where the consumer does. `CODEC` refuses what breaks a bound, so a hostile peer
costs at most what the bounds below allow.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from kvferry.errors import TransferParamsError
from kvferry.kv.keys import DIGEST_BYTES
from kvferry.p2p.wire import Address, Codec

PROTOCOL = 3
MAX_GROUPS = 64
MAX_GROUP_BLOCKS = 1 << 16
MAX_TOKENS = 1 << 24
MAX_RANKS = 1024

Nonce = Annotated[str, Meta(pattern="^[0-9a-f]{32}$", max_length=32)]
"""128 random bits in hex: an engine's generation, a lease, a claim."""
Name = Annotated[str, Meta(min_length=1, max_length=512)]
Text = Annotated[str, Meta(max_length=2048)]
TokenCount = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
TokenIds = Annotated[tuple[Annotated[int, Meta(ge=0, lt=1 << 31)], ...], Meta(max_length=1024)]
Blocks = Annotated[tuple[Annotated[int, Meta(ge=0, lt=1 << 31)], ...], Meta(max_length=MAX_GROUP_BLOCKS)]
GroupBlocks = Annotated[tuple[Blocks, ...], Meta(max_length=MAX_GROUPS)]
"""Per group the block ids by position; id 0 at positions that are not handed over (outside a window)."""
RankBlobs = Annotated[tuple[Annotated[bytes, Meta(max_length=1 << 16)], ...], Meta(max_length=MAX_RANKS)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
"""Of a request's first tokens, their cache salt, adapter and media (`kvferry.kv.keys.TokenDigests`)."""
BytesDigest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Epoch = Annotated[int, Meta(ge=0, lt=1 << 62)]
Milliseconds = Annotated[int, Meta(ge=0, le=86_400_000)]


class Why(Enum):
    """Why a claim is refused."""

    UNKNOWN = "unknown"  # no such lease or claim, or of an earlier life of this engine
    EXPIRED = "expired"
    DONE = "done"
    ABORTED = "aborted"
    BUSY = "busy"  # too many claims
    TOKENS = "tokens"  # the lease is the KV of other tokens


OTHER_TOKENS = (
    "the prefill engine holds the KV of other tokens: the two engines' prompts, or their cache_salt, LoRA adapter or "
    "media, differ (chat templates that differ, or kv_transfer_params of another request)"
)

OTHER_BYTES = (
    "the bytes that arrived have another digest than those that were handed over: a bit flipped in the memory of one "
    "of the engines, or on the way"
)


class TokenProof(Struct, frozen=True):
    """The first `num_tokens` tokens of a consumer's request: it wants KV of no token behind them."""

    num_tokens: TokenCount
    digest: Digest


class BytesProof(Struct, frozen=True):
    """The bytes of a hand-over: per rank the digest of its blocks' digests, of all groups."""

    first_blocks: Annotated[tuple[Annotated[int, Meta(ge=0, le=MAX_GROUP_BLOCKS)], ...], Meta(max_length=MAX_GROUPS)]
    """By group: the position of the first block that counts; those before it lie outside of the range or a window."""
    end_token: TokenCount
    ranks: Annotated[tuple[BytesDigest, ...], Meta(max_length=MAX_RANKS)]


class Message(Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    """Base of all messages. `generation` is the sender's."""

    generation: Nonce


class ClaimMessage(Message, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    """Base of all messages about one claim. `to` is the life of the receiver that is meant."""

    claim_id: Nonce
    to: Nonce


class Hello(Message, frozen=True, tag="hello"):
    """Who I am and how my KV lies; `geometry` is opaque here, `transports` holds per name one blob per rank.

    `epoch` rises with every connection the sender destroyed: what belongs to a lower one is over. An answer repeats
    the `nonce` of the question; only answers are believed, since a question may come from a life that is over.
    """

    engine_id: Name
    protocol: Annotated[int, Meta(ge=0, lt=1 << 31)]
    geometry: Annotated[bytes, Meta(max_length=1 << 20)]
    transports: Annotated[dict[Name, RankBlobs], Meta(max_length=16)]
    epoch: Epoch
    nonce: Nonce
    is_answer: bool


class HelloRefused(Message, frozen=True, tag="hello_refused"):
    """KV cannot be moved between us; one line per field that differs."""

    differences: Annotated[tuple[Text, ...], Meta(max_length=256)]


class Claim(ClaimMessage, frozen=True, tag="claim"):
    """I am going to read this lease: keep it."""

    lease_id: Nonce
    lease_generation: Nonce
    tokens: TokenProof


class Granted(ClaimMessage, frozen=True, tag="granted"):
    """The lease is kept for you for `remaining_ms`, or longer if you renew."""

    blocks: GroupBlocks
    num_tokens: TokenCount
    remaining_ms: Milliseconds
    tokens_digest: Digest
    """Of as many of the lease's tokens as the claim named."""
    is_proved: bool = False
    """I have, or will have, digests of the lease's blocks."""


class Refused(ClaimMessage, frozen=True, tag="refused"):
    """This claim is not, or no longer, held; nothing of it will be written any more."""

    why: Why


class Renew(ClaimMessage, frozen=True, tag="renew"):
    """I still need it."""


class Renewed(ClaimMessage, frozen=True, tag="renewed"):
    """The claim is held for `remaining_ms` more."""

    remaining_ms: Milliseconds


class Confirm(ClaimMessage, frozen=True, tag="confirm"):
    """I have read everything: was the lease held all the time, and is this the digest of its bytes?"""

    proof: BytesProof | None = None


class Verdict(ClaimMessage, frozen=True, tag="verdict"):
    """Whether what was read under this claim is what was leased. Ends the claim.

    `is_proved`: the bytes were compared; when they are not the lease's, `is_valid` is false.
    """

    is_valid: bool
    is_proved: bool = False


class Register(ClaimMessage, frozen=True, tag="register"):
    """Write tokens [first_token, end_token) of this transfer into these blocks of mine."""

    transfer_id: Name
    blocks: GroupBlocks
    first_token: TokenCount
    end_token: TokenCount
    epoch: Epoch
    tokens: TokenProof
    lease_generation: Nonce | None = None
    """Your life that told of it; None: it may be a request that you have yet to hear of."""
    wants_proof: bool = False
    """Of the bytes."""

    def __post_init__(self) -> None:
        if self.end_token < self.first_token:
            raise ValueError(f"token range [{self.first_token}, {self.end_token}) ends before it begins")
        if self.end_token > self.tokens.num_tokens:
            raise ValueError(f"tokens up to {self.end_token} wanted, {self.tokens.num_tokens} proved")


class Pushed(ClaimMessage, frozen=True, tag="pushed"):
    """The write ended; nothing of it can land any more."""

    ok: bool
    reason: Text
    num_tokens: TokenCount
    tokens_digest: Annotated[bytes, Meta(max_length=32)]
    """Of as many of the lease's tokens as the registration named; empty where it holds fewer."""
    proof: BytesProof | None = None


class PushedSeen(ClaimMessage, frozen=True, tag="pushed_seen"):
    """Stop repeating `Pushed`."""


class Withdraw(ClaimMessage, frozen=True, tag="withdraw"):
    """I gave up: drop the claim, and say when nothing of it can land any more."""


class Withdrawn(ClaimMessage, frozen=True, tag="withdrawn"):
    """The claim is gone; nothing of it can land any more."""


AnyMessage = (
    Hello | HelloRefused | Claim | Granted | Refused | Renew | Renewed | Confirm | Verdict
    | Register | Pushed | PushedSeen | Withdraw | Withdrawn
)  # fmt: skip

CODEC: Codec[AnyMessage] = Codec(AnyMessage, max_bytes=2 << 20)


class Handover(Struct, frozen=True, kw_only=True):
    """The `kv_transfer_params` a consumer needs; names as in vLLM, fields of other routers are left alone."""

    remote_host: Name
    remote_port: Annotated[int, Meta(ge=1, lt=1 << 16)]
    transfer_mode: str = "pull"
    transfer_id: Name | None = None
    remote_request_id: Name | None = None
    remote_lease_id: Nonce | None = None
    remote_generation: Nonce | None = None
    remote_num_tokens: TokenCount | None = None
    remote_first_token_ids: TokenIds = ()

    def __post_init__(self) -> None:
        if self.transfer_mode not in ("pull", "push"):
            raise ValueError(f"transfer_mode {self.transfer_mode!r} is neither 'pull' nor 'push'")
        if self.transfer_mode == "push" and self.transfer_id is None:
            raise ValueError("transfer_mode 'push' needs a transfer_id, the same for both engines")
        if self.transfer_mode == "pull" and not (self.remote_lease_id and self.remote_generation):
            raise ValueError(
                "remote_lease_id and remote_generation are missing: the prefill engine must be kvferry too"
            )

    @property
    def peer(self) -> str:
        """The peer's name in this library: `host:port` or `[IPv6]:port` of its listener, in lower case."""
        return str(Address(self.remote_host.lower(), self.remote_port))

    @classmethod
    def parse(cls, params: object) -> Handover:
        """Read a client's dictionary, which is left as it is; TransferParamsError names the field that is wrong."""
        if not isinstance(params, dict):
            raise TransferParamsError(f"kv_transfer_params is a {type(params).__name__}, an object is needed")
        try:
            known = {name: params[name] for name in cls.__struct_fields__ if params.get(name) is not None}
            msgspec.msgpack.encode(known)  # UnicodeEncodeError for half a surrogate pair, which JSON can bring along
            return msgspec.convert(known, cls)
        except (TypeError, OverflowError, RecursionError, msgspec.ValidationError, ValueError) as error:
            raise TransferParamsError(f"kv_transfer_params cannot be used: {error}") from error
