"""`kvferry serve`: an OpenAI-compatible server over the embedded engine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvferry.config import KVTransferConfig
from kvferry.errors import ConfigError
from kvferry.kv_events import KVEventsConfig

if TYPE_CHECKING:
    import socket

GIB = 1 << 30


def serve(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file, or smollm2.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients may call the model; the model's path by default.")
    ] = None,
    kv_transfer_config: Annotated[str | None, typer.Option(metavar="JSON", help="The KV connector.")] = None,
    kv_offloading_size: Annotated[
        float | None, typer.Option(metavar="GIB", help="Keep KV in this much host memory (an OffloadingConnector).")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and output together, in tokens.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of one forward.")] = 512,
    block_size: Annotated[int, typer.Option(help="Tokens of one KV block.")] = 16,
    num_kv_blocks: Annotated[int | None, typer.Option(help="Size of the KV cache in blocks.")] = None,
    kv_cache_bytes: Annotated[int | None, typer.Option(help="Size of the KV cache in bytes.")] = None,
    dtype: Annotated[str, typer.Option(help="auto takes the checkpoint's.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    enable_prefix_caching: Annotated[bool, typer.Option(help="Reuse KV of equal prefixes in the engine.")] = True,
    kv_events_config: Annotated[
        str | None, typer.Option(metavar="JSON", help="Publish which KV lies where, on a ZMQ socket.")
    ] = None,
    explain_requests: Annotated[
        bool, typer.Option(help="Remember why prefixes were hits or not, for `kvferry explain` and /debug/requests.")
    ] = True,
    seed: Annotated[int, typer.Option(help="For requests that bring none.")] = 0,
    num_threads: Annotated[
        int | None, typer.Option(help="Threads for computing; 1 where other processes share the cores.")
    ] = None,
    max_queued_requests: Annotated[
        int, typer.Option(help="Requests that may wait beyond max-num-seqs; more are refused with 503.")
    ] = 64,
    max_body_bytes: Annotated[int, typer.Option(help="Largest request body.")] = 8 << 20,
    drain_timeout_s: Annotated[
        float, typer.Option(help="At SIGTERM, how long requests under way may take to end.")
    ] = 30.0,
) -> None:
    """Serve a model over HTTP as OpenAI does: /v1/completions, /v1/chat/completions, /v1/models.

    Also /health, /ready, /metrics (Prometheus), /debug/requests and /reset_prefix_cache. The exit status is 0 after
    SIGTERM or Ctrl-C, 2 when the server could not start. There is no authentication: whoever reaches the port may use
    the model.
    """
    transfer = KVTransferConfig.parse(transfer_config(kv_transfer_config, kv_offloading_size))
    events = KVEventsConfig.parse(kv_events_config)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        import torch

        from kvferry.engine import LLM
        from kvferry.engine.server.run import ServerOptions, bind_socket
        from kvferry.engine.server.run import serve as run_server
    except ModuleNotFoundError as err:
        raise ConfigError(f"{err.name} is not installed: pip install 'kvferry[engine,server]'") from err
    options = ServerOptions(
        host=host,
        port=port,
        model_names=tuple(served_model_name or [model]),
        max_queued_requests=max_queued_requests,
        max_body_bytes=max_body_bytes,
        drain_timeout_s=drain_timeout_s,
    )
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    bound = bind_socket(host, port)
    llm = LLM(
        model,
        block_size=block_size,
        num_kv_blocks=num_kv_blocks,
        kv_cache_bytes=kv_cache_bytes,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        dtype=dtype,
        device=device,
        enable_prefix_caching=enable_prefix_caching,
        kv_transfer_config=transfer,
        explain_requests=explain_requests,
        kv_events_config=events,
        seed=seed,
    )
    run_server(llm, options, bound, lambda: _announce(options.model_names, bound))


def _announce(names: tuple[str, ...], bound: socket.socket) -> None:
    host, port = bound.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    typer.echo(f"kvferry serves {', '.join(names)} on http://{where}:{port}")


def transfer_config(kv_transfer_config: str | None, kv_offloading_size: float | None) -> str | dict[str, Any] | None:
    """The connector that the options mean; ConfigError when both name one."""
    if kv_offloading_size is None:
        return kv_transfer_config
    if kv_transfer_config is not None:
        raise ConfigError(
            "--kv-transfer-config and --kv-offloading-size both choose a connector: give the size as "
            "cpu_bytes_to_use in kv_connector_extra_config, or leave --kv-transfer-config out"
        )
    if not 0 < kv_offloading_size * GIB < float("inf"):
        raise ConfigError(f"--kv-offloading-size={kv_offloading_size} must be above 0 (GiB of host memory)")
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"cpu_bytes_to_use": int(kv_offloading_size * GIB)},
    }
