"""Which model and which layout stored KV belongs to."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from kvferry.connectors.identity import settings_identity
from kvferry.connectors.offloading.config import ChunkGeometry
from kvferry.contract.host import HostInfo
from kvferry.types import Namespace

STORE_FORMAT_VERSION = 1


def store_namespace(host: HostInfo, geometry: ChunkGeometry, payload: dict[str, Any]) -> Namespace:
    """Everything beside the key on which stored payloads must agree."""
    description = {
        "store_format": STORE_FORMAT_VERSION,
        "chunk_tokens": geometry.chunk_tokens,
        "tp_size": host.tp_size,
        "pp_size": host.pp_size,
        "numerics": settings_identity(host),
        "kinds": [[group.kind.value, group.window_tokens, list(group.layer_names[:1])] for group in host.groups],
        **payload,
    }
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":")).encode()
    return Namespace(hashlib.sha256(canonical).hexdigest()[:32], description)
