"""One connection of the control channel: a greeting from either side, then messages.

    greeting   b"kvferry control" | version (1 byte); behind it, from whoever dialled, its name (16 bytes)
    message    length (4 bytes, big-endian, 1 to the largest allowed) | content

With a shared key the connection is TLS 1.3 (RFC 8446), and either side proves that it has the key: an Ed25519 key pair
is derived from it, in all engines the same, and its certificate is the only one that either side trusts. Of a
connection without that proof nothing is read but the handshake. Without a key it is plain TCP.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Protocol

from kvferry.errors import ConfigError, install_hint
from kvferry.p2p.wire import derive_key

NAME_BYTES = 16
VERSION = 1
GREETING = b"kvferry control" + bytes((VERSION,))
_LENGTH_BYTES = 4
_AT_ONCE = 256  # messages of one connection before the others have their turn


@dataclass(frozen=True, slots=True)
class Lost:
    """A peer cannot be talked to now. One that was dialled may be `Connected` again later."""

    reason: str
    remedy: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason


_SAME_KEY = "kv_connector_extra_config.key_file must name the same key in all engines, or be set in none"
BROKE = Lost("the connection broke")
REFUSED = Lost("the peer closed the connection during the handshake, or has another key in its key_file", _SAME_KEY)
OTHER_KEY = Lost("the peer has another key in its key_file", _SAME_KEY)
NO_ENGINE = Lost(
    "one side has a key_file and the other has none, or the peer is no kvferry engine of this version",
    f"{_SAME_KEY}, and all engines must run the same version of kvferry",
)


class Owner(Protocol):
    """What a link calls, on the thread of its event loop."""

    def greeted(self, link: Link) -> None:
        """The other side has greeted; `link.name` is set where it dialled us."""

    def take(self, link: Link, content: bytes) -> bool:
        """A message. False: there is no room, and it is offered again after `link.resume`."""

    def grown(self, link: Link) -> None:
        """It holds bytes of an unfinished message."""


class Link(asyncio.Protocol):
    """Made for each connection, before its handshake; `greeting` is what we say first.

    Two futures tell how it goes: `is_greeted`, and `lost` (with the reason) once it has ended, for whatever cause.
    """

    def __init__(self, owner: Owner, over: socket.socket, max_bytes: int, greeting: bytes, *, peer: str = "") -> None:
        loop = asyncio.get_running_loop()
        self.peer = peer
        """What the owner calls the other side; empty where that dialled us and has not greeted yet."""
        self.name = b""
        """What the other side calls itself, where it dialled us."""
        self.is_greeted: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[Lost] = loop.create_future()
        self._owner = owner
        self._socket = over
        self._max_bytes = max_bytes
        self._greeting = greeting
        self._name_bytes = 0 if peer else NAME_BYTES
        self._transport: asyncio.Transport | None = None
        self._unread = bytearray()
        self._is_paused = False

    @property
    def unread_bytes(self) -> int:
        """Received, and not yet taken: part of a message, or what there was no room for."""
        return len(self._unread)

    @property
    def unsent_bytes(self) -> int:
        """Given to `send`, and not yet to the kernel."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def send(self, content: bytes) -> None:
        """One message. Never waits: the caller bounds `unsent_bytes`."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(len(content).to_bytes(_LENGTH_BYTES, "big") + content)

    def cut(self, reason: Lost = BROKE) -> None:
        """End it now; what is unsent is dropped. Idempotent."""
        self._end(reason)
        with suppress(OSError):  # ended already
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._transport is not None:
            self._transport.abort()

    def resume(self) -> None:
        """There may be room again."""
        if self._is_paused and not self.lost.done():
            assert self._transport is not None
            self._is_paused = False
            self._transport.resume_reading()
            self._take_in()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake is done; nothing of our own was read before."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self.lost.done():
            transport.abort()
            return
        transport.write(self._greeting)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended, by whichever side."""
        self._end(BROKE if self.is_greeted.done() else REFUSED)

    def data_received(self, data: bytes) -> None:
        """At most 256 KiB at once."""
        self._unread += data
        if not self._is_paused:
            self._take_in()
        if self._unread and not self.lost.done():
            self._owner.grown(self)

    def _end(self, reason: Lost) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
        self._unread.clear()

    def _take_in(self) -> None:
        if self.lost.done() or not (self.is_greeted.done() or self._take_greeting()):
            return
        for _ in range(_AT_ONCE):
            if len(self._unread) < _LENGTH_BYTES:
                return
            end = _LENGTH_BYTES + int.from_bytes(self._unread[:_LENGTH_BYTES], "big")
            if not _LENGTH_BYTES < end <= _LENGTH_BYTES + self._max_bytes:
                self.cut(
                    Lost(f"the peer announced {end - _LENGTH_BYTES} bytes in a message, {self._max_bytes} are allowed")
                )
                return
            if len(self._unread) < end:
                return
            if not self._owner.take(self, bytes(memoryview(self._unread)[_LENGTH_BYTES:end])):
                self._pause()
                return
            del self._unread[:end]
        self._pause()
        asyncio.get_running_loop().call_soon(self.resume)

    def _take_greeting(self) -> bool:
        said = bytes(self._unread[: len(GREETING)])
        if said != GREETING[: len(said)]:
            self.cut(NO_ENGINE)
        if len(self._unread) < len(GREETING) + self._name_bytes:
            return False
        self.name = bytes(self._unread[len(GREETING) : len(GREETING) + self._name_bytes])
        del self._unread[: len(GREETING) + self._name_bytes]
        self.is_greeted.set_result(None)
        self._owner.greeted(self)
        return True

    def _pause(self) -> None:
        if not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()


def lost_by(error: BaseException) -> Lost:
    """What a handshake says that failed with this."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return OTHER_KEY
    if isinstance(error, ssl.SSLError):
        return NO_ENGINE
    return REFUSED


def tls_contexts(key: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """For those that dial us, and for whom we dial. ConfigError: the key is too short, or `cryptography` is missing."""
    certificate, secret = _certificate(derive_key(key, "control tls"))
    made = []
    for side in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=certificate.decode())
        _with_file(secret + certificate, context.load_cert_chain)
        made.append(context)
    made[0].num_tickets = 0
    return made[0], made[1]


def _with_file(content: bytes, use: Callable[[str], None]) -> None:
    """`ssl` takes a private key from files only: on Linux this one is in memory; it is gone after the call."""
    with tempfile.TemporaryDirectory() if not hasattr(os, "memfd_create") else nullcontext() as folder:
        path = None if folder is None else os.path.join(folder, "key.pem")
        descriptor = (
            os.memfd_create("kvferry") if path is None else os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        )
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            use(path or f"/proc/self/fd/{descriptor}")


def _certificate(seed: bytes) -> tuple[bytes, bytes]:
    """Certificate and private key of the key pair that a 32-byte seed stands for, as PEM."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ModuleNotFoundError as error:
        raise ConfigError(f"cryptography is not installed, which key_file needs: {install_hint('p2p')}") from error
    from datetime import datetime

    secret = Ed25519PrivateKey.from_private_bytes(seed)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kvferry")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(secret.public_key())
        .serial_number(1)
        .not_valid_before(datetime(1970, 1, 1))
        .not_valid_after(datetime(9999, 12, 31))
        .sign(secret, None)
    )
    return certificate.public_bytes(serialization.Encoding.PEM), secret.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
