"""From a configuration to a connector class. One resolver decides, and says in a record what it found and where.

    kv_connector_module_path     that module, and nothing else: when it fails there is no other try
    kv_connector "module:Class"  that class of that module
    a registered name            built-ins and what `register_connector` was told
    an entry point               of the group `kvferry.connectors`, of any installed package

A name that two of these offer is used from the one further up. That is told once, or refused (`on_shadow`). Nothing
is imported before it is asked for.
"""

from __future__ import annotations

import enum
import functools
import importlib
import inspect
import logging
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from kvferry.config import KVTransferConfig, lmcache_upstream_environment
from kvferry.contract.base import CONNECTOR_API, KVConnectorBase_V1
from kvferry.contract.class_hooks import ask_class
from kvferry.contract.plugins import read_offers
from kvferry.errors import (
    ConfigError,
    ConnectorAttributeNotFound,
    ConnectorImportFailed,
    ConnectorModuleNotFound,
    ConnectorNotFound,
    did_you_mean,
    install_hint,
    require_packages,
)

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "kvferry.connectors"
"""Packages offer connectors under this group: `MyConnector = "my_package.module:MyConnector"`."""


class Origin(enum.Enum):
    """Through what a connector was found."""

    BUILT_IN = "built-in"
    REGISTERED = "registered"
    MODULE = "module path"
    ENTRY_POINT = "entry point"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a connector class is said to be; nothing of it is imported yet."""

    name: str
    """What users write as `kv_connector`."""
    module: str
    class_name: str
    origin: Origin
    description: str = ""
    """One sentence for users; empty: ask the class."""
    install_hint: str = ""
    """What to do when its module cannot be imported because a package is missing."""
    version: str | None = None
    """Of the package that offers it, where known without importing."""
    package: str | None = None
    """The package that offers it (entry points)."""
    needs: str | None = None
    """A module, and extra of kvferry's, without which it does not start unless its settings say otherwise."""

    def __str__(self) -> str:
        where = f"{self.origin.value} {self.module}:{self.class_name}"
        return f"{where} of package {self.package}" if self.package else where

    def is_same_class(self, other: Target) -> bool:
        """True when both name one class."""
        return (self.module, self.class_name) == (other.module, other.class_name)


_TORCH_HINT = f"torch comes with the host; for the embedded engine: {install_hint('engine')}"
_P2P_HINT = f"P2P needs more packages: {install_hint('p2p')}"
_LMCACHE_HINT = f"{install_hint('lmcache')}; torch comes with the host"

BUILT_INS = (
    Target(
        "OffloadingConnector",
        "kvferry.offloading.connector",
        "OffloadingConnector",
        Origin.BUILT_IN,
        "Keeps KV in host memory and in tiers below it, and loads it for requests with the same prefix.",
        _TORCH_HINT,
    ),
    *(
        Target(
            name,
            "kvferry.p2p.connector",
            name,
            Origin.BUILT_IN,
            description,
            _P2P_HINT,
            needs="nixl" if name.startswith("Nixl") else None,
        )
        for name, description in {
            "P2PConnector": "Moves KV from a prefill engine to a decode engine, over what is fastest between them.",
            "NixlConnector": "The same over NIXL, where the decode engine reads unless configured otherwise.",
            "NixlPullConnector": "The same over NIXL, where the decode engine reads.",
            "NixlPushConnector": "The same over NIXL, where the prefill engine writes.",
        }.items()
    ),
    Target(
        "MultiConnector",
        "kvferry.multi.connector",
        "MultiConnector",
        Origin.BUILT_IN,
        "Several connectors as one: loads from the best, saves to all.",
    ),
    Target(
        "LoadRecoveryExampleConnector",
        "kvferry.examples.load_recovery",
        "LoadRecoveryExampleConnector",
        Origin.BUILT_IN,
        "Drops chosen blocks of its loads on purpose, to show how an engine recovers.",
        _TORCH_HINT,
    ),
    Target(
        "ExampleConnector",
        "kvferry.examples.example",
        "ExampleConnector",
        Origin.BUILT_IN,
        "Keeps KV in a shared folder, one safetensors file per block and layer; the one to read first.",
        _TORCH_HINT,
    ),
    Target(
        "ExampleHiddenStatesConnector",
        "kvferry.examples.hidden_states",
        "ExampleHiddenStatesConnector",
        Origin.BUILT_IN,
        "Writes chosen layers' hidden states of each prompt to a safetensors file.",
        _TORCH_HINT,
    ),
    Target(
        "DecodeBenchConnector",
        "kvferry.examples.decode_bench",
        "DecodeBenchConnector",
        Origin.BUILT_IN,
        "Fills the KV of prompts with noise, so that decoding alone is measured; answers mean nothing.",
        _TORCH_HINT,
    ),
    Target(
        "LMCacheMPConnector",
        "kvferry.lmcache.connector",
        "LMCacheMPConnector",
        Origin.BUILT_IN,
        "Keeps KV in an LMCache server; in vLLM with LMCache's own class where that is installed.",
        _LMCACHE_HINT,
    ),
    Target(
        "LMCacheMPConnectorUpstream",
        "kvferry.lmcache.connector",
        "LMCacheMPConnectorUpstream",
        Origin.BUILT_IN,
        "Keeps KV in an LMCache server, always with kvferry's own client.",
        _LMCACHE_HINT,
    ),
)
"""All connectors kvferry ships."""


