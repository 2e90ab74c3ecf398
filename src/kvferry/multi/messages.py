"""What the two sides of a MultiConnector tell each other, and events that name their child. Plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from kvferry.contract.base import KVConnectorHandshakeMetadata, KVConnectorMetadata, KVConnectorWorkerMetadata
from kvferry.errors import ContractError


@dataclass(slots=True)
class MultiMetadata(KVConnectorMetadata):
    """One step's orders: each child's own, and what the workers must know to count completions."""

    children: tuple[Any, ...] = ()
    """By child; None: no orders, because the child is switched off or failed to give them."""
    new_req_ids: tuple[str, ...] = ()
    ended: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Requests that ended since the last step -> children that promised to report them as sent."""
    async_loads: dict[str, int] = field(default_factory=dict)
    """Loads that begin now and end with `finished_recving` -> child."""
    sync_loads: dict[int, set[int]] = field(default_factory=dict)
    """Child -> blocks it must fill before they are read in this step."""
    switched_off: frozenset[int] = frozenset()


@dataclass(slots=True)
class ChildReport:
    """What one child reported in a step, on one or more ranks."""

    sent: Counter[str] = field(default_factory=Counter)
    """Request id -> ranks on which its send ended."""
    received: Counter[str] = field(default_factory=Counter)
    failed: set[str] = field(default_factory=set)
    events: list[Any] = field(default_factory=list)
    """The child's answers as they came, one per rank that had any."""
    worker_meta: Any = None
    num_errors: int = 0
    """Hooks that raised since the last report."""
    num_broken_answers: int = 0
    is_off: bool = False
    num_closed_ranks: int = 0
    """Ranks on which the child, switched off, was shut down in this step."""

    def is_empty(self) -> bool:
        """True when there is nothing to tell."""
        return self == ChildReport()

    def merged(self, other: ChildReport) -> ChildReport:
        """Both ranks' reports."""
        metas = [meta for meta in (self.worker_meta, other.worker_meta) if meta is not None]
        return ChildReport(
            self.sent + other.sent,
            self.received + other.received,
            self.failed | other.failed,
            self.events + other.events,
            metas[0].aggregate(metas[1]) if len(metas) == 2 else next(iter(metas), None),
            self.num_errors + other.num_errors,
            self.num_broken_answers + other.num_broken_answers,
            self.is_off or other.is_off,
            self.num_closed_ranks + other.num_closed_ranks,
        )


@dataclass(slots=True)
class MultiWorkerMetadata(KVConnectorWorkerMetadata):
    """One step's reports, by child."""

    children: tuple[ChildReport, ...]
    unproved_block_ids: set[int] = field(default_factory=set)
    """Blocks of synchronous loads that broke off: what this step computed from them is worthless."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> MultiWorkerMetadata:
        """Both ranks' reports. ContractError when the other rank runs something else."""
        if not isinstance(other, MultiWorkerMetadata) or len(other.children) != len(self.children):
            raise ContractError("all ranks must run a MultiConnector with the same children")
        children = tuple(a.merged(b) for a, b in zip(self.children, other.children, strict=True))
        return MultiWorkerMetadata(children, self.unproved_block_ids | other.unproved_block_ids)


@dataclass(frozen=True, slots=True)
class MultiHandshake(KVConnectorHandshakeMetadata):
    """One worker's handshake metadata by child's label; children without any are left out."""

    children: dict[str, KVConnectorHandshakeMetadata]


@dataclass(frozen=True, slots=True)
class SourcedEvent:
    """A KV event that has no place for its source, with the label of the child it came from."""

    source: str
    event: Any


def with_source(event: Any, label: str) -> Any:
    """The event with the child's label as its source; events of nested connectors get the whole path, `outer/inner`.

    A dataclass with a field `source` is copied with that field set; anything else is put into a SourcedEvent.
    """
    if "source" in getattr(event, "__dataclass_fields__", ()):
        return replace(event, source=source_path(label, event.source))
    return SourcedEvent(label, event)


def source_path(label: str, inner: str | None) -> str:
    """`label`, or `label/inner` when a nested connector has named the source already."""
    return f"{label}/{inner}" if inner else label


def as_events(answer: Any) -> list[Any]:
    """A child's answer as a list: none, several, or one object of the child's own kind."""
    if answer is None:
        return []
    return list(answer) if isinstance(answer, Iterable) else [answer]
