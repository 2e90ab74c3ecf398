"""`kvferry serve`: an OpenAI-compatible server over the embedded engine."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer

from kvferry.cli import options as opt
from kvferry.config import transfer_config
from kvferry.errors import ConfigError, install_hint
from kvferry.kv_events import KVEventsConfig

_SERVER_OPTIONS = (
    "host",
    "port",
    "max_queued_requests",
    "max_body_bytes",
    "max_stops",
    "max_connections",
    "header_timeout_s",
    "body_timeout_s",
    "drain_timeout_s",
    "access_log",
    "log_interval_s",
)
_ENGINE_OPTIONS = ("enable_prefix_caching", "explain_requests", "seed")  # beside those that doctor shares

_ServedModelName = Annotated[
    list[str] | None,
    typer.Option(help="Name of the model in requests; may be repeated. By default the model's path."),
]
_KVEvents = Annotated[
    str | None,
    typer.Option(
        metavar="JSON", help="Settings of the ZMQ socket that publishes which KV is stored where. No events by default."
    ),
]
_ExplainRequests = Annotated[
    bool,
    typer.Option(help="Record why prefixes were hits or not, for `kvferry explain` and /debug/requests."),
]
_MaxQueuedRequests = Annotated[
    int,
    typer.Option(
        help="Largest number of requests that wait, beyond --max-num-seqs; the server refuses more with status 503."
    ),
]
_LogInterval = Annotated[
    float,
    typer.Option(
        help="Time, in seconds, between log lines about the engine's work; an idle engine writes none. 0 writes no "
        "such lines."
    ),
]


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model: a folder, a .gguf file, or smollm2.")],
    host: opt.ListenHost = "127.0.0.1",
    port: opt.ListenPort = 8000,
    served_model_name: _ServedModelName = None,
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
    enable_prefix_caching: opt.EnablePrefixCaching = True,
    kv_events_config: _KVEvents = None,
    explain_requests: _ExplainRequests = True,
    hidden_state_layers: opt.HiddenStateLayers = None,
    seed: opt.Seed = 0,
    num_threads: opt.NumThreads = None,
    max_queued_requests: _MaxQueuedRequests = 64,
    max_body_bytes: opt.MaxBodyBytes = 8 << 20,
    max_stops: opt.MaxStops = 64,
    api_key: opt.APIKey = None,
    allowed_origins: opt.AllowedOrigins = None,
    allowed_hosts: opt.AllowedHosts = None,
    max_connections: opt.MaxConnections = None,
    header_timeout_s: opt.HeaderTimeout = 10.0,
    body_timeout_s: opt.BodyTimeout = 60.0,
    access_log: Annotated[bool, typer.Option(help="Write one line to stdout for each HTTP request.")] = False,
    log_interval_s: _LogInterval = 10.0,
    drain_timeout_s: opt.DrainTimeout = 30.0,
) -> None:
    """Serve a model over HTTP with OpenAI's API.

    The routes are /v1/completions, /v1/chat/completions and /v1/models, also /health, /ready, /metrics (Prometheus),
    /debug/requests and /reset_prefix_cache. The exit status is 0 after SIGTERM or Ctrl-C, 2 when the server could not
    start or its engine failed. Without --api-key, everyone who can reach the port can use the model.
    """
    transfer = transfer_config(kv_transfer_config, kv_offloading_size, kv_offloading_backend)
    events = KVEventsConfig.parse(kv_events_config)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    server = {name: context.params[name] for name in _SERVER_OPTIONS}
    server["model_names"] = tuple(served_model_name or [model])
    engine = {name: context.params[name] for name in (*opt.ENGINE_OPTIONS, *_ENGINE_OPTIONS)}
    engine["hidden_state_layers"] = hidden_state_layers or ()
    server["access"] = (api_key, allowed_origins, allowed_hosts)
    _run(model, {"kv_transfer_config": transfer, "kv_events_config": events, **engine}, server, num_threads)


def _run(model: str, engine: dict[str, Any], server: dict[str, Any], num_threads: int | None) -> None:
    try:
        import torch

        from kvferry.engine import LLM
        from kvferry.http import AccessRules, bind_socket, url_of
        from kvferry.server.run import ServerOptions
        from kvferry.server.run import serve as run_server
    except ModuleNotFoundError as err:
        raise ConfigError(f"{err.name} is not installed: {install_hint('engine', 'server')}") from err
    options = ServerOptions(**{**server, "access": AccessRules.parse(*server["access"])})
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    with bind_socket(options.host, options.port) as bound:
        names, url = ", ".join(options.model_names), url_of(bound)
        llm = LLM(model, **engine)
        run_server(llm, options, bound, lambda: typer.echo(f"kvferry serves {names} on {url}"))
