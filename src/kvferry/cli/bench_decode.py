"""`kvferry bench decode`: how fast the engine decodes at full context length, without computing any prompt."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvferry.cli import options as opt
from kvferry.cli.demo_report import new_figure
from kvferry.errors import ConfigError, HostError, install_hint

if TYPE_CHECKING:
    from kvferry.engine import LLM
    from kvferry.engine.model_loader import EngineModel

_TRANSFER = {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both", "kv_load_failure_policy": "fail"}
_WARM_UP_TOKENS = 4
_PERCENTILES = (50, 99)
_PACKAGES = ("kvferry", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class BatchResult:
    """Decoding steps of one batch size."""

    batch_size: int
    step_s: list[list[float]]
    """Seconds of each step, run by run; a step makes one token of each request."""

    @property
    def tokens_per_s(self) -> list[float]:
        """Of each run."""
        return [self.batch_size * len(steps) / sum(steps) for steps in self.step_s]

    def percentile_ms(self, percent: int) -> float:
        """The shortest time that so many per cent of all steps do not exceed."""
        ordered = sorted(step for steps in self.step_s for step in steps)
        return 1e3 * ordered[math.ceil(percent / 100 * len(ordered)) - 1]

    def as_dict(self) -> dict[str, Any]:
        """Figures, and every sample."""
        ms_per_step = {f"p{percent}": self.percentile_ms(percent) for percent in _PERCENTILES}
        return {**asdict(self), "tokens_per_s": self.tokens_per_s, "ms_per_step": ms_per_step}


def decode(
    context: typer.Context,
    model: opt.Model = "smollm2",
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Length of each request's context, in tokens; its KV is noise, not computed.")
    ] = 1024,
    output_tokens: Annotated[int, typer.Option(min=2, help="Number of tokens that each request decodes.")] = 32,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Number of requests that decode at the same time; may be repeated. 1, 4 and 16 by default."
        ),
    ] = None,
    runs: Annotated[
        int, typer.Option(min=1, help="Number of measured runs of each batch size, after one run to warm up.")
    ] = 3,
    block_size: opt.BlockSize = 16,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    num_threads: opt.NumThreads = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts and noise.")] = 0,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="File for every sample. No file by default."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="File for a picture of the figures. No file by default.")
    ] = None,
) -> None:
    """Measure decoding alone, without any prefill.

    The DecodeBenchConnector fills the KV of prompts with noise. The figures leave out the step that completes the
    prompts. The exit status is 2 when nothing could be measured.
    """
    try:
        import torch

        from kvferry.engine.config import EngineOptions
        from kvferry.engine.model_loader import load_model
    except ModuleNotFoundError as err:
        raise ConfigError(f"{err.name} is not installed: {install_hint('engine')}") from err
    if plot is not None:
        new_figure((1, 1))  # says what is missing before the work, not after it
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    engine: dict[str, Any] = {name: context.params[name] for name in ("block_size", "dtype", "device", "seed")}
    EngineOptions(**engine)  # wrong ones are told before the model is loaded
    console, load_before = Console(), os.getloadavg()
    loaded = load_model(model, dtype, device)
    results = measure(loaded, engine, (prompt_tokens, output_tokens), batch_size or [1, 4, 16], runs, console)
    about = {
        **{name: context.params[name] for name in ("model", "prompt_tokens", "output_tokens", *engine)},
        "num_threads": torch.get_num_threads(),
        "num_cpus": os.cpu_count(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "load_average_before": load_before,
        "load_average": os.getloadavg(),
    }
    print_results(results, about, console)
    if json_path is not None:
        content = {"context": about, "results": [result.as_dict() for result in results]}
        json_path.write_text(json.dumps(content, indent=2) + "\n")
    if plot is not None:
        write_plot(results, prompt_tokens, plot)


def measure(
    model: EngineModel, engine: dict[str, Any], tokens: tuple[int, int], sizes: list[int], runs: int, console: Console
) -> list[BatchResult]:
    """Decode `tokens` (prompt, output) in batches of these sizes; `engine`: block_size and seed, and more for `LLM`.

    Raises ConfigError for settings that are wrong, HostError when the engine did not decode as it was to.
    """
    from kvferry.engine import LLM

    (num_prompt, num_output), block_size, most = tokens, engine["block_size"], max(sizes)
    if num_prompt + num_output > model.max_model_len:
        raise ConfigError(
            f"--prompt-tokens {num_prompt} and --output-tokens {num_output} are more together than the "
            f"{model.max_model_len} tokens this model can attend to"
        )
    transfer = {**_TRANSFER, "kv_connector_extra_config": {"seed": engine["seed"]}}
    limits = {
        "max_num_seqs": most,
        "max_num_batched_tokens": max(512, most),  # the last tokens of all prompts in one step
        "num_kv_blocks": 1 + most * -(-(num_prompt + num_output) // block_size),
        "max_model_len": num_prompt + num_output,
    }
    with (
        LLM(model, kv_transfer_config=transfer, enable_prefix_caching=False, **limits, **engine) as llm,
        Progress(console=console, transient=True) as progress,
    ):
        task = progress.add_task("decoding", total=len(sizes) * (1 + runs))
        results = []
        for size in sizes:
            steps: list[list[float]] = []
            for run in range(1 + runs):
                progress.update(task, description=f"batch {size}: {f'run {run} of {runs}' if run else 'warm-up'}")
                rng = random.Random(f"{engine['seed']} {run}")
                prompts = [[rng.randrange(model.vocab_size) for _ in range(num_prompt)] for _ in range(size)]
                steps.append(_run(llm, prompts, num_output if run else min(_WARM_UP_TOKENS, num_output)))
                progress.advance(task)
            results.append(BatchResult(size, steps[1:]))
    return results


def _run(llm: LLM, prompts: list[list[int]], num_output: int) -> list[float]:
    """Seconds of each decoding step of one batch."""
    from kvferry.engine.config import RequestOutputKind, SamplingParams

    only_end = RequestOutputKind.FINAL_ONLY
    params = SamplingParams(max_tokens=num_output, temperature=0, ignore_eos=True, output_kind=only_end)
    for prompt in prompts:
        llm.add_request(prompt, params)
    outputs, seconds = llm.step(), []
    while llm.has_unfinished_requests():
        started_s = time.perf_counter()
        outputs += llm.step()
        seconds.append(time.perf_counter() - started_s)
    claim = len(prompts[0]) - 1
    if len(seconds) != num_output - 1 or any(output.num_external_tokens != claim for output in outputs):
        raise HostError(
            f"a batch of {len(prompts)} took {len(seconds)} decoding steps instead of {num_output - 1}, or its prompts "
            f"were computed: {llm.counters}"
        )
    return seconds


def print_results(results: list[BatchResult], context: dict[str, Any], console: Console) -> None:
    """A table, and how busy the machine was."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("batch", "tokens/s", "from", "to", "ms/step p50", "p99"):
        table.add_column(heading, justify="right")
    for result in results:
        rates, times = result.tokens_per_s, [result.percentile_ms(percent) for percent in _PERCENTILES]
        figures = (statistics.median(rates), min(rates), max(rates), *times)
        table.add_row(str(result.batch_size), *(f"{figure:.1f}" for figure in figures))
    console.print(table)
    before, after = context["load_average_before"][0], context["load_average"][0]
    console.print(
        f"{context['model']}, {context['prompt_tokens']} tokens of context; median of {len(results[0].step_s)} runs of "
        f"{len(results[0].step_s[0])} steps, {context['num_threads']} threads; load average {before:.2f} before and "
        f"{after:.2f} after, on {context['num_cpus']} cores",
        highlight=False,
    )


def write_plot(results: list[BatchResult], prompt_tokens: int, path: Path) -> None:
    """Tokens/s and ms/step over the batch size as a PNG. ConfigError when matplotlib is missing."""
    figure = new_figure((8, 3.5))
    figure.suptitle("Decoding alone, by the number of requests that decode at once", fontsize=11)
    rate, step = figure.subplots(1, 2)
    sizes = [result.batch_size for result in results]
    rate.plot(sizes, [statistics.median(result.tokens_per_s) for result in results], "o-")
    rate.set_ylabel("tokens/s, median of the runs")
    for percent in _PERCENTILES:
        label = f"{percent} % of the steps take no longer"
        step.plot(sizes, [result.percentile_ms(percent) for result in results], "o-", label=label)
    step.set_ylabel("ms per step")
    step.legend(frameon=False)
    for axes in (rate, step):
        axes.set_xticks(sizes)
        axes.set_xlabel(f"requests, {prompt_tokens} tokens of context each")
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=130)
