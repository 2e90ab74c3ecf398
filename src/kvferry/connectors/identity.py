"""What makes equal tokens mean equal KV: the one maker of identities, for all built-in connectors.

`model_identity` names the model, `KeyMaker.chain` a request: model, cache salt, LoRA adapter, media and tokens.
"""

from __future__ import annotations

import logging
from pathlib import Path

from kvferry.contract.host import HostInfo
from kvferry.contract.views import RequestView
from kvferry.errors import ConfigError
from kvferry.fingerprint import fingerprint_folder
from kvferry.hashing import Identity, KeyChain, store_key
from kvferry.types import GroupInfo, StoreKey

logger = logging.getLogger(__name__)


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


class KeyMaker:
    """From requests to keys."""

    def __init__(self, model_fingerprint: str, groups: tuple[GroupInfo, ...], world_size: int) -> None:
        self._model = model_fingerprint
        self._groups = groups
        self._world_size = world_size
        self._unreadable_loras: set[str] = set()

    def chain(self, request: RequestView) -> KeyChain | None:
        """An empty chain with the request's identity, or None when it must not be cached."""
        if request.has_unhashable_input:
            return None
        lora = None
        if (path := request.lora_path) is not None:
            lora = self._lora_fingerprint(path)
            if lora is None:
                return None
        return KeyChain(Identity(self._model, request.cache_salt, lora), request.multimodal_items)

    def _lora_fingerprint(self, path: str) -> str | None:
        """Of the adapter's files as they are now (hosts reload adapters in place); None, logged once, if unreadable."""
        try:
            return fingerprint_folder(Path(path))
        except (ConfigError, OSError) as err:
            if path not in self._unreadable_loras:
                self._unreadable_loras.add(path)
                logger.warning("KV of LoRA adapter %s is not cached: %s", path, err)
            return None

    def shards(self, chain_value: bytes, group_id: int) -> list[StoreKey]:
        """The keys of one chunk of one group: one per worker, in rank order."""
        return [store_key(chain_value, group_id, rank) for rank in range(self._world_size)]
