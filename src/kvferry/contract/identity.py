"""What makes equal tokens mean equal KV: the one maker of identities, for all built-in connectors.

`model_identity` names the weights, `settings_identity` the host's settings, `peer_facts` both for a peer, and
`KeyMaker.chain` a request: model, cache salt, LoRA adapter, media and tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path

from kvferry.contract.host import HostInfo
from kvferry.contract.views import RequestView
from kvferry.errors import ConfigError
from kvferry.kv.fingerprint import (
    fingerprint_files,
    fingerprint_folder,
    newest_change_s,
    stamp_files,
    stamp_folder,
    stamp_way,
)
from kvferry.kv.keys import Identity, KeyChain, store_key
from kvferry.types import GroupInfo, StoreKey

logger = logging.getLogger(__name__)

_REMEDY = "set weights_version in kv_connector_extra_config to a name that changes with the weights"
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf")
_MEANINGS = (".json", ".py")
_MAX_FACTS = 1000
CONFIG_MAKER = "hf_config.made_by"
"""The fact that says which code resolved the model's configuration."""
_NAMED_FILES = ("*.bin", "*.pt", "*.py")
NUMBERED_MEDIA = (
    "with mm_processor_cache_gb 0 and without prefix caching vLLM numbers media and does not hash them: set "
    "--mm-processor-cache-gb above 0, or --enable-prefix-caching"
)
YOUNG_PROCESSOR = (
    "the model's folder, a file in it, or a folder or link on its path changed after the start of the process that "
    "reads the media processor, so nobody knows which content that process read: start the engine from a new process"
)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def model_identity(host: HostInfo, weights_version: str | None) -> str:
    """The model's part of every key: the user's `weights_version`, or a fingerprint of the files."""
    if weights_version is not None:
        return f"version:{weights_version}"
    check_identity(host, weights_version)
    logger.info("taking the fingerprint of %s", host.model)
    folder = Path(host.model)
    fingerprint = fingerprint_folder(folder)
    is_loaded = host.weights_stamp is None or stamp_folder(folder) == host.weights_stamp
    if not is_loaded or _is_younger(folder, host):
        raise _changed(folder, f", or {_REMEDY}")
    return fingerprint


def _is_younger(folder: Path, host: HostInfo) -> bool:
    """True when a folder of weights is seen to be younger than what the host loaded from there."""
    return host.loaded_after_s is not None and newest_change_s(folder, is_strict=False) > host.loaded_after_s


def _changed(folder: Path, or_else: str = "") -> ConfigError:
    return ConfigError(
        f"files of the model in {str(folder)!r}, the folder itself, or a folder or link on its path changed while this "
        f"engine loaded them, so what it loaded is uncertain: start it again when they are complete{or_else}"
    )


def check_identity(host: HostInfo, weights_version: str | None) -> None:
    """ConfigError when the weights have no name and cannot be given one. Reads none of them."""
    if weights_version is not None:
        return
    if host.weights_are_random:
        raise ConfigError(
            f"the model's weights are random (load_format dummy), so KV has no lasting identity: {_REMEDY}"
        )
    if host.foreign_load_format is not None:
        raise ConfigError(
            f"with load_format {host.foreign_load_format} the files of the model's folder do not say what is loaded, "
            f"so weights cannot be fingerprinted: {_REMEDY}"
        )
    if host.is_converted_at_start:
        return  # the folder, with its fingerprint, is there when an engine has started
    if not Path(host.model).is_dir():
        raise ConfigError(f"model {host.model!r} is not a folder, so its weights cannot be fingerprinted: {_REMEDY}")
    if any(file.suffix in _OTHER_WEIGHTS for file in Path(host.model).iterdir()):
        stamp_folder(Path(host.model))  # refuses weights in other formats alone


def settings_identity(host: HostInfo) -> dict[str, str]:
    """Everything beside the weights that the numbers in the KV cache depend on.

    That is settings, the media processor, the draft model, and which hidden states are paged in the cache.
    """
    out = dict(host.numerics)
    if host.hidden_state_group is not None:
        out["hidden_state_layers"] = json.dumps(host.hidden_state_layers)
    folder = Path(host.model)
    processor = [folder / name for name in _PROCESSOR_FILES]
    if folder.is_dir():  # elsewhere there is no telling
        out["media_processor"] = _contents(processor, host) or "none"
    out["named_files"] = _named_files(host)
    if host.draft_model == host.model:
        out["draft_model"] = "the model"
    elif host.draft_model is not None:
        out["draft_model"] = _draft(Path(host.draft_model), host)
    return out


def _draft(draft: Path, host: HostInfo) -> str:
    """What the draft model's files hold; a name on a hub stands for itself."""
    if any(draft.glob("*.safetensors")):
        if _is_younger(draft, host):
            raise _changed(draft)
        return fingerprint_folder(draft)
    files = sorted(draft.iterdir()) if draft.is_dir() else [draft]
    return _contents([file for file in files if file.suffix in (*_OTHER_WEIGHTS, *_MEANINGS)], host) or str(draft)


