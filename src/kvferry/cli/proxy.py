"""`kvferry proxy`: the P/D router."""

from __future__ import annotations

import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from kvferry.cli import options as opt
from kvferry.config import read_secret
from kvferry.errors import ConfigError, install_hint
from kvferry.proxy.config import ProxyConfig


def proxy(
    context: typer.Context,
    prefill: Annotated[list[str], typer.Option(metavar="URL", help="An engine that prefills; may be repeated.")],
    decode: Annotated[list[str], typer.Option(metavar="URL", help="An engine that decodes; may be repeated.")],
    host: opt.ListenHost = "127.0.0.1",
    port: opt.ListenPort = 8100,
    strict: Annotated[
        bool, typer.Option(help="Answer an error rather than let a decode engine compute a prompt again.")
    ] = True,
    connect_timeout_s: Annotated[float, typer.Option(help="Seconds to reach an engine, at most.")] = 2.0,
    prefill_timeout_s: Annotated[float, typer.Option(help="Seconds for a prefill, at most.")] = 120.0,
    decode_timeout_s: Annotated[float, typer.Option(help="Seconds of silence in a stream, at most.")] = 120.0,
    answer_timeout_s: Annotated[
        float, typer.Option(help="Seconds for an answer that is not streamed, at most.")
    ] = 600.0,
    max_attempts: Annotated[int, typer.Option(help="Tries of a request, the first included.")] = 3,
    retry_deadline_s: Annotated[float, typer.Option(help="Seconds after which a request is not tried again.")] = 60.0,
    hand_over_s: Annotated[
        float,
        typer.Option(
            help="While all decode engines are full, a prefill is kept for so many seconds; below the engines' lease_s."
        ),
    ] = 25.0,
    probe_interval_s: Annotated[
        float, typer.Option(help="Seconds between two probes (tiny requests) of each pair of engines; 0 for none.")
    ] = 10.0,
    probe_timeout_s: Annotated[float, typer.Option(help="Seconds for each leg of a probe, at most.")] = 10.0,
    probe_key_file: Annotated[
        Path | None,
        typer.Option(help="File with the API key for probes; clients' own keys are passed on. No key by default."),
    ] = None,
    shared_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the key of the engines' key_file: decode engines then trust whom the proxy names. No key "
            "by default.",
        ),
    ] = None,
    allowed_peers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="With --shared-key-file, a network (10.0.0.0/8) or name (*.cluster.local) under which prefill engines "
            "may be dialled for KV, besides the hosts of their URLs; may be repeated. None by default.",
        ),
    ] = None,
    failure_threshold: Annotated[int, typer.Option(help="Failures in a row that take an engine out.")] = 3,
    min_backoff_s: Annotated[
        float, typer.Option(help="Seconds for which such an engine is out the first time; doubled each time.")
    ] = 0.5,
    max_backoff_s: Annotated[float, typer.Option(help="Seconds for which such an engine is out, at most.")] = 30.0,
    prefix_memory_chunks: Annotated[
        int, typer.Option(help="Pieces of prompts (512 bytes) remembered per prefill engine.")
    ] = 100_000,
    max_body_bytes: opt.MaxBodyBytes = 8 << 20,
    max_reply_bytes: Annotated[
        int,
        opt.size_option(
            "Largest reply of an engine; a larger one, or an event of a stream above 16 MiB, counts as the engine's "
            "failure.",
            default="32MiB",
        ),
    ] = 32 << 20,
    max_stops: opt.MaxStops = 64,
    drain_timeout_s: opt.DrainTimeout = 30.0,
) -> None:
    """Route requests to engines that prefill and engines that decode.

    Clients see OpenAI's /v1/completions and /v1/chat/completions, also /v1/models, /health, /ready (transfers work)
    and /metrics (Prometheus). The exit status is 0 after SIGTERM or Ctrl-C, 2 when the proxy could not start. API keys
    are passed on to the engines, not checked.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        from kvferry.http import bind_socket, run_until_signal, url_of
        from kvferry.proxy.app import Proxy, make_server
        from kvferry.proxy.tokens import peer_signer
    except ModuleNotFoundError as err:
        raise ConfigError(f"{err.name} is not installed: {install_hint('proxy')}") from err
    config = _parsed({f.name: context.params[f.name] for f in fields(ProxyConfig)})
    if shared_key_file is None and allowed_peers:
        raise ConfigError("--allowed-peers is for what the proxy signs: give --shared-key-file too, or leave it out")
    sign_peer = None
    if shared_key_file is not None:
        sign_peer = peer_signer(read_secret(shared_key_file, "shared_key_file"), allowed_peers or ())
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
