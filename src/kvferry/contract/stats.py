"""What every connector counts, in one vocabulary: totals since start, so that a lost or repeated report harms nobody.

`get_kv_connector_stats` of kvferry's connectors returns a `ConnectorStats`, on the side that knows. Hosts export it as
`kvferry:connector_*` metrics (metrics.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class MediumStats:
    """One place to and from which KV moves: host memory, a tier, a peer. Moves are whole chunks or blocks."""

    num_loads: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0
    num_stores: int = 0
    stored_bytes: int = 0
    store_s: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    """Reason ("load TierCorrupt") -> times."""
    num_evicted: int = 0
    num_dropped: int = 0
    """Stores given up for lack of room or time."""
    used_bytes: int = 0
    """Now."""
    capacity_bytes: int | None = None
    """Now; None: unbounded or unknown."""
    is_up: bool = True
    """Now; False from a refused write on until the medium can be written to again."""


@dataclass(slots=True)
class ConnectorStats:
    """One connector instance."""

    media: dict[str, MediumStats] = field(default_factory=dict)
    """By name: "host", "fs", ..."""
    hit_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens loaded for requests, by the medium that had them."""
    fallbacks: dict[str, int] = field(default_factory=dict)
    """Reason -> times the connector gave up on something it could have had, so that the host computed it."""
    held_blocks: int = 0
    """Blocks of the host that this connector keeps from being handed out, now."""
    oldest_held_s: float = 0.0
    """Age of the oldest of them, in seconds."""
    children: dict[str, ConnectorStats] = field(default_factory=dict)
    """MultiConnector: by the child's label; its own figures stay empty."""

    def media_down(self) -> list[str]:
        """Names of media that cannot be written to now, the children's as `label/medium`."""
        down = [name for name, medium in self.media.items() if not medium.is_up]
        return down + [f"{label}/{name}" for label, child in self.children.items() for name in child.media_down()]