VLLM_FORMS = "kvferry.vllm"
"""Module of the built-ins' forms for vLLM. In another host its names mean the built-ins themselves."""
FERRY_NAMES = {f"Ferry{target.name}": target.name for target in BUILT_INS} | {
    "FerryMultiConnectorNoHMA": "MultiConnector"
}
"""What vLLM's registry calls the built-ins -> their names."""

HOST_ADAPTERS = {"vllm.distributed.kv_transfer.kv_connector.v1.base": "kvferry.vllm.foreign"}
"""Module of another host's KVConnectorBase_V1 -> module whose `adapt` makes one of our classes out of its subclasses.

Imported when such a class is named; nothing here imports a host."""

CAPABILITY_HOOKS = ("supports_hma_config", "supports_v2_model_runner_config")


@dataclass(frozen=True, slots=True)
class ConnectorCapabilities:
    """What a connector can do, read from its class and configuration, never from its name."""

    supports_hma: bool | None
    """Hybrid KV caches. None, here and below: the configuration decides, and there was none."""
    supports_v2_model_runner: bool | None
    connector_api: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ResolvedConnector:
    """A connector class that may be constructed, and where it came from."""

    name: str
    """`kv_connector` as it was written."""
    connector_class: type[KVConnectorBase_V1]
    origin: Origin
    module: str
    """The module that defines the class; it may differ from the one that was named."""
    file: str | None
    version: str | None
    """Of the distribution the module is in; kvferry's own for its own; None when unknown."""
    capabilities: ConnectorCapabilities


@dataclass(frozen=True, slots=True)
class KnownConnector:
    """One row of the list of connectors: usable (`resolved`), or not (`problem` says why and what to do)."""

    target: Target
    resolved: ResolvedConnector | None
    problem: str | None

    @property
    def description(self) -> str:
        """One line on what it is: the table's, or the first of the class's own docstring."""
        if self.target.description or self.resolved is None:
            return self.target.description
        return (self.resolved.connector_class.__doc__ or "").strip().partition("\n")[0]


