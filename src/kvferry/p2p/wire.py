"""What a control message looks like on the wire, who may be talked to, and the keys for both.

    frame   b"KVF" | version (1 byte) | msgpack of one message, a tagged union of msgspec structs

One shared key, known to all engines and to the proxy, is stretched into keys for single purposes (HMAC-SHA256 of the
purpose). A client's request may name a peer only if its host is on the allow-list, or in a token that our proxy has
signed over host, port, transfer id and expiry.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from kvferry.errors import ConfigError, TransferError, TransferParamsError

M = TypeVar("M", bound=msgspec.Struct)

WIRE_VERSION = 1
MAX_MESSAGE_BYTES = 1 << 20
LOOPBACK = ("127.0.0.0/8", "::1/128", "localhost")
_MIN_KEY_BYTES = 16
_MAGIC = b"KVF"
_HOST = re.compile(r"(?!-)[A-Za-z0-9_.-]{1,253}")
_WHY_NO_TOKEN = ("carries no token of the proxy", "this engine has no key_file to check the proxy's token with")
_TOKEN = re.compile(r"v1\.([0-9]{1,12})\.([A-Za-z0-9_-]{43})")


class Codec(Generic[M]):
    """Messages of one tagged union, e.g. `Codec(Hello | Claim)`, to frames and back."""

    def __init__(self, message_type: Any, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(message_type)

    def encode(self, message: M) -> bytes:
        """The frame. TransferError when it is too large."""
        frame = _MAGIC + bytes((WIRE_VERSION,)) + self._encoder.encode(message)
        if len(frame) > self.max_bytes:
            raise TransferError(f"a {type(message).__name__} of {len(frame)} bytes is above {self.max_bytes}")
        return frame

    def decode(self, frame: bytes) -> M:
        """The message. TransferError says what is wrong with the frame; never another exception."""
        if len(frame) > self.max_bytes or frame[:3] != _MAGIC:
            raise TransferError(f"{len(frame)} bytes that are no control message")
        if frame[3:4] != bytes((WIRE_VERSION,)):
            raise TransferError(
                f"a control message of version {frame[3:4].hex()}, this engine speaks {WIRE_VERSION:02x}"
            )
        try:
            return self._decoder.decode(memoryview(frame)[4:])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise TransferError(f"{len(frame)} bytes that are no control message: {error}") from error


class Address(NamedTuple):
    """Where a control listener is reached."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """From host:port or [IPv6]:port. TransferError on anything else."""
        host, _, port = text.rpartition(":")
        bare = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
        if not (_HOST.fullmatch(host) or (bare != host and is_ip(bare))) or not port.isascii() or not port.isdecimal():
            raise TransferError(f"{text[:300]!r} is not host:port")
        if not 0 < int(port[:6]) < 1 << 16:
            raise TransferError(f"{text[:300]!r}: no such port")
        return cls(bare, int(port))


def is_ip(host: str) -> bool:
    """Whether this is a literal address."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=1024)
def parse_network(pattern: str, setting: str = "kv_connector_extra_config.allowed_peers") -> IPv4Network | IPv6Network:
    """A network as in 10.0.0.0/8; ConfigError otherwise, with the network that an address in it stands for."""
    try:
        return ip_network(pattern)
    except ValueError as error:
        hint = ""
        with suppress(ValueError):
            hint = f"; did you mean {str(ip_network(pattern, strict=False))!r}?"
        raise ConfigError(f"{setting}: {pattern!r} is no network: {error}{hint}") from error


def is_allowed(host: str, patterns: Sequence[str]) -> bool:
    """Whether a host is in one of the networks (10.0.0.0/8) or like one of the names (*.cluster.local).

    Names are not resolved, so a name is in no network. ConfigError on a malformed network.
    """
    for pattern in patterns:
        if "/" in pattern:
            network = parse_network(pattern)
            if is_ip(host) and ip_address(host) in network:
                return True
        elif fnmatchcase(host.lower(), pattern.lower()):
            return True
    return False


def derive_key(key: str, purpose: str) -> bytes:
    """32 bytes for one purpose. ConfigError when the shared key is too short to be one."""
    if len(key.encode()) < _MIN_KEY_BYTES:
        raise ConfigError(
            "the shared key (in the file that key_file of kv_connector_extra_config, or --shared-key-file of the proxy "
            f"names) has fewer than {_MIN_KEY_BYTES} bytes; make one with: openssl rand -hex 32"
        )
    return hmac.digest(key.encode(), f"kvferry p2p {purpose}".encode(), "sha256")


def sign_peer(key: str, address: Address, transfer_id: str, expires_s: int) -> str:
    """A token with which a request may name this peer, for one transfer, until `expires_s` (seconds since 1970)."""
    claim = msgspec.msgpack.encode((address.host, address.port, transfer_id, expires_s))
    signature = hmac.digest(derive_key(key, "peer token"), claim, "sha256")
    return f"v1.{expires_s}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def verify_peer(key: str, token: str, address: Address, transfer_id: str, now_s: float) -> None:
    """TransferParamsError unless `sign_peer` made the token for exactly this with our key, and it has not expired."""
    parts = _TOKEN.fullmatch(token)
    if parts is None:
        raise TransferParamsError("the peer token is malformed: pass peer_token on as `kvferry proxy` made it")
    expected = sign_peer(key, address, transfer_id, int(parts[1]))
    if not hmac.compare_digest(expected, token):
        raise TransferParamsError(
            f"the peer token was not signed with this engine's key for {address}, {transfer_id!r}: give "
            "`kvferry proxy --shared-key-file` the key that stands in this engine's key_file"
        )
    if now_s >= int(parts[1]):
        raise TransferParamsError(
            f"the peer token for {address} expired {now_s - int(parts[1]):.0f} s ago: it serves one request, and the "
            "clocks of proxy and engines must agree"
        )


def check_peer(
    address: Address,
    *,
    allowed: Sequence[str] = LOOPBACK,
    key: str | None = None,
    token: str | None = None,
    transfer_id: str | None = None,
    now_s: float,
) -> None:
    """May a request name this peer? TransferParamsError, with a remedy, unless allow-listed or in a valid token."""
    if is_allowed(address.host, allowed):
        return
    if token is None or transfer_id is None or key is None:
        raise TransferParamsError(
            f"the request names peer {address}, which is not in allowed_peers ({', '.join(allowed) or 'nobody'}), and "
            f"{_WHY_NO_TOKEN[key is None]}: add its host or network to allowed_peers of kv_connector_extra_config, or "
            "give one key to all engines (key_file) and to the proxy (--shared-key-file), and this host to the proxy's "
            "--allowed-peers unless its engine's URL has it"
        )
    verify_peer(key, token, address, transfer_id, now_s)
