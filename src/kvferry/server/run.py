"""The server's process: its socket, its signals, its start and end."""

from __future__ import annotations

import copy
import logging
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass

from kvferry.engine.llm import LLM
from kvferry.errors import ConfigError, HostError
from kvferry.http import AccessRules, ConnectionLimits, Server, run_until_signal
from kvferry.metrics import Metrics
from kvferry.server.app import ModelInfo, create_app
from kvferry.server.protocol import BodyLimits
from kvferry.server.service import EngineService

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Settings of the HTTP server."""

    host: str = "127.0.0.1"
    """Address on which the server listens."""
    port: int = 8000
    """Port on which the server listens; 0 selects a free port."""
    model_names: tuple[str, ...] = ()
    """Names of the model in requests."""
    max_queued_requests: int = 64
    """Largest number of unfinished requests beyond those that can run at once; more are refused with 503."""
    max_body_bytes: int = 8 << 20
    """Largest request body, in bytes."""
    max_stops: int = 64
    """Largest number of stop strings, and of stop token ids, in one request; more are refused with 400."""
    access: AccessRules = AccessRules()  # noqa: RUF009 - frozen
    """API keys, and the origins and host names of requests that the server accepts."""
    max_connections: int | None = None
    """Largest number of connections; None: the room within the limit of file descriptors."""
    header_timeout_s: float = 10.0
    """Longest time, in seconds, for the headers of a request to arrive."""
    body_timeout_s: float = 60.0
    """Longest time, in seconds, for the body of a request to arrive."""
    access_log: bool = False
    """Write one line to stdout for each HTTP request."""
    log_interval_s: float = 10.0
    """Time, in seconds, between log lines about the engine's work; an idle engine writes none. 0: no such lines."""
    drain_timeout_s: float = 30.0
    """Longest time, in seconds, for running requests to end after SIGTERM; then they are aborted."""

    def __post_init__(self) -> None:
        for name, minimum in (
            ("port", 0),
            ("max_queued_requests", 0),
            ("max_body_bytes", 1),
            ("max_stops", 0),
            ("max_connections", 1),
            ("header_timeout_s", 0.01),
            ("body_timeout_s", 0.01),
            ("drain_timeout_s", 0),
            ("log_interval_s", 0),
        ):
            value = getattr(self, name)
            if value is not None and not minimum <= value < math.inf:
                raise ConfigError(f"{name}={value} must be a number of at least {minimum}")


def make_server(llm: LLM, options: ServerOptions, on_listening: Callable[[], None] = lambda: None) -> Server:
    """A server over an engine, which from now on belongs to it. `run` it once, with a bound socket.

    `on_listening` is called when requests can come.
    """
    metrics = Metrics(options.model_names[0])
    limit = llm.config.scheduler_config.max_num_seqs + options.max_queued_requests
    service = EngineService(llm, metrics, limit, options.log_interval_s)
    model = ModelInfo(
        names=options.model_names,
        root=llm.config.model_config.model,
        limits=BodyLimits(
            llm.config.model_config.max_model_len,
            limit,
            options.max_stops,
            1 if llm.tokenizer is None else max(map(len, llm.tokenizer.get_vocab())),
        ),
        tokenizer=copy.deepcopy(llm.tokenizer),
    )
    app = create_app(service, model, metrics, options.max_body_bytes)
    server = Server(
        app, options.drain_timeout_s, service.refuse_new, on_listening, access_log=options.access_log,
        access=options.access,
        limits=ConnectionLimits(
            max_connections=options.max_connections, header_timeout_s=options.header_timeout_s,
            body_timeout_s=options.body_timeout_s, max_body_bytes=options.max_body_bytes,
        ),
    )  # fmt: skip
    service.on_failure = server.fail
    return server


def serve(llm: LLM, options: ServerOptions, bound: socket.socket, on_listening: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; then drain, flush and return. Blocks; main thread only.

    Raises HostError when the engine failed: the server has ended then, so that a supervisor starts a new one.
    """
    config = llm.config
    logger.info(
        "%s; KV cache of %d blocks of %d tokens; at most %d tokens in a request, %d requests at once",
        str(config.model_config.dtype).removeprefix("torch."), llm.kv_cache_config.num_blocks,
        config.cache_config.block_size, config.model_config.max_model_len, config.scheduler_config.max_num_seqs,
    )  # fmt: skip
    server = make_server(llm, options, on_listening)
    try:
        run_until_signal(server, bound)
    finally:
        llm.shutdown()
    if server.failure is not None:
        raise HostError(server.failure)
