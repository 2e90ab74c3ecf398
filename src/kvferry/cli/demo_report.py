"""What the demo measured, as a table with bars, as JSON and as a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from kvferry.errors import ConfigError, install_hint

if TYPE_CHECKING:
    from rich.console import Console

_BAR_CELLS = 40
_COLOURS = {
    "cold": "blue", "host": "green", "disk": "yellow", "corrupt": "red", "recomputed": "blue", "handed over": "magenta",
}  # fmt: skip
_EXPLAINED = {
    "cold": "cold: nothing is stored",
    "host": "host: KV from host memory",
    "disk": "disk: KV from disk, after SIGKILL",
    "corrupt": "corrupt: one stored byte flipped",
    "recomputed": "recomputed by a second engine",
    "handed over": "handed over to the second engine",
}
_PLOT_COLOURS = ("#3b6ea8", "#4a9a5b", "#c9a227", "#b5483a", "#3b6ea8", "#8a5aa3")


@dataclass(frozen=True, slots=True)
class Act:
    """One question asked, and what its answer was held against."""

    name: str
    """cold, host, disk or corrupt."""
    ttft_s: float
    limit_s: float
    """Bytes moved / measured rate + measured prefill of what had to be computed."""
    prompt_tokens: int
    tokens_from_host: int
    tokens_from_disk: int
    tokens_computed: int
    kv_bytes_equal: bool
    """Loaded blocks equal the cold pool's; in the cold act: stored chunks equal the pool."""
    tokens_equal: bool
    """Equal to an engine without connector and prefix cache."""


@dataclass(frozen=True, slots=True)
class HandoverResult:
    """One prompt, prefilled by one engine process and decoded by another. Times are to the first token."""

    ttft_s: float
    """In the decode engine, from the arrival of the request; the engines' first meeting included."""
    limit_s: float
    """Bytes moved / measured copy rate."""
    recompute_ttft_s: float
    """In the same engine, which computes the prompt itself."""
    prefill_s: float
    """In the prefill engine."""
    prompt_tokens: int
    tokens_from_peer: int
    kv_bytes_per_token: int
    kv_bytes_equal: bool
    """All of the prompt's KV is equal in both engines' pools."""
    tokens_equal: bool
    """Equal to what the decode engine makes of the prompt alone."""


@dataclass(frozen=True, slots=True)
class Proof:
    """A claim the demo makes, and whether it held."""

    held: bool
    claim: str


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Everything a run found."""

    acts: list[Act]
    handover: HandoverResult
    proofs: list[Proof]
    context: dict[str, Any]
    """Versions, model, sizes and rates the limits were computed from."""

    @property
    def held(self) -> bool:
        """True when every proof held."""
        return all(proof.held for proof in self.proofs)

    def write_json(self, path: Path) -> None:
        """`{"acts": [...], "handover": {...}, "proofs": [...], "context": {...}}`."""
        content = {
            "acts": [asdict(act) for act in self.acts],
            "handover": asdict(self.handover),
            "proofs": [asdict(proof) for proof in self.proofs],
            "context": self.context,
        }
        path.write_text(json.dumps(content, indent=2) + "\n")

    def print(self, console: Console) -> None:
        """The proofs, then the table, then a bar for each time; `|` on a bar is the limit."""
        for proof in self.proofs:
            verdict = ("held  ", "green") if proof.held else ("FAILED", "bold red")
            console.print(Text.assemble("  ", verdict, "  ", proof.claim), soft_wrap=True)
        console.print(self._table())
        bars = self._bars()
        longest_s = max(ttft_s for _, ttft_s, _ in bars)
        for name, ttft_s, limit_s in bars:
            bar = _bar(ttft_s, limit_s, longest_s, _COLOURS[name])
            console.print(Text.assemble(f"  {name:>11}  ", bar, f"  {ttft_s:.2f} s"))
        console.print("  time to first token; | is the limit it is held against.", style="dim", highlight=False)
        handed = self.handover
        console.print(
            f"  recomputed, handed over: {handed.prompt_tokens} tokens in a second engine, one thread; "
            f"{handed.recompute_ttft_s / handed.ttft_s:.0f}x",
            style="dim", highlight=False,
        )  # fmt: skip

    def _bars(self) -> list[tuple[str, float, float | None]]:
        """(name, time, limit if it has one)."""
        handed = self.handover
        return [
            *((act.name, act.ttft_s, act.limit_s) for act in self.acts),
            ("recomputed", handed.recompute_ttft_s, None),
            ("handed over", handed.ttft_s, handed.limit_s),
        ]

    def _table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        table.add_column("act")
        for heading in ("seconds", "limit", "gain", "tokens", "host", "disk", "computed", "KV", "answer"):
            table.add_column(heading, justify="right", no_wrap=True)
        for act in self.acts:
            table.add_row(
                Text(act.name, style=_COLOURS[act.name]),
                f"{act.ttft_s:.3f}",
                f"{act.limit_s:.3f}",
                f"{self.acts[0].ttft_s / act.ttft_s:.1f}x",
                str(act.prompt_tokens),
                str(act.tokens_from_host),
                str(act.tokens_from_disk),
                str(act.tokens_computed),
                "equal" if act.kv_bytes_equal else "DIFFERS",
                "equal" if act.tokens_equal else "DIFFERS",
            )
        return table

    def write_plot(self, path: Path) -> None:
        """`figure` as a PNG. ConfigError when matplotlib is missing."""
        self.figure().savefig(path, dpi=120)

    def figure(self) -> Any:
        """The bars and their limits. ConfigError when matplotlib is missing."""
        figure = new_figure((9, 4.2))
        figure.suptitle("kvferry demo: time to the first token of a question about a document", fontsize=11)
        axes = figure.subplots()
        handed = self.handover
        for row, (name, ttft_s, limit_s) in enumerate(self._bars()):
            tokens = self.acts[row].prompt_tokens if row < len(self.acts) else handed.prompt_tokens
            axes.barh(f"{_EXPLAINED[name]}\n({tokens} tokens)", ttft_s, color=_PLOT_COLOURS[row])
            if limit_s is not None:
                label = None if row else "limit: bytes / measured rate + measured prefill of the rest"
                axes.plot([limit_s] * 2, [row - 0.42, row + 0.42], color="black", label=label)
            axes.text(max(ttft_s, limit_s or 0.0), row, f"  {ttft_s:.2f} s", verticalalignment="center")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("seconds")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right", fontsize=9)
        return figure


def new_figure(inches: tuple[float, float]) -> Any:
    """An empty matplotlib figure. ConfigError when matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError(f"--plot needs matplotlib: {install_hint('plot')}") from None
    return Figure(figsize=inches, layout="constrained")


def _bar(ttft_s: float, limit_s: float | None, longest_s: float, colour: str) -> Text:
    """A bar of `_BAR_CELLS` cells for `longest_s` (longer times are cut), with the limit marked if there is one."""
    filled = max(1, min(_BAR_CELLS, round(ttft_s / longest_s * _BAR_CELLS)))
    text = Text("█" * filled + " " * (_BAR_CELLS - filled), style=colour)
    if limit_s is None:
        return text
    mark = min(_BAR_CELLS - 1, round(limit_s / longest_s * _BAR_CELLS))
    return Text.assemble(text[:mark], ("|", "bold reverse"), text[mark + 1 :])