def _contents(files: list[Path], host: HostInfo) -> str | None:
    """Of those that there are. ConfigError when one may not be what the host has read."""
    for file in files:
        if file.is_file() and host.loaded_after_s is not None and file.stat().st_ctime > host.loaded_after_s:
            raise _changed(file.parent)
    return fingerprint_files(files)


def _named_files(host: HostInfo) -> str:
    """What stands where settings point to: weights, code, descriptions of quantisation, scales."""
    found = []
    for path in map(Path, host.named_paths):
        if path.is_file():
            found.append(_contents([path], host))
        elif any(path.glob("*.safetensors")) and not path.samefile(host.model):
            if _is_younger(path, host):
                raise _changed(path)
            found.append(fingerprint_folder(path))
        elif path.is_dir() and not path.samefile(host.model):
            found.append(_contents(sorted(file for end in _NAMED_FILES for file in path.glob(end)), host))
    found = [each for each in found if each is not None]
    return json.dumps(found) if found else "none"


def peer_facts(host: HostInfo, weights_version: str | None) -> tuple[tuple[str, str], ...]:
    """(name, value) of what two engines must agree on before either takes KV of the other.

    How a name counts that only one side has, `kvferry.p2p.geometry` says. Where the weights cannot be told, they are
    not compared.
    """
    facts = settings_identity(host)
    if len(facts) > _MAX_FACTS:  # more than a peer reads: of the least telling, the end of the alphabet, only a digest
        rest = [(name, facts.pop(name)) for name in sorted(facts)[_MAX_FACTS:]]
        facts["further settings"] = hashlib.sha256(json.dumps(rest).encode()).hexdigest()
    if host.config_maker:
        facts[CONFIG_MAKER] = host.config_maker
    if weights_version is not None or host.has_named_weights:
        facts["weights"] = model_identity(host, weights_version)
    elif host.hub_commit is not None and not host.weights_are_random and host.foreign_load_format is None:
        facts["weights"] = f"{host.model} at commit {host.hub_commit}"
    else:
        if not Path(host.model).exists() and not host.weights_are_random:
            facts["model"] = host.model  # a hub's or an object store's: of two finetunings all else may be equal
        logger.warning("P2P: %s does not identify the loaded weights, so peers cannot compare the weights", host.model)
    return tuple(sorted(facts.items()))


class _Adapters:
    """What adapters' files hold, as far as it is certain that the host has loaded just that.

    Hosts load an adapter at some time after the engine's start, again when it was evicted, and say nothing of it. So
    what its files hold is known while neither they have changed since the engine's start nor anything on the path by
    which they are found, or never again.
    """

    def __init__(self, settings: str, started_s: float) -> None:
        self._settings = settings
        self._started_s = started_s
        self._start_folder = _working_folder()
        self._known: dict[str, tuple[object, str]] = {}
        self._refused: dict[str, str] = {}
        self._path_of: dict[int, str] = {}

    def fingerprint(self, path: str, number: int | None = None) -> str | None:
        """Of an adapter's files; None when they do not say what was loaded, which `why_not` explains.

        `number`: under which the host looks for it among those that it has loaded, whatever the path.
        """
        if number is not None and (other := self._path_of.setdefault(number, path)) != path:
            for each in (other, path):
                self._refuse(
                    each, f"lora_int_id {number} stands for {other} and for {path}: hosts load only one of them"
                )
        if path not in self._known and path not in self._refused:
            self._look_at(path)
        return self._known[path][1] if self.is_certain(path) else None

    def is_certain(self, path: str) -> bool:
        """False from the first change of its files, its folder or its path on."""
        known = self._known.get(path)
        if known is None or path in self._refused:
            return False
        try:
            is_same = self._stamp(path) == known[0]
        except (ConfigError, OSError):
            is_same = False
        if not is_same:
            self._refuse(path, "its files, its folder or its path have changed since the engine began to use them")
        return is_same

    def why_not(self, path: str) -> str:
        """Why requests of this adapter are not cached."""
        return self._refused.get(path, "it is not known")

    def _look_at(self, path: str) -> None:
        folder = Path(path)
        try:
            stamp = self._stamp(path)
            is_moved = not folder.is_absolute() and _working_folder() != self._start_folder
            if is_moved or newest_change_s(folder, is_strict=True) > self._started_s:
                self._refuse(
                    path,
                    "its files, its folder, or a folder or link on its path changed after the engine's start, so what "
                    "the engine loaded of them is uncertain",
                )
                return
            fingerprint = fingerprint_folder(folder)
        except (ConfigError, OSError) as err:
            self._refuse(path, f"it cannot be read: {err}")
            return
        self._known[path] = stamp, f"{fingerprint} {self._settings}" if self._settings else fingerprint

    def _stamp(self, path: str) -> object:
        return stamp_folder(Path(path)), stamp_way(Path(path))

    def _refuse(self, path: str, why: str) -> None:
        if path in self._refused:
            return
        self._refused[path] = why
        logger.warning(
            "KV of LoRA adapter %s is neither stored nor loaded until the engine is restarted: %s", path, why
        )