class ConnectorResolver:
    """Knows the registered names and finds classes. Raises ConnectorNotFound (a ConfigError) when there is no usable
    class: the text says why and what to do. After a failure the same call may be tried again."""

    def __init__(self, targets: Iterable[Target]) -> None:
        self._registry = {target.name: target for target in targets}
        self._told: set[tuple[str, str]] = set()

    def register(self, name: str, module: str, class_name: str) -> None:
        """Make `module:class_name` known as `name`; imports nothing. ConfigError when the name is taken."""
        taken = self._registry.get(name)
        if taken is not None:
            raise ConfigError(
                f"connector name {name!r} is already registered as {taken.module}:{taken.class_name}; choose another"
            )
        self._registry[name] = Target(name, module, class_name, Origin.REGISTERED)

    def resolve(self, transfer: KVTransferConfig) -> ResolvedConnector:
        """The record of the connector that a configuration means."""
        target, connector_class = self._loaded(transfer)
        return _record(target, connector_class, transfer)

    def find_class(self, transfer: KVTransferConfig) -> type[KVConnectorBase_V1]:
        """The class that a configuration means."""
        return self._loaded(transfer)[1]

    def _loaded(self, transfer: KVTransferConfig) -> tuple[Target, type[KVConnectorBase_V1]]:
        target = self._target(transfer)
        shadows = self._shadows(target)
        if shadows and transfer.on_shadow == "error":
            raise ConfigError(
                f"{shadows}: write 'module:Class' for the one you mean, or allow it with on_shadow='warn'"
            )
        connector_class = _load(target)
        if shadows and (target.name, target.module) not in self._told:
            self._told.add((target.name, target.module))
            logger.warning("%s", shadows)
        return target, connector_class

    def find_class_by_name(self, name: str) -> type[KVConnectorBase_V1]:
        """The class registered, or offered by an entry point, as `name`."""
        return _load(self._named(name))

    def known(self) -> list[KnownConnector]:
        """Every built-in, registered and entry-point connector; imports them all. A broken one is a row as well."""
        offers = [*self._registry.values(), *_entry_points()]
        return [_row(target, [other for other in offers if other.name == target.name]) for target in offers]

    def _target(self, transfer: KVTransferConfig) -> Target:
        name, path = transfer.kv_connector, transfer.kv_connector_module_path
        if not name:
            raise ConnectorNotFound("kv_connector is not set: name a connector class")
        if path == "":
            raise ConnectorNotFound("kv_connector_module_path is empty: give a module, or leave the key out")
        if ":" in name:
            return _explicit(name, path)
        if (own := built_in_meant(name, path)) is not None and not (path is None and self._offers(name)):
            name, path = own, None
        if path is None:
            return self._named(name)
        target = Target(name, path, name, Origin.MODULE)
        if name == "LMCacheMPConnector" and lmcache_upstream_environment():
            logger.warning("LMCACHE_USE_UPSTREAM_MP is set, but kv_connector_module_path=%r has priority", path)
        return target

    def _named(self, name: str) -> Target:
        offers = self._offers(name)
        if not offers:
            known = {*self._registry, *(target.name for target in _entry_points())}
            raise ConnectorNotFound(
                f"kv_connector={name!r} is not registered{did_you_mean(name, known, list_all=True)}; "
                "for a connector of your own set kv_connector_module_path, or write 'module:Class'"
            )
        return _first(offers)

    def _offers(self, name: str) -> list[Target]:
        registered = [self._registry[name]] if name in self._registry else []
        return [*registered, *(target for target in _entry_points() if target.name == name)]

    def _shadows(self, used: Target) -> str:
        """What to say of equally named connectors that the used one hides; empty: it hides none."""
        if ":" in used.name:
            return ""
        hidden = [str(other) for other in self._offers(used.name) if not other.is_same_class(used)]
        return f"kv_connector={used.name!r} is the {used}, which hides the {' and the '.join(hidden)}" if hidden else ""


def built_in_meant(name: str, path: str | None) -> str | None:
    """The built-in that a configuration written for vLLM means; None when it means none of kvferry's."""
    if path == VLLM_FORMS and (name in FERRY_NAMES.values() or FERRY_NAMES.get(name) == "MultiConnector"):
        return FERRY_NAMES.get(name, name)
    return FERRY_NAMES.get(name) if path is None else None


def _explicit(name: str, path: str | None) -> Target:
    module, _, class_name = name.partition(":")
    if path is not None:
        raise ConfigError(
            f"kv_connector={name!r} names a module, and so does kv_connector_module_path={path!r}: give one of them"
        )
    if not module or not class_name:
        raise ConnectorNotFound(f"kv_connector={name!r} must be a class name, or 'module:Class' with both parts")
    return Target(name, module, class_name, Origin.MODULE)


def _first(offers: list[Target]) -> Target:
    """The one of equally named targets that counts. Between two packages there is no order."""
    first, *others = offers
    if first.origin is Origin.ENTRY_POINT and not all(other.is_same_class(first) for other in others):
        raise ConnectorNotFound(
            f"kv_connector={first.name!r} is offered by several packages: {', '.join(map(str, offers))}; "
            "write 'module:Class' for the one you mean"
        )
    return first


