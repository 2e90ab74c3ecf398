"""What installed packages add to kvferry, and to vLLM. Entry points are read here and nowhere else.

    group                a name stands in the configuration as     found by
    kvferry.connectors   `kv_connector`                            `kvferry.contract.resolver`
    kvferry.tiers        `type` of a tier                          `kvferry.offloading.store.registry`
    kvferry.transports   `transport` of the P2P connectors         `kvferry.p2p.transports.choice`

    vllm.*               `VLLM_PLUGINS`                            `kvferry.contract.numerics`, for the identity of KV

Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from kvferry.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    """One entry point of an installed package. Nothing of it is imported yet."""

    name: str
    module: str
    attribute: str
    package: str | None
    version: str | None

    @property
    def origin(self) -> str:
        """Package and version."""
        return f"{self.package} {self.version}" if self.package else "no installed package"

    def __str__(self) -> str:
        where = f"entry point {self.module}:{self.attribute}"
        return f"{where} of package {self.package}" if self.package else where


def read_offers(group: str) -> list[Offer]:
    """The entry points of a group, of all installed packages. Reads the folders of packages (some 25 ms)."""
    try:
        found = metadata.entry_points(group=group)
    except Exception:  # one package's broken metadata; what needs no entry point must still be found
        logger.exception("cannot read the entry points of installed packages; none is used")
        return []
    offers = []
    for point in found:
        module, _, attribute = point.value.partition("[")[0].strip().partition(":")
        package, version = (point.dist.name, point.dist.version) if point.dist else (None, None)
        offers.append(Offer(point.name, module.strip(), attribute.strip(), package, version))
    return offers


def load_factory(module: str, attribute: str, where: str, kind: str) -> Any:
    """The class (or other object with `from_config`) that a module has under a name.

    ConfigError, which begins with `where`, when the module cannot be imported or has no such thing. `kind` is what to
    call it in messages.
    """
    try:
        found = importlib.import_module(module)
        value = getattr(found, attribute, None)
    except (Exception, SystemExit) as error:  # plugin load: a module may raise anything
        raise ConfigError(f"{where}: cannot import {module}: {type(error).__name__}: {error}") from error
    if not hasattr(value, "from_config"):
        known = [name for name, other in vars(found).items() if hasattr(other, "from_config")]
        near = did_you_mean(attribute, known)
        raise ConfigError(f"{where}: {module} has no {kind} class {attribute!r} (one with from_config){near}")
    return value


@dataclass(frozen=True, slots=True)
class KnownName:
    """One row of the list of names: where it is from, and why it cannot be used (None: it can)."""

    name: str
    origin: str
    problem: str | None


class Registry:
    """Names of one kind of factory: kvferry's own, and those that installed packages offer in `group`.

    A name of kvferry's own always means kvferry's own; the log says once which packages offer it too.
    A name that several packages offer is a ConfigError where it is used.
    """

    def __init__(self, group: str, kind: str, built_ins: Mapping[str, str]) -> None:
        """`built_ins`: name -> "module:Class", in the order in which they are tried where all are."""
        self.group = group
        self.kind = kind
        self.built_ins = dict(built_ins)
        self._has_told = False

    def names(self) -> list[str]:
        """kvferry's own, then those of packages in alphabetical order."""
        return [*self.built_ins, *sorted({offer.name for offer in read_offers(self.group)} - self.built_ins.keys())]

    def check_name(self, name: str, where: str, *, also: Iterable[str] = ()) -> None:
        """ConfigError unless the name is known, or one of `also`. Imports nothing."""
        if name not in self.built_ins and name not in also and name not in (names := self.names()):
            raise ConfigError(f"{where}={name!r} is unknown{did_you_mean(name, [*also, *names], list_all=True)}")

    def find(self, name: str, where: str) -> Any:
        """The factory of that name. ConfigError, which names the setting `where`, when there is no usable one."""
        if name in self.built_ins:
            self._tell_of_hidden()
            return load_factory(*_target(self.built_ins[name]), where, self.kind)
        self.check_name(name, where)
        offers = [offer for offer in read_offers(self.group) if offer.name == name]
        if len({(offer.module, offer.attribute) for offer in offers}) > 1:
            offered = " and the ".join(map(str, offers))
            raise ConfigError(f"{where}={name!r} is offered by several packages: the {offered}; uninstall one of them")
        return load_factory(offers[0].module, offers[0].attribute, f"{where}={name!r} ({offers[0]})", self.kind)

    def known(self) -> list[KnownName]:
        """Every name, with the reason where it cannot be used; imports them all."""
        rows = [KnownName(name, "built-in", self._problem(name)) for name in self.built_ins]
        for offer in sorted(read_offers(self.group), key=str):
            is_hidden = offer.name in self.built_ins
            problem = f"hidden by kvferry's own {self.kind} of that name" if is_hidden else self._problem(offer.name)
            rows.append(KnownName(offer.name, str(offer), problem))
        return rows

    def _problem(self, name: str) -> str | None:
        try:
            self.find(name, self.kind)
        except ConfigError as error:
            return str(error)
        return None

    def _tell_of_hidden(self) -> None:
        """Once, and for all of them: looking takes as long as everything else of `find`."""
        if self._has_told:
            return
        self._has_told = True
        for offer in read_offers(self.group):
            if offer.name in self.built_ins:
                logger.warning("kvferry's own %s %r hides the %s", self.kind, offer.name, offer)


def _target(text: str) -> tuple[str, str]:
    module, _, attribute = text.partition(":")
    return module, attribute
