"""What a chunk file is: a header of 4096 bytes, then the payload.

    magic "KVFCHUNK" | version u32 | 0 u32 | payload bytes u64 | xxh3-128 of the payload | lengths of key, namespace
    digest (u16) and description (u32) | key | namespace digest | description (msgpack) | zeros | CRC-32 of all before

All numbers little-endian. Every version keeps magic, version and the CRC in the last four bytes of the first 4096:
so a file of another version can be told from a damaged one.
"""

from __future__ import annotations

import struct
import zlib

import msgpack

from kvferry.errors import ConfigError, TierCorrupt, TierError, TierUnavailable
from kvferry.types import Namespace, StoreKey

HEADER_BYTES = 4096
FORMAT_VERSION = 1
_MAGIC = b"KVFCHUNK"
_FIXED = struct.Struct("<8sIIQ16sHHI")
_CRC = struct.Struct("<I")
_BODY_BYTES = HEADER_BYTES - _CRC.size


class UnknownFormat(TierError):
    """A whole file of a format version this program does not know."""


class ChunkFormat:
    """Headers of one namespace."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace.digest.encode()
        self._description: bytes = msgpack.packb(namespace.description)
        if _FIXED.size + len(self._namespace) + len(self._description) + 512 > _BODY_BYTES:
            raise ConfigError(f"the description of namespace {namespace.digest} is too long for a chunk's header")

    def header(self, key: StoreKey, payload_bytes: int, digest: bytes) -> bytes:
        """The header of a chunk, 4096 bytes."""
        fixed = _FIXED.pack(
            _MAGIC, FORMAT_VERSION, 0, payload_bytes, digest, len(key), len(self._namespace), len(self._description)
        )
        body = b"".join((fixed, key, self._namespace, self._description)).ljust(_BODY_BYTES, b"\0")
        return body + _CRC.pack(zlib.crc32(body))

    def check(self, header: bytes | bytearray, key: StoreKey, payload_bytes: int) -> bytes:
        """The payload's digest, when this is the header of that chunk.

        TierCorrupt: damaged, or another chunk's. UnknownFormat: whole, of another version. TierUnavailable: the chunk
        is not of `payload_bytes`.
        """
        (crc,) = _CRC.unpack_from(header, _BODY_BYTES)
        magic, version, _, stored_bytes, digest, *lengths = _FIXED.unpack_from(header)
        if magic != _MAGIC or zlib.crc32(memoryview(header)[:_BODY_BYTES]) != crc:
            raise TierCorrupt(f"chunk {key.hex()}: the header is damaged")
        if version != FORMAT_VERSION:
            raise UnknownFormat(f"chunk {key.hex()}: format version {version} is unknown (this is {FORMAT_VERSION})")
        end = _FIXED.size + lengths[0] + lengths[1]
        if header[_FIXED.size : end] != key + self._namespace:
            raise TierCorrupt(f"chunk {key.hex()}: the file holds another chunk or namespace")
        if stored_bytes != payload_bytes:
            raise TierUnavailable(f"chunk {key.hex()} has {stored_bytes} bytes, {payload_bytes} were asked for")
        assert isinstance(digest, bytes)
        return digest