def _row(target: Target, offers: list[Target]) -> KnownConnector:
    try:
        used = _first(offers)
        if not used.is_same_class(target):
            return KnownConnector(target, None, f"hidden by the {used} of the same name; write 'module:Class' for it")
        connector_class = _load(target)
        if target.needs is not None:
            require_packages(target.name, target.needs, [target.needs])
    except ConfigError as err:
        return KnownConnector(target, None, str(err))
    return KnownConnector(target, _record(target, connector_class, None), None)


def _entry_points() -> Iterator[Target]:
    for offer in read_offers(ENTRY_POINT_GROUP):
        yield Target(
            offer.name,
            offer.module,
            offer.attribute,
            Origin.ENTRY_POINT,
            version=offer.version,
            package=offer.package,
        )


# ---- from a target to a class that may be constructed ---------------------------------------------------------


def _load(target: Target) -> type[KVConnectorBase_V1]:
    module = _import(target)
    try:
        found = getattr(module, target.class_name, None)
    except (Exception, SystemExit) as err:  # a module's own __getattr__, which may import
        raise _import_failed(target, err) from err
    if found is None:
        offered = (name for name, value in vars(module).items() if _is_connector(value) or _adapter(value))
        known = [*vars(module).get("__all__", ()), *offered]
        raise ConnectorAttributeNotFound(
            f"{_given(target)}: module {target.module!r} has no class {target.class_name!r}"
            f"{did_you_mean(target.class_name, known)}; correct the name"
        )
    where, adapter = f"{target.module}:{target.class_name}", _adapter(found)
    if adapter is None:
        _check_base(found, where)
    _check_constructible(found, where)
    if adapter is not None:
        found = _import(replace(target, module=adapter)).adapt(found)
    return cast("type[KVConnectorBase_V1]", found)


def _import(target: Target) -> ModuleType:
    if target.module.startswith("."):
        raise ConnectorModuleNotFound(
            f"{_given(target)} is a relative module path, and there is no package that it could be relative to: write "
            "the whole path, such as 'my_package.my_module'"
        )
    try:
        return importlib.import_module(target.module)
    except ModuleNotFoundError as err:
        if err.name is not None and f"{target.module}.".startswith(f"{err.name}."):
            raise ConnectorModuleNotFound(
                f"{_given(target)}: there is no module {err.name!r}; install the package it is in, or correct the path"
            ) from err
        raise _import_failed(target, err) from err
    except (Exception, SystemExit) as err:  # plugin load: a module may raise anything
        raise _import_failed(target, err) from err


def _import_failed(target: Target, err: BaseException) -> ConnectorImportFailed:
    frames = [f for f in traceback.extract_tb(err.__traceback__) if f.filename not in (__file__, importlib.__file__)]
    frames = [f for f in frames if not f.filename.startswith("<")]
    place = f" (at {frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    if isinstance(err, ModuleNotFoundError) and err.name:
        remedy = target.install_hint or f"install the package that has {err.name!r}"
    else:
        remedy = target.install_hint or "correct the module"
    return ConnectorImportFailed(
        f"{_given(target)}: module {target.module!r} is there, but importing it failed with "
        f"{type(err).__name__}: {err}{place}; {remedy}"
    )


def _given(target: Target) -> str:
    """The setting that led to the target, for messages."""
    if target.origin is not Origin.MODULE:
        return f"kv_connector={target.name!r} ({target})"
    return f"kv_connector={target.name!r}" if ":" in target.name else f"kv_connector_module_path={target.module!r}"


def _is_connector(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, KVConnectorBase_V1) and value is not KVConnectorBase_V1


def _adapter(value: Any) -> str | None:
    """The module that adapts a class written for another host's base, or None."""
    bases = [c for c in getattr(value, "__mro__", ())[1:] if c.__name__ == KVConnectorBase_V1.__name__]
    return next((HOST_ADAPTERS[c.__module__] for c in bases if c.__module__ in HOST_ADAPTERS), None)


def _check_base(found: Any, where: str) -> None:
    if not _is_connector(found):
        theirs = [c.__module__ for c in getattr(found, "__mro__", ()) if c.__name__ == KVConnectorBase_V1.__name__]
        hint = f"; its base is the one of {theirs[0]}" if theirs else ""
        raise ConnectorNotFound(f"{where} is not a KV connector: it must subclass kvferry.KVConnectorBase_V1{hint}")
    _check_api(found.CONNECTOR_API, where)


