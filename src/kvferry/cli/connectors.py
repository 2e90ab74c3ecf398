"""`kvferry connectors`: every connector that may be named here, and why one of them cannot be used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from kvferry.contract.factory import KVConnectorFactory
from kvferry.contract.plugins import KnownName, Registry
from kvferry.contract.resolver import KnownConnector


def connectors(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False) -> None:
    """List the connectors that kv_connector may name.

    Connectors are built in, registered, or entry points of installed packages. The list names a connector that cannot
    be used with the reason and the remedy; the exit status is 0 then too.
    """
    with contextlib.redirect_stdout(sys.stderr):  # what modules print while they are imported is no part of the list
        known = KVConnectorFactory.known_connectors()
    if as_json:
        typer.echo(json.dumps([_as_dict(connector) for connector in known], indent=2))
    else:
        _print_list(known, Console())


def _as_dict(connector: KnownConnector) -> dict[str, Any]:
    target, resolved = connector.target, connector.resolved
    row: dict[str, Any] = {
        "name": target.name,
        "origin": target.origin.value,
        "available": resolved is not None,
        "description": connector.description,
        "module": target.module,
        "class": target.class_name,
        "version": target.version,
    }
    if resolved is None:
        return {**row, "problem": connector.problem}
    capabilities = {
        "supports_hma": resolved.capabilities.supports_hma,
        "supports_v2_model_runner": resolved.capabilities.supports_v2_model_runner,
        "connector_api": list(resolved.capabilities.connector_api),
    }
    row |= {"version": resolved.version, "file": resolved.file, "capabilities": capabilities}
    for registry in _registries(connector):
        row[f"{registry.kind}s"] = [dataclasses.asdict(part) for part in registry.known()]
    return row


def _print_list(known: list[KnownConnector], console: Console) -> None:
    for connector in known:
        target, resolved = connector.target, connector.resolved
        version = resolved.version if resolved is not None else target.version
        console.print(Text(f"{target.name}  ({target.origin.value} {version or '-'})", style="bold"), soft_wrap=True)
        if resolved is None:
            what = f"unavailable: {connector.problem}"
        else:
            able = resolved.capabilities
            hybrid, runner = _yes_no(able.supports_hma), _yes_no(able.supports_v2_model_runner)
            what = f"{connector.description}\nhybrid KV caches: {hybrid}; second model runner: {runner}"
            for registry in _registries(connector):
                what += f"\n{registry.kind}s: {', '.join(map(_part, registry.known()))}"
        console.print(Padding(Text(what), (0, 0, 1, 4)))


def _registries(connector: KnownConnector) -> Sequence[Registry]:
    """Of the parts that its settings may name; none for one that cannot be used."""
    sides = getattr(connector.resolved and connector.resolved.connector_class, "sides", None)
    return sides[0].registries if sides is not None else ()


def _part(part: KnownName) -> str:
    if part.problem is not None:
        return f"{part.name} (unavailable: {part.problem})"
    return part.name if part.origin == "built-in" else f"{part.name} ({part.origin})"


def _yes_no(value: bool | None) -> str:
    return "as configured" if value is None else "yes" if value else "no"
