"""Which transport: the names there are, those a worker can offer, and the one for each pair of workers.

`auto` offers all that work here and takes, per peer, the first that both sides have and that reaches: kvferry's own in
the order of `TRANSPORTS`, then those of installed packages in alphabetical order, as far as their class says
`is_for_auto`. Others of these serve only by name: what an engine does must not change because a package was installed.
A transport that is named is that one or an error: nothing is substituted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from kvferry.contract.plugins import Registry
from kvferry.errors import ConfigError, TransferError
from kvferry.p2p.transports.transport import Region, Transport, TransportSetup

logger = logging.getLogger(__name__)

AUTO = "auto"
TRANSPORTS = Registry(
    "kvferry.transports",
    "transport",
    {"shm": "kvferry.p2p.transports.shm:ShmTransport", "nixl": "kvferry.p2p.transports.nixl:NixlTransport"},
)
"""kvferry's own: the fastest first."""
SETTING = "kv_connector_extra_config.transport"


def create_transports(
    requested: str, regions: Sequence[Region], setup: TransportSetup, configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Transport]:
    """The worker's registered transports by name; close them all. `configs`: own settings of transports, by name.

    ConfigError when the name is unknown, a named transport cannot be had, or `auto` finds none; it says why.
    """
    reasons: list[str] = []
    names = _names_for_auto(reasons) if requested == AUTO else [requested]
    transports: dict[str, Transport] = {}
    with ExitStack() as made:
        for name in names:
            own = replace(setup, config=configs.get(name, {}), where=where_of(name))
            try:
                transports[name] = _make(name, own, regions)
            except ConfigError as error:
                if requested != AUTO:
                    raise
                reasons.append(f"{name}: {error}")
            else:
                made.callback(transports[name].close)
        made.pop_all()  # nothing was raised: they are the caller's
    if not transports:
        raise ConfigError(f"no p2p transport works here: {'; '.join(reasons)}")
    logger.info("p2p transports: %s%s", ", ".join(transports), f" (not {'; '.join(reasons)})" if reasons else "")
    return transports


def choose(requested: str, transports: Mapping[str, Transport], blobs: Mapping[str, bytes]) -> Transport:
    """Ours for one peer, given the blobs it offers by name. TransferError says why each is out."""
    reasons = []
    installed = sorted(transports.keys() - TRANSPORTS.built_ins.keys())
    for name in [*TRANSPORTS.built_ins, *installed] if requested == AUTO else (requested,):
        if name not in transports:
            reasons.append(f"{name}: not available in this engine")
        elif name not in blobs:
            reasons.append(f"{name}: not offered by the peer")
        elif (why := transports[name].why_unreachable(blobs[name])) is not None:
            reasons.append(f"{name}: {why}")
        else:
            logger.info("p2p transport for this peer: %s%s", name, f" ({'; '.join(reasons)})" if reasons else "")
            return transports[name]
    raise TransferError(f"no transport ({requested}) reaches the peer: {'; '.join(reasons)}")


def where_of(name: str) -> str:
    """Where a transport's own settings stand in the user's configuration."""
    return "kv_connector_extra_config." + ("ucx" if name == "nixl" else f"transport_config.{name}")


def check_transport(requested: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """ConfigError when a transport that is named cannot be had here, or `auto` never uses one with settings.

    Opens nothing.
    """
    if requested != AUTO:
        _check(requested, configs.get(requested, {}))
        return
    for name in sorted(configs.keys() - TRANSPORTS.built_ins.keys()):
        if not _is_for_auto(name):
            raise ConfigError(
                f"{where_of(name)} is given, but transport 'auto' does not use {name!r}: set {SETTING} to {name!r}"
            )
        _check(name, configs[name])


def check_without_shared_memory(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """ConfigError, with the reason for each, unless `auto` finds a transport beside shared memory. Opens nothing."""
    reasons: list[str] = []
    for name in _names_for_auto(reasons):
        if name != "shm":
            try:
                return _check(name, configs.get(name, {}))
            except ConfigError as error:
                reasons.append(f"{name}: {error}")
    raise ConfigError("; ".join(reasons))


def uses_pool(requested: str) -> bool:
    """Whether KV memory is to lie in a `SharedPool`. ConfigError when there is no such transport."""
    return requested == AUTO or bool(getattr(TRANSPORTS.find(requested, SETTING), "uses_pool", False))


def _check(name: str, config: Mapping[str, Any]) -> None:
    factory = TRANSPORTS.find(name, SETTING)
    if hasattr(factory, "check"):
        factory.check(config, where_of(name))


def _is_for_auto(name: str) -> bool:
    return bool(getattr(TRANSPORTS.find(name, SETTING), "is_for_auto", False))


def _names_for_auto(reasons: list[str]) -> list[str]:
    """In the order in which they are tried; of those that cannot be imported, `reasons` says why."""
    names = list(TRANSPORTS.built_ins)
    for name in TRANSPORTS.names()[len(names) :]:
        try:
            if _is_for_auto(name):
                names.append(name)
        except ConfigError as error:
            reasons.append(f"{name}: {error}")
    return names


def _make(name: str, setup: TransportSetup, regions: Sequence[Region]) -> Transport:
    """ConfigError also for whatever else a package's transport raises: it must not take `auto` down with it."""
    factory = TRANSPORTS.find(name, SETTING)
    with ExitStack() as undo:
        try:
            transport = factory.from_config(setup)
            _check_made(name, transport)
            undo.callback(transport.close)
            transport.register(regions)
        except Exception as error:  # plugin code: what it raises is not known
            if name in TRANSPORTS.built_ins or isinstance(error, ConfigError):
                raise
            raise ConfigError(f"transport {name!r} cannot be had: {type(error).__name__}: {error}") from error
        undo.pop_all()
    assert isinstance(transport, Transport)
    return transport


def _check_made(name: str, made: object) -> None:
    if not isinstance(made, Transport):
        raise ConfigError(f"the factory of transport {name!r} made {made!r}, which lacks methods of a transport")
    if made.capabilities.name != name:
        raise ConfigError(f"the transport registered as {name!r} calls itself {made.capabilities.name!r}")
