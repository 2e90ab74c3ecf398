"""The `kvferry` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import kvferry
from kvferry.cli import options as opt
from kvferry.cli.bench_decode import decode
from kvferry.cli.connectors import connectors
from kvferry.cli.demo import DemoOptions, run_demo, three_questions
from kvferry.cli.doctor import doctor
from kvferry.cli.explain import explain
from kvferry.cli.proxy import proxy
from kvferry.cli.serve import serve
from kvferry.cli.vllm import vllm
from kvferry.errors import KVFerryError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its table cuts names of options off at 80 columns
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvferry {kvferry.__version__}")
        raise typer.Exit


@app.callback()
def _kvferry(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Move KV caches between an LLM engine, memory, disks and other engines."""


@app.command()
def demo(
    model: opt.Model = "smollm2",
    document: Annotated[
        Path | None,
        typer.Option(help="Text file that the questions are about. By default a text that comes with kvferry."),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(
            help="Question about the document; may be repeated, up to three times, for the cold, host and disk acts. "
            "By default three questions about the text that comes with kvferry."
        ),
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="File for the figures. No file by default."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="File for a picture of the figures. No file by default."),
    ] = None,
    host_bytes: Annotated[int, opt.size_option("Host memory for KV.", default="1GiB")] = 1 << 30,
) -> None:
    """Show how much time stored KV saves.

    One engine computes a prompt. Later requests load its KV from host memory, from disk after a SIGKILL, and with one
    byte flipped. Last, one engine process computes a prompt and another decodes.

    The exit status is 0 when every proof held, 1 when one failed, 2 when the demo could not run.
    """
    console = Console()
    options = DemoOptions(model, document, host_bytes, three_questions(question or ()))
    report = run_demo(options, console)
    report.print(console)
    if json_path is not None:
        report.write_json(json_path)
    if plot is not None:
        report.write_plot(plot)
    raise typer.Exit(0 if report.held else 1)


app.command()(serve)
app.command()(proxy)
app.command()(connectors)
app.command()(doctor)
app.command()(explain)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)(vllm)
bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure parts of the engine.")
bench.command()(decode)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point: errors of kvferry's own are one clear line, and exit status 2."""
    try:
        app()
    except KVFerryError as error:
        Console(stderr=True).print(f"kvferry: {error}", style="bold red", markup=False, highlight=False)
        sys.exit(2)
