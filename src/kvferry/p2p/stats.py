"""What a P2P connector counts, for `ConnectorStats`. Media are the transports; jobs are counted per worker."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kvferry.contract.stats import ConnectorStats, MediumStats
from kvferry.p2p.step_messages import RankReport
from kvferry.p2p.transports.transport import TransferOp, TransferStatus

MEDIUM = "p2p"


@dataclass(slots=True)
class P2PCounters:
    """Totals since start."""

    media: dict[str, MediumStats] = field(default_factory=dict)
    hit_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def count(self, job: RankReport, op: TransferOp) -> None:
        """A job ended on one worker."""
        if op is TransferOp.WRITE and job.status is not TransferStatus.OK:
            self.failures["store TransferError"] += 1
        for name, num_bytes in job.num_bytes.items():
            medium = self.media.setdefault(name, MediumStats())
            if op is TransferOp.READ:
                medium.num_loads += 1
                medium.loaded_bytes += num_bytes
                medium.load_s += job.seconds
            else:
                medium.num_stores += 1
                medium.stored_bytes += num_bytes
                medium.store_s += job.seconds

    def stats(self, held_blocks: int, oldest_held_s: float) -> ConnectorStats:
        """As hosts export it."""
        failures = MediumStats(failures={reason: count for reason, count in self.failures.items() if count})
        return ConnectorStats(
            media={**self.media, MEDIUM: failures},
            hit_tokens={MEDIUM: self.hit_tokens},
            held_blocks=held_blocks,
            oldest_held_s=oldest_held_s,
        )
