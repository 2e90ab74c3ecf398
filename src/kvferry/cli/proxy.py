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

_Prefill = Annotated[list[str], typer.Option(metavar="URL", help="URL of an engine that prefills; may be repeated.")]
_Decode = Annotated[list[str], typer.Option(metavar="URL", help="URL of an engine that decodes; may be repeated.")]
_Strict = Annotated[bool, typer.Option(help="Error reply where a decode engine would have to compute a prompt again.")]
_ConnectTimeout = Annotated[float, typer.Option(help="Longest time, in seconds, to connect to an engine.")]
_PrefillTimeout = Annotated[float, typer.Option(help="Longest time, in seconds, for a prefill.")]
_DecodeTimeout = Annotated[float, typer.Option(help="Longest time, in seconds, between two events of a stream.")]
_AnswerTimeout = Annotated[float, typer.Option(help="Longest time, in seconds, for a reply that is not streamed.")]
_MaxAttempts = Annotated[int, typer.Option(help="Largest number of tries of one request, the first included.")]
_RetryDeadline = Annotated[
    float, typer.Option(help="Age of a request, in seconds, after which the proxy does not try again.")
]
_HandOver = Annotated[
    float,
    typer.Option(
        help="Longest time, in seconds, that the proxy keeps a finished prefill while all decode engines are full; "
        "must be below the engines' lease_s."
    ),
]
_ProbeInterval = Annotated[
    float,
    typer.Option(help="Time, in seconds, between two probes (tiny requests) of each pair of engines; 0 sends none."),
]
_ProbeTimeout = Annotated[float, typer.Option(help="Longest time, in seconds, for each leg of a probe.")]
_ProbeKeyFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the API key that probes carry; requests of clients carry the clients' keys. No key by default."
    ),
]
_EngineKeyFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the API key that the engines expect; requests and probes carry this key instead of the "
        "clients' keys. No key by default: the proxy passes on the clients' keys, unless --api-key makes the proxy "
        "check them.",
    ),
]
_SharedKeyFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the key of the engines' key_file; decode engines then accept the prefill engines that the "
        "proxy names. No key by default.",
    ),
]
_AllowedPeers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST",
        help="With --shared-key-file: network (10.0.0.0/8) or name (*.cluster.local) of prefill engines' control "
        "channels, besides the hosts of their URLs; may be repeated. No network by default.",
    ),
]
_FailureThreshold = Annotated[
    int, typer.Option(help="Number of failures in a row after which the proxy takes an engine out of use.")
]
_MinBackoff = Annotated[
    float,
    typer.Option(help="Time, in seconds, for which such an engine first stays out of use; each repetition doubles it."),
]
_MaxBackoff = Annotated[
    float, typer.Option(help="Longest time, in seconds, for which such an engine stays out of use.")
]
_PrefixMemoryChunks = Annotated[
    int, typer.Option(help="Number of pieces of prompts (512 bytes each) that the proxy remembers per prefill engine.")
]
_MaxHeldBodyBytes = Annotated[
    int,
    opt.size_option(
        "Largest total size of the request bodies that the proxy keeps until their requests end; beyond it, the proxy "
        "refuses new requests with status 503.",
        default="512MiB",
    ),
]
_MaxReplyBytes = Annotated[
    int,
    opt.size_option(
        "Largest reply of an engine; a larger reply, or a stream's event above 16 MiB, counts as a failure of the "
        "engine.",
        default="32MiB",
    ),
]


def proxy(
    context: typer.Context,
    prefill: _Prefill,
    decode: _Decode,
    host: opt.ListenHost = "127.0.0.1",
    port: opt.ListenPort = 8100,
    strict: _Strict = True,
    connect_timeout_s: _ConnectTimeout = 2.0,
    prefill_timeout_s: _PrefillTimeout = 120.0,
    decode_timeout_s: _DecodeTimeout = 120.0,
    answer_timeout_s: _AnswerTimeout = 600.0,
    max_attempts: _MaxAttempts = 3,
    retry_deadline_s: _RetryDeadline = 60.0,
    hand_over_s: _HandOver = 25.0,
    probe_interval_s: _ProbeInterval = 10.0,
    probe_timeout_s: _ProbeTimeout = 10.0,
    probe_key_file: _ProbeKeyFile = None,
    engine_key_file: _EngineKeyFile = None,
    shared_key_file: _SharedKeyFile = None,
    allowed_peers: _AllowedPeers = None,
    failure_threshold: _FailureThreshold = 3,
    min_backoff_s: _MinBackoff = 0.5,
    max_backoff_s: _MaxBackoff = 30.0,
    prefix_memory_chunks: _PrefixMemoryChunks = 100_000,
    max_body_bytes: opt.MaxBodyBytes = 8 << 20,
    max_held_body_bytes: _MaxHeldBodyBytes = 512 << 20,
    max_reply_bytes: _MaxReplyBytes = 32 << 20,
    max_stops: opt.MaxStops = 64,
    api_key: opt.APIKey = None,
    allowed_origins: opt.AllowedOrigins = None,
    allowed_hosts: opt.AllowedHosts = None,
    max_connections: opt.MaxConnections = None,
    header_timeout_s: opt.HeaderTimeout = 10.0,
    body_timeout_s: opt.BodyTimeout = 60.0,
    drain_timeout_s: opt.DrainTimeout = 30.0,
) -> None:
    """Route requests to engines that prefill and engines that decode.

    Clients see OpenAI's /v1/completions and /v1/chat/completions, also /v1/models, /health, /ready (transfers work)
    and /metrics (Prometheus). The exit status is 0 after SIGTERM or Ctrl-C, 2 when the proxy could not start. Clients'
    API keys go to the engines, which check them, unless the proxy has keys of its own (--api-key).
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    _run(context.params)


def _run(options: dict[str, Any]) -> None:
    try:
        from kvferry.http import AccessRules, bind_socket, run_until_signal, url_of
        from kvferry.proxy.app import Proxy, make_server
        from kvferry.proxy.tokens import peer_signer
    except ModuleNotFoundError as err:
        raise ConfigError(f"{err.name} is not installed: {install_hint('proxy')}") from err
    config = _parsed({f.name: options[f.name] for f in fields(ProxyConfig)})
    shared_key_file, allowed_peers = options["shared_key_file"], options["allowed_peers"]
    if shared_key_file is None and allowed_peers:
        raise ConfigError("--allowed-peers is for what the proxy signs: give --shared-key-file too, or leave it out")
    sign_peer = None
    if shared_key_file is not None:
        sign_peer = peer_signer(read_secret(shared_key_file, "shared_key_file"), allowed_peers or ())
    engine_headers = _authorization(options, "engine_key_file")
    probe_headers = _authorization(options, "probe_key_file")
    if engine_headers and probe_headers:
        raise ConfigError("--probe-key-file: probes send the key of --engine-key-file, so leave one of them out")
    router = Proxy(
        config,
        sign_peer=sign_peer,
        probe_headers=engine_headers or probe_headers or {},
        access=AccessRules.parse(options["api_key"], options["allowed_origins"], options["allowed_hosts"]),
        engine_headers=engine_headers,
    )
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


def _authorization(options: dict[str, Any], setting: str) -> dict[str, str] | None:
    if (key_file := options[setting]) is None:
        return None
    key = read_secret(key_file, setting)
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{setting}={str(key_file)!r} has characters that are not printable ASCII")
    return {"Authorization": f"Bearer {key}"}
