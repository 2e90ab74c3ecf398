"""The server's process: its socket, its signals, its start and end."""

from __future__ import annotations

import copy
import logging
import math
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from types import FrameType

import uvicorn

from kvferry.engine.llm import LLM
from kvferry.engine.server.app import ModelInfo, create_app
from kvferry.engine.server.service import EngineService
from kvferry.errors import ConfigError
from kvferry.metrics import Metrics

logger = logging.getLogger(__name__)

_BACKLOG = 512


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the server meets its clients."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    model_names: tuple[str, ...] = ()
    """What clients may call the model."""
    max_queued_requests: int = 64
    """Unfinished requests beyond those that can run at once; more are refused with 503."""
    max_body_bytes: int = 8 << 20
    drain_timeout_s: float = 30.0
    """At SIGTERM, how long requests under way may take to end; then they are aborted."""

    def __post_init__(self) -> None:
        for name, minimum in (("port", 0), ("max_queued_requests", 0), ("max_body_bytes", 1), ("drain_timeout_s", 0)):
            if not minimum <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be a number of at least {minimum}")


def bind_socket(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: before a model is loaded it shows that the port is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as err:
        bound.close()
        raise ConfigError(f"cannot listen on host={host!r} port={port}: {err}") from err
    return bound


class Server(uvicorn.Server):
    """uvicorn's, which also stops taking requests as soon as a signal comes, not when the last one has ended."""

    def __init__(self, config: uvicorn.Config, service: EngineService, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._on_listening = on_listening

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal drains, a second one does not wait."""
        self._service.refuse_new("the server is stopping")
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started:
            self._on_listening()


def make_server(llm: LLM, options: ServerOptions, on_listening: Callable[[], None] = lambda: None) -> Server:
    """A server over an engine, which from now on belongs to it. `run` it once, with a bound socket.

    `on_listening` is called when requests can come.
    """
    metrics = Metrics(options.model_names[0])
    limit = llm.config.scheduler_config.max_num_seqs + options.max_queued_requests
    service = EngineService(llm, metrics, limit)
    model = ModelInfo(
        names=options.model_names,
        root=llm.config.model_config.model,
        max_model_len=llm.config.model_config.max_model_len,
        tokenizer=copy.deepcopy(llm.tokenizer),
    )
    config = uvicorn.Config(
        create_app(service, model, metrics, options.max_body_bytes),
        log_level="warning",
        access_log=False,
        lifespan="on",
        backlog=_BACKLOG,
        timeout_graceful_shutdown=max(1, round(options.drain_timeout_s)),
    )
    return Server(config, service, on_listening)


def serve(llm: LLM, options: ServerOptions, bound: socket.socket, on_listening: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; then drain, flush and return. Blocks; main thread only."""
    if not ip_address(bound.getsockname()[0]).is_loopback:
        logger.warning("host=%s: whoever reaches this port may use the model, there is no authentication", options.host)
    # uvicorn raises the signal again at its end, which is to be an ordinary end.
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        make_server(llm, options, on_listening).run(sockets=[bound])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        llm.shutdown()