def _working_folder() -> tuple[int, int]:
    status = os.stat(".")
    return status.st_dev, status.st_ino


def why_no_media(host: HostInfo) -> str | None:
    """Why requests with media are not cached; None when they are."""
    if host.numbers_media:
        return NUMBERED_MEDIA
    folder = Path(host.model)
    if host.media_read_after_s is None or not folder.is_dir():
        return None
    files = _media_files(folder)
    is_young = newest_change_s(folder, is_strict=False, files=files) > host.media_read_after_s
    return YOUNG_PROCESSOR if is_young else None


def _media_files(folder: Path) -> list[Path]:
    """What media processors may be made of, tokenizers that describe media (Mistral's) and code among it."""
    return sorted(file for pattern in ("*.json", "*.py") for file in folder.glob(pattern))


class KeyMaker:
    """From requests to keys."""

    def __init__(
        self,
        model_fingerprint: str,
        groups: tuple[GroupInfo, ...],
        world_size: int,
        adapter_settings: str = "",
        started_s: float | None = None,
        weights: Path | None = None,
        no_media: str | None = None,
        processor: Path | None = None,
    ) -> None:
        """`started_s`: when the engine may have begun to load adapters, in seconds since the epoch; now if None.

        `weights`: the model's folder, if its files must stay as they are; None: `weights_version` vouches for them.
        `no_media`: why requests with media are not cached, if so. `processor`: the folder of the media processor, which
        the host may read again at any time.
        """
        self._model = model_fingerprint
        self._weights, self._processor = weights, processor
        self._stamp = self._look()
        self._are_files_certain = True
        self.no_media = no_media
        if no_media is not None:
            logger.warning("KV of requests with media is neither stored nor loaded nor handed over: %s", no_media)
        self._groups = groups
        self._world_size = world_size
        self._adapters = _Adapters(adapter_settings, time.time() if started_s is None else started_s)

    @classmethod
    def of(cls, host: HostInfo, weights_version: str | None) -> KeyMaker:
        """For an engine's weights and settings. ConfigError when its weights cannot be told."""
        folder = None if weights_version is not None else Path(host.model)
        return cls.named(model_identity(host, weights_version), host, folder)

    @classmethod
    def named(cls, name: str, host: HostInfo, weights: Path | None = None) -> KeyMaker:
        """For a host whose model is called so in keys."""
        processor = Path(host.model) if host.media_read_after_s is not None else None
        return cls(
            name, host.groups, host.world_size, host.adapter_settings, weights=weights, no_media=why_no_media(host),
            processor=processor,
        )  # fmt: skip

    def chain(self, request: RequestView) -> KeyChain | None:
        """An empty chain with the request's identity, or None when it must not be cached."""
        if request.has_unhashable_input or self.has_uncertain_media(request):
            return None
        lora = None
        if (path := request.lora_path) is not None:
            lora = self._adapters.fingerprint(path, request.lora_id)
            if lora is None:
                return None
        return KeyChain(Identity(self._model, request.cache_salt, lora), request.multimodal_items)

    def has_uncertain_media(self, request: RequestView) -> bool:
        """True when the names of its media may stand for other numbers in another process: `no_media` says why."""
        return self.no_media is not None and bool(request.multimodal_items)

    def is_certain(self, lora_path: str | None) -> bool:
        """False when what was computed may not be what the files of model and adapter held when its chain was begun.

        Weights count too: engines map their files, so that a file that is overwritten in place changes a running model.

        Ask before a chain's keys are looked up, and once more when what was computed is about to become findable.
        """
        return self._has_same_files() and (lora_path is None or self._adapters.is_certain(lora_path))

    def _look(self) -> object:
        return (
            None if self._weights is None else stamp_folder(self._weights),
            None if self._processor is None else stamp_files(_media_files(self._processor)),
        )

    def _has_same_files(self) -> bool:
        if not self._are_files_certain:
            return False
        try:
            self._are_files_certain = self._look() == self._stamp
        except (ConfigError, OSError):
            self._are_files_certain = False
        if not self._are_files_certain:
            logger.warning(
                "KV is neither stored nor loaded until the engine is restarted: files of the model in %s changed since "
                "it was loaded", self._weights or self._processor,
            )  # fmt: skip
        return self._are_files_certain

    def why_not(self, lora_path: str | None) -> str:
        """Why requests of this adapter, or of none, are not cached."""
        if not self._are_files_certain or lora_path is None:
            return "files of the model changed since it was loaded"
        return self._adapters.why_not(lora_path)

    def shards(self, chain_value: bytes, group_id: int) -> list[StoreKey]:
        """The keys of one chunk of one group: one per worker, in rank order."""
        return [store_key(chain_value, group_id, rank) for rank in range(self._world_size)]
