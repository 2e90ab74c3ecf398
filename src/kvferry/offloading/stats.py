"""What the OffloadingConnector counts, and how it is told in the vocabulary of all connectors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from kvferry.contract.stats import ConnectorStats, MediumStats
from kvferry.offloading.messages import CopyJob, CopyReport
from kvferry.offloading.store.tier import TierStats
from kvferry.offloading.store.tiered import HOST, StoreStats, TierTraffic


@dataclass(slots=True)
class OffloadingCounters:
    """Totals since start, beside those of the store."""

    num_lookups: int = 0
    stored_chunks: int = 0
    dropped_stores: int = 0
    failed_loads: int = 0
    failed_stores: int = 0
    stalled_waits: int = 0
    hit_tokens: Counter[str] = field(default_factory=Counter)
    """Tokens loaded for requests, by the medium that had them."""
    copies: MediumStats = field(default_factory=MediumStats)
    """Copies between the engine's blocks and host memory, as the workers report them; of one worker each."""

    def add_copies(self, job: CopyJob, report: CopyReport, block_bytes: tuple[int, ...], *, is_load: bool) -> None:
        """Take one worker's report in; `block_bytes` are the bytes of one block of each group."""
        copies = self.copies
        num_bytes = num_copies = 0
        for part, digest in zip(job.parts, report.digests, strict=True):
            if digest is not None:
                num_copies += 1
                num_bytes += len(part.block_ids) * block_bytes[part.group_id]
        if num_copies < len(job.parts):
            reason = f"{'load' if is_load else 'store'} {(report.error or 'unknown').partition(':')[0]}"
            copies.failures[reason] = copies.failures.get(reason, 0) + len(job.parts) - num_copies
        if is_load:
            copies.num_loads += num_copies
            copies.loaded_bytes += num_bytes
            copies.load_s += report.seconds
        else:
            copies.num_stores += num_copies
            copies.stored_bytes += num_bytes
            copies.store_s += report.seconds

    def told(self, store: StoreStats, held_blocks: int, oldest_held_s: float) -> ConnectorStats:
        """All of it, in the common vocabulary. O(tiers)."""
        host = replace(
            self.copies,
            failures=dict(self.copies.failures),
            num_evicted=store.num_evicted,
            num_dropped=self.dropped_stores,
            used_bytes=(store.num_slots - store.num_free_slots) * store.slot_bytes,
            capacity_bytes=store.num_slots * store.slot_bytes,
        )
        tiers = {name: _tier(store.traffic[name], stats) for name, stats in store.tiers.items()}
        return ConnectorStats(
            media={HOST: host, **tiers},
            hit_tokens={medium: self.hit_tokens[medium] for medium in (HOST, *tiers)},
            fallbacks={
                "stalled wait": self.stalled_waits,
                "failed load": self.failed_loads,
                "failed store": self.failed_stores,
                "dropped store": self.dropped_stores,
            },
            held_blocks=held_blocks,
            oldest_held_s=oldest_held_s,
        )


def _tier(traffic: TierTraffic, stats: TierStats) -> MediumStats:
    return MediumStats(
        num_loads=traffic.num_loaded,
        loaded_bytes=traffic.loaded_bytes,
        load_s=traffic.load_s,
        num_stores=traffic.num_stored,
        stored_bytes=traffic.stored_bytes,
        store_s=traffic.store_s,
        failures=dict(traffic.failures),
        num_evicted=stats.num_evicted,
        num_dropped=traffic.num_dropped,
        used_bytes=stats.used_bytes,
        capacity_bytes=stats.max_bytes,
        is_up=stats.is_up,
    )
