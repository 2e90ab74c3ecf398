"""Pictures of benchmarks are drawn from the committed results, and can be read by who did not make them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.container import BarContainer
from matplotlib.text import Text

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
NAMES = [*sorted(path.stem for path in RESULTS.glob("*.png")), "demo"]


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plots", ROOT / "bench" / "plots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def texts(figure: Any) -> str:
    """All words of a picture."""
    figure.canvas.draw()  # makes the texts of ticks
    ticks = [text for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    return "\n".join(text.get_text() for text in [*figure.findobj(Text), *ticks])


def test_all_pictures_can_be_drawn_again(plots: ModuleType) -> None:
    assert sorted(plots.FIGURES) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_has_title_and_labels_and_no_bars_on_a_log_axis(plots: ModuleType, name: str) -> None:
    figure = plots.FIGURES[name](result(name))
    figure.canvas.draw()
    assert len(figure.get_suptitle().split()) > 4
    assert len(figure.axes) >= 1
    for axes in figure.axes:
        assert axes.get_xlabel() or axes.get_ylabel()
        has_bars = any(isinstance(container, BarContainer) for container in axes.containers)
        assert not (has_bars and "log" in (axes.get_xscale(), axes.get_yscale()))
    assert any(axes.get_legend() is not None for axes in figure.axes)


def test_first_hits_are_shown(plots: ModuleType) -> None:
    content = result("vllm")
    figure = plots.FIGURES["vllm"](content)
    for axes, size in zip(figure.axes, content["summary"]["median_s"]["host"], strict=True):
        drawn = sorted(float(x) for line in axes.lines for x in line.get_xdata())
        first_ms = [1000 * by_size[size] for by_size in content["summary"]["first_hits_median_s"].values()]
        all_ms = [1000 * by_size[size] for by_size in content["summary"]["median_s"].values()]
        assert drawn == pytest.approx(sorted(first_ms + all_ms))
    assert "first hit" in texts(figure)
    assert "first hand-over" in texts(plots.FIGURES["p2p_handover"](result("p2p_handover")))


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_picture_is_one(name: str) -> None:
    path = ROOT / "docs" / "images" / "demo.png" if name == "demo" else RESULTS / f"{name}.png"
    assert path.read_bytes().startswith(b"\x89PNG")
