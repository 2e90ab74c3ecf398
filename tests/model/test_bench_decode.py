"""`kvferry bench decode` on a tiny model: only decoding is counted, at the context that was asked for."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvferry.cli.bench_decode import BatchResult, measure
from kvferry.cli.main import app
from kvferry.errors import ConfigError, HostError
from kvferry.testing.stub_model import StubModel

ENGINE = {"block_size": 16, "seed": 0}


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "decode", *map(str, arguments)])


def test_command(tiny_llama, tmp_path):
    done = bench(
        "--model", tiny_llama, "--prompt-tokens", 200, "--output-tokens", 6, "--batch-size", 1, "--batch-size", 3,
        "--runs", 2, "--num-threads", 1, "--json", tmp_path / "b.json", "--plot", tmp_path / "b.png",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if re.match(r" +[13] ", line)]
    report = json.loads((tmp_path / "b.json").read_text())
    for row, result, size in zip(rows, report["results"], (1, 3), strict=True):
        steps = result["step_s"]
        assert result["batch_size"] == size
        assert [len(run) for run in steps] == [5, 5]
        rates = [size * 5 / sum(run) for run in steps]
        assert result["tokens_per_s"] == pytest.approx(rates)
        ordered = sorted(steps[0] + steps[1])
        figures = [sum(rates) / 2, min(rates), max(rates), 1e3 * ordered[4], 1e3 * ordered[9]]
        assert row == [str(size), *(f"{figure:.1f}" for figure in figures)]
    assert report["context"]["prompt_tokens"] == 200
    assert len(report["context"]["load_average_before"]) == 3
    assert {"python", "kvferry", "torch", "transformers"} == set(report["context"]["versions"])
    assert f"load average {report['context']['load_average_before'][0]:.2f} before" in " ".join(done.output.split())
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_prompts_are_not_computed_and_steps_are_of_the_whole_batch(monkeypatch):
    batches = []
    forward = StubModel.forward

    def spy(self, batch, kv, hooks):
        batches.append((len(batch.sequences), len(batch.input_ids), max(s.kv_tokens for s in batch.sequences)))
        return forward(self, batch, kv, hooks)

    monkeypatch.setattr(StubModel, "forward", spy)
    (result,) = measure(StubModel(), ENGINE, (100, 6), [4], 2, Console(file=io.StringIO()))
    run = [(4, 4, 100), *((4, 4, 101 + i) for i in range(5))]  # 99 of 100 tokens are made up
    assert batches == run[:4] + run + run
    assert [len(steps) for steps in result.step_s] == [5, 5]


def test_percentiles_are_nearest_ranks():
    result = BatchResult(2, [[0.003, 0.001], [0.002, 0.004]])
    assert (result.percentile_ms(50), result.percentile_ms(99), result.percentile_ms(1)) == (2.0, 4.0, 1.0)
    assert result.tokens_per_s == pytest.approx([1000.0, 4 / 0.006])


def test_a_connector_that_claims_nothing_is_found_out(monkeypatch):
    from kvferry.examples.decode_bench import DecodeBenchSchedulerSide

    monkeypatch.setattr(DecodeBenchSchedulerSide, "get_num_new_matched_tokens", lambda *args: (0, False))
    with pytest.raises(HostError, match="prompts were computed"):
        measure(StubModel(), ENGINE, (100, 6), [2], 1, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--prompt-tokens", 510, "--output-tokens", 3], "more together than the 512 tokens this model can attend to"),
        (["--dtype", "float31"], "dtype='float31' is not one of"),
        (["--device", "tpu"], "device='tpu' is not"),
        (["--model", "/nowhere"], "there is no /nowhere"),
    ],
)
def test_wrong_settings(tiny_llama, arguments, text):
    done = bench("--model", tiny_llama, "--batch-size", 1, *arguments)
    assert isinstance(done.exception, ConfigError)
    assert text in str(done.exception)


@pytest.mark.parametrize("arguments", [["--runs", 0], ["--output-tokens", 1], ["--batch-size", 0]])
def test_wrong_numbers(arguments):
    assert bench(*arguments).exit_code == 2


def test_a_missing_matplotlib_is_told_before_the_work(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    done = bench("--model", "/nowhere", "--plot", tmp_path / "b.png")
    assert "pip install 'matplotlib" in str(done.exception)
