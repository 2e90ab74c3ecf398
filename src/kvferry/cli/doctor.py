"""`kvferry doctor`: what an engine with these settings would decide, hold and lack."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from kvferry.cli import options as opt
from kvferry.config import transfer_config
from kvferry.errors import ConfigError, install_hint

if TYPE_CHECKING:
    from kvferry.cli.diagnosis import Diagnosis


def doctor(
    context: typer.Context,
    model: opt.Model = "smollm2",
    kv_transfer_config: opt.TransferConfig = None,
    kv_offloading_size: opt.OffloadingSize = None,
    kv_offloading_backend: opt.OffloadingBackend = None,
    max_model_len: opt.MaxModelLen = None,
    max_num_seqs: opt.MaxNumSeqs = 64,
    max_num_batched_tokens: opt.MaxNumBatchedTokens = 512,
    block_size: opt.BlockSize = 16,
    num_kv_blocks: opt.NumKVBlocks = None,
    kv_cache_bytes: opt.KVCacheBytes = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    use_v2_model_runner: opt.V2Runner = None,
    v2_model_architectures: opt.V2Architectures = None,
    disable_hybrid_kv_cache_manager: opt.DisableHybrid = None,
    kv_cache_layout: opt.KVCacheLayout = "auto",
    kernel_block_size: opt.KernelBlockSize = None,
    hidden_state_layers: opt.HiddenStateLayers = None,
    host: Annotated[
        opt.Host,
        typer.Option(
            help="Host whose start the command judges: kvferry's embedded engine, or vLLM with kvferry's connectors."
        ),
    ] = opt.Host.EMBEDDED,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show what an engine with these settings would decide, and why.

    The command loads no weights and opens no store.

    The exit status is 0 when no problem was found, 1 when this machine lacks something (the output names the remedy), 2
    when the settings are wrong on every machine.
    """
    transfer = transfer_config(kv_transfer_config, kv_offloading_size, kv_offloading_backend)
    try:
        from kvferry.cli.diagnosis import diagnose
        from kvferry.engine.config import EngineOptions
        from kvferry.engine.model_facts import read_model_facts
    except ModuleNotFoundError as err:
        raise ConfigError(f"{err.name} is not installed: {install_hint('engine')}") from err
    settings = {name: context.params[name] for name in opt.ENGINE_OPTIONS}
    options = EngineOptions(**settings, hidden_state_layers=tuple(hidden_state_layers or ()))
    facts = read_model_facts(model, dtype, any_architecture=host is opt.Host.VLLM)
    diagnosis = diagnose(facts, options, transfer, host)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(diagnosis), indent=2))
    else:
        _print(diagnosis, Console())
    raise typer.Exit(1 if diagnosis.problems else 0)


def _print(diagnosis: Diagnosis, console: Console) -> None:
    for finding in diagnosis.findings:
        console.print(f"{finding.topic}: {finding.value}", style="bold", markup=False, highlight=False)
        console.print(Padding(Text(finding.reason), (0, 0, 0, 4)))
        if finding.topic.startswith("connector"):
            console.print(Padding(Text(_listed(finding.details)), (0, 0, 0, 4)))
    console.print(f"environment: {_listed(diagnosis.environment)}", markup=False, highlight=False)
    for problem in diagnosis.problems:
        console.print(f"problem: {problem}", style="red", markup=False, highlight=False)
    if not diagnosis.problems:
        console.print("no problems found", style="green")


def _listed(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