def _check_constructible(found: type[Any], where: str) -> None:
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConnectorNotFound(f"{where} does not implement: {missing}")
    problems = _signature_problems(found)
    if problems:
        text = f"{where} must be constructible as (vllm_config, role, kv_cache_config): {'; '.join(problems)}"
        logger.error("%s", text)
        raise ConnectorNotFound(text)


def _check_api(api: Any, where: str) -> None:
    if not (isinstance(api, tuple) and len(api) == 2 and all(type(part) is int and part >= 0 for part in api)):
        raise ConnectorNotFound(
            f"{where}: CONNECTOR_API={api!r} must be two whole numbers (major, minor), such as {CONNECTOR_API}"
        )
    if api[0] != CONNECTOR_API[0] or api[1] > CONNECTOR_API[1]:
        older = api < CONNECTOR_API
        remedy = "install a later release of the connector" if older else "install a later kvferry"
        raise ConnectorNotFound(
            f"{where} is written for connector API {_dotted(api)}, this kvferry has {_dotted(CONNECTOR_API)}: {remedy}"
        )


def _dotted(api: tuple[int, int]) -> str:
    return ".".join(map(str, api))


def _signature_problems(connector_class: type) -> list[str]:
    """What keeps `connector_class(vllm_config, role, kv_cache_config=...)` from working, all of it."""
    try:
        parameters = list(inspect.signature(connector_class).parameters.values())
    except (TypeError, ValueError) as err:
        return [f"its signature cannot be read ({err})"]
    kinds = {p.kind for p in parameters}
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = next((p for p in parameters if p.name == "kv_cache_config"), None)
    before = [p for p in by_position if p is not named][:2]
    problems = []
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        problems += [f"it takes no {name} (by position)" for name in ("vllm_config", "role")[len(before) :]]
    if named is None and inspect.Parameter.VAR_KEYWORD not in kinds:
        problems.append(
            "it has neither kv_cache_config nor **kwargs (the two-argument form is deprecated: take kv_cache_config as "
            "third argument, and pass it on with super().__init__(vllm_config, role, kv_cache_config))"
        )
    elif named is not None and named.kind in (named.POSITIONAL_ONLY, named.VAR_POSITIONAL):
        problems.append("it does not take kv_cache_config by keyword")
    elif named in by_position and by_position.index(named) != 2 and len(before) == 2:
        problems.append(f"kv_cache_config must be its third parameter, not number {by_position.index(named) + 1}")
    problems += [
        f"it requires {p.name!r}, which no host passes: give it a default"
        for p in parameters
        if p.default is p.empty and p not in (*before, named) and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return problems


# ---- the record -----------------------------------------------------------------------------------------------


def _record(
    target: Target, connector_class: type[KVConnectorBase_V1], transfer: KVTransferConfig | None
) -> ResolvedConnector:
    module = connector_class.__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    hma, runner = (_capability(connector_class, hook, transfer) for hook in CAPABILITY_HOOKS)
    capabilities = ConnectorCapabilities(hma, runner, connector_class.CONNECTOR_API)
    version = target.version or _version(module.partition(".")[0], file)
    return ResolvedConnector(target.name, connector_class, target.origin, module, file, version, capabilities)


def _capability(connector_class: type[KVConnectorBase_V1], hook: str, transfer: KVTransferConfig | None) -> bool | None:
    """What the class answers for the configuration; without one, None if the answer would depend on it."""
    if transfer is None:
        if inspect.getattr_static(connector_class, hook) is not inspect.getattr_static(KVConnectorBase_V1, hook):
            return None
        transfer = KVTransferConfig()
    return bool(ask_class(connector_class, hook, transfer))


@functools.cache  # looks through every installed package: a tenth of a second
def _version(package: str, file: str | None) -> str | None:
    """Version of the one distribution that has `package`, if `file` is of its folder and not of another path."""
    if package == __name__.partition(".")[0]:
        return cast("str", sys.modules[package].__version__)  # an import of the top package would point upwards
    names = set(metadata.packages_distributions().get(package, ()))
    if len(names) != 1 or file is None:
        return None
    dist = metadata.distribution(names.pop())
    folder = Path(str(dist.locate_file(""))).resolve()
    return dist.version if Path(file).resolve().is_relative_to(folder) else None
