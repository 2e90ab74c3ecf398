"""Which model and which layout stored KV belongs to."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from kvferry.contract.host import HostInfo
from kvferry.contract.identity import settings_identity
from kvferry.offloading.config import ChunkGeometry
from kvferry.types import Namespace

STORE_FORMAT_VERSION = 1
_READABLE = ("model_dtype", "cache_dtype", "quantization", "max_model_len")


def store_namespace(host: HostInfo, geometry: ChunkGeometry, payload: dict[str, Any]) -> Namespace:
    """Everything beside the key on which stored payloads must agree."""
    settings = settings_identity(host)
    description = {
        "store_format": STORE_FORMAT_VERSION,
        "chunk_tokens": geometry.chunk_tokens,
        "tp_size": host.tp_size,
        "pp_size": host.pp_size,
        # Each chunk's header has room for this description, and not for all the keys of a model's configuration.
        "numerics": {name: settings[name] for name in _READABLE if name in settings},
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "kinds": [[group.kind.value, group.window_tokens, list(group.layer_names[:1])] for group in host.groups],
        **payload,
    }
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":")).encode()
    return Namespace(hashlib.sha256(canonical).hexdigest()[:32], description)
