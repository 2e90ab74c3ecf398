"""Every error kvferry raises on purpose.

    KVFerryError
    ├── ConfigError (also ValueError)      a setting is wrong: names the key, the value and the remedy
    │   └── ConnectorNotFound              a connector cannot be resolved
    ├── ContractError                      a plugin broke a clause of the connector contract
    ├── TierError                          a tier could not do its job
    │   ├── TierBusy                       try later; nothing is wrong
    │   ├── TierCorrupt                    bytes did not match their digest or header
    │   └── TierUnavailable                disk full, folder gone, server down
    ├── TransferError                      a transfer between engines failed
    │   ├── TransferMismatch               the two engines' KV caches cannot be mapped onto each other
    │   └── TransferParamsError            a request's kv_transfer_params cannot be used
    └── HostError                          the host (engine, vLLM) does not offer what is needed

A cache miss is a value, never one of these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec


class KVFerryError(Exception):
    """Base of all errors raised by kvferry."""


class ConfigError(KVFerryError, ValueError):
    """A setting is wrong. The text names the key, the value given and what to do."""


class ConnectorNotFound(ConfigError):
    """A connector name or module path leads to no usable connector class."""


class ConnectorAttributeNotFound(ConnectorNotFound, AttributeError):
    """The module was imported, but has no class of that name."""


class ConnectorModuleNotFound(ConnectorNotFound, ModuleNotFoundError):
    """`kv_connector_module_path` names a module that does not exist."""


class ConnectorImportFailed(ConnectorNotFound, ImportError):
    """The connector's module exists, but raised while it was imported; the text shows the cause."""


class ContractError(KVFerryError):
    """A connector broke a clause of the contract; the text names connector, hook and clause."""


class TierError(KVFerryError):
    """A tier could not do what was asked of it."""


class TierBusy(TierError):
    """The tier cannot take the job now; the same job may succeed later."""


class TierCorrupt(TierError):
    """Stored bytes do not match their digest or header. The entry counts as a miss."""


class TierUnavailable(TierError):
    """The tier's medium is full, gone or refusing."""


class TransferError(KVFerryError):
    """A transfer between engines failed."""


class TransferMismatch(TransferError):
    """KV of the two engines cannot be mapped; the text holds the differences, field by field."""


class TransferParamsError(TransferError):
    """A request's `kv_transfer_params` cannot be used here: whoever sent them is to blame, and neither engine."""


class HostError(KVFerryError):
    """The host lacks something kvferry needs, is a version kvferry does not support, or has failed."""


def did_you_mean(name: str, known: Iterable[str], *, list_all: bool = False) -> str:
    """` (did you mean 'x'?)` with the nearest of `known`; the list of all when none is near, or when asked for."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    parts = [f"did you mean {near[0]!r}?"] if near else []
    if known and (list_all or not near):
        parts.append(f"known: {', '.join(known)}")
    return f" ({' '.join(parts)})" if parts else ""


def install_hint(*extras: str) -> str:
    """What to install for some of kvferry's extras, as pip takes it from an index: the packages themselves.

    kvferry is on no index, so that "kvferry[...]" can only be installed from a clone.
    """
    marks = tuple(f"extra == {quote}{extra}{quote}" for extra in extras for quote in "\"'")
    in_clone = f"in a clone of kvferry: pip install '.[{','.join(extras)}]'"
    try:
        needed = metadata.requires("kvferry") or []
    except metadata.PackageNotFoundError:  # run from a folder, not installed
        return in_clone
    names = dict.fromkeys(text.partition(";")[0].strip() for text in needed if text.endswith(marks))
    return f"pip install {' '.join(repr(name) for name in names)}, or {in_clone}"


def require_packages(who: str, extra: str, modules: Iterable[str]) -> None:
    """ConfigError unless all modules are installed; it says who needs them and what to install."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ConfigError(f"{who} needs {', '.join(missing)}, which a plain kvferry lacks: {install_hint(extra)}")
