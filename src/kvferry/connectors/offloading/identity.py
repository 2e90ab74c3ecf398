"""Which model and which layout stored KV belongs to."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from kvferry.connectors.offloading.config import ChunkGeometry
from kvferry.contract.host import HostInfo
from kvferry.errors import ConfigError
from kvferry.fingerprint import fingerprint_folder
from kvferry.types import Namespace

logger = logging.getLogger(__name__)

STORE_FORMAT_VERSION = 1


def model_identity(host: HostInfo, weights_version: str | None) -> str:
    """The model's part of every key: the user's `weights_version`, or a fingerprint of the files."""
    if weights_version is not None:
        return f"version:{weights_version}"
    where = "set weights_version in kv_connector_extra_config to a name that changes with the weights"
    if host.weights_are_random:
        raise ConfigError(f"the model's weights are random (load_format dummy), so KV has no lasting identity: {where}")
    if not Path(host.model).is_dir():
        raise ConfigError(f"model {host.model!r} is not a folder, so its weights cannot be fingerprinted: {where}")
    logger.info("taking the fingerprint of %s", host.model)
    return fingerprint_folder(Path(host.model))


def store_namespace(host: HostInfo, geometry: ChunkGeometry, payload: dict[str, Any]) -> Namespace:
    """Everything beside the key on which stored payloads must agree."""
    description = {
        "store_format": STORE_FORMAT_VERSION,
        "chunk_tokens": geometry.chunk_tokens,
        "tp_size": host.tp_size,
        "pp_size": host.pp_size,
        "numerics": dict(host.numerics),
        "kinds": [[group.kind.value, group.window_tokens, list(group.layer_names[:1])] for group in host.groups],
        **payload,
    }
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":")).encode()
    return Namespace(hashlib.sha256(canonical).hexdigest()[:32], description)
