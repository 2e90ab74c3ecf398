"""`kvferry proxy`: the P/D router."""

from __future__ import annotations

import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from kvferry.config import read_secret
from kvferry.errors import ConfigError
from kvferry.proxy.config import ProxyConfig


def proxy(
    context: typer.Context,
    prefill: Annotated[list[str], typer.Option(metavar="URL", help="An engine that prefills; may be repeated.")],
    decode: Annotated[list[str], typer.Option(metavar="URL", help="An engine that decodes; may be repeated.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8100,
    strict: Annotated[
        bool, typer.Option(help="Answer an error rather than let a decode engine compute a prompt again.")
    ] = True,
    connect_timeout_s: Annotated[float, typer.Option(help="Longest time to reach an engine.")] = 2.0,
    prefill_timeout_s: Annotated[float, typer.Option(help="Longest time for a prefill.")] = 120.0,
    decode_timeout_s: Annotated[float, typer.Option(help="Longest silence of a stream.")] = 120.0,
    answer_timeout_s: Annotated[float, typer.Option(help="Longest time for an answer that is no stream.")] = 600.0,
    max_attempts: Annotated[int, typer.Option(help="Tries of a request, the first included.")] = 3,
    retry_deadline_s: Annotated[float, typer.Option(help="Nothing is tried again after so long.")] = 60.0,
    probe_interval_s: Annotated[
        float, typer.Option(help="Between tiny requests through each pair of engines; 0: none.")
    ] = 10.0,
    probe_timeout_s: Annotated[float, typer.Option(help="Longest time for each leg of them.")] = 10.0,
    probe_key_file: Annotated[
        Path | None, typer.Option(help="File with the API key for them; clients' own keys are passed on.")
    ] = None,
    shared_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the key of the engines' key_file: decode engines then trust whom the proxy names."
        ),
    ] = None,
    failure_threshold: Annotated[int, typer.Option(help="Failures in a row that take an engine out.")] = 3,
    min_backoff_s: Annotated[float, typer.Option(help="How long for, the first time; doubled each time.")] = 0.5,
    max_backoff_s: Annotated[float, typer.Option(help="How long for at most.")] = 30.0,
    prefix_memory_chunks: Annotated[
        int, typer.Option(help="Pieces of prompts (512 bytes) remembered per prefill engine.")
    ] = 100_000,
    max_body_bytes: Annotated[int, typer.Option(help="Largest request body.")] = 8 << 20,
    drain_timeout_s: Annotated[
        float, typer.Option(help="At SIGTERM, how long requests under way may take to end.")
    ] = 30.0,
) -> None:
    """Route requests over engines that prefill and engines that decode, as OpenAI's /v1/completions and chat.

    Also /v1/models, /health, /ready (transfers work) and /metrics (Prometheus). The exit status is 0 after SIGTERM or
    Ctrl-C, 2 when the proxy could not start. API keys are passed on to the engines, not checked.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        from kvferry.http import bind_socket, run_until_signal, url_of
        from kvferry.proxy.app import Proxy, make_server
        from kvferry.proxy.tokens import peer_signer
    except ModuleNotFoundError as err:
        raise ConfigError(f"{err.name} is not installed: pip install 'kvferry[proxy]'") from err
    config = _parsed({f.name: context.params[f.name] for f in fields(ProxyConfig)})
    sign_peer = None if shared_key_file is None else peer_signer(read_secret(shared_key_file, "shared_key_file"))
    router = Proxy(config, sign_peer=sign_peer, probe_headers=_authorization(probe_key_file))
    with bind_socket(config.host, config.port) as bound:
        names = f"{len(config.prefill)} prefill and {len(config.decode)} decode engines"
        server = make_server(router, lambda: typer.echo(f"kvferry proxies {names} on {url_of(bound)}"))
        run_until_signal(server, bound)


def _parsed(values: dict[str, Any]) -> ProxyConfig:
    try:
        return ProxyConfig.parse(values)
    except ConfigError as err:  # begins with proxy.NAME
        name = re.split(r"\W", str(err))[1]
        raise ConfigError(f"--{name.replace('_', '-')}: {err}") from err


def _authorization(key_file: Path | None) -> dict[str, str]:
    if key_file is None:
        return {}
    key = read_secret(key_file, "probe_key_file")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"probe_key_file={str(key_file)!r} has characters that are not printable ASCII")
    return {"Authorization": f"Bearer {key}"}
