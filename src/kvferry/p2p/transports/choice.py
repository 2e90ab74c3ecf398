"""Which transport: those a worker can offer, and the one for each pair of workers.

`auto` offers all that work here and takes, per peer, the first of `PREFERENCE` that both sides have and that reaches.
A transport that is named is that one or an error: nothing is substituted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from kvferry.errors import ConfigError, TransferError, did_you_mean
from kvferry.p2p.transports.shm import SharedPool, ShmTransport
from kvferry.p2p.transports.transport import Region, Transport

logger = logging.getLogger(__name__)

AUTO = "auto"
PREFERENCE = ("shm", "nixl")
"""The fastest first."""


def create_transports(
    requested: str,
    regions: Sequence[Region],
    *,
    engine_id: str,
    pool: SharedPool | None = None,
    ucx_params: Mapping[str, str] | None = None,
) -> dict[str, Transport]:
    """The worker's registered transports by name; close them all. `pool` is what KV memory was allocated in, if it was.

    ConfigError when the name is unknown, a named transport cannot be had, or `auto` finds none; it says why.
    """
    makers: dict[str, Callable[[], Transport]] = {
        "shm": lambda: ShmTransport(pool or SharedPool(engine_id)),
        "nixl": lambda: _nixl(engine_id, ucx_params),
    }
    if requested not in (AUTO, *makers):
        raise ConfigError(f"p2p transport {requested!r} is unknown{did_you_mean(requested, [AUTO, *makers])}")
    transports: dict[str, Transport] = {}
    reasons = []
    with ExitStack() as made:
        for name in PREFERENCE if requested == AUTO else (requested,):
            try:
                transport = makers[name]()
                transport.register(regions)
            except ConfigError as error:
                if requested != AUTO:
                    raise
                reasons.append(f"{name}: {error}")
            else:
                transports[name] = transport
                made.callback(transport.close)
        made.pop_all()  # nothing was raised: they are the caller's
    if not transports:
        raise ConfigError(f"no p2p transport works here: {'; '.join(reasons)}")
    logger.info("p2p transports: %s%s", ", ".join(transports), f" (not {'; '.join(reasons)})" if reasons else "")
    return transports


def choose(requested: str, transports: Mapping[str, Transport], blobs: Mapping[str, bytes]) -> Transport:
    """Ours for one peer, given the blobs it offers by name. TransferError says why each is out."""
    reasons = []
    for name in PREFERENCE if requested == AUTO else (requested,):
        if name not in transports:
            reasons.append(f"{name}: not available in this engine")
        elif name not in blobs:
            reasons.append(f"{name}: not offered by the peer")
        elif (why := transports[name].why_unreachable(blobs[name])) is not None:
            reasons.append(f"{name}: {why}")
        else:
            logger.info("p2p transport for this peer: %s%s", name, f" ({'; '.join(reasons)})" if reasons else "")
            return transports[name]
    raise TransferError(f"no transport ({requested}) reaches the peer: {'; '.join(reasons)}")


def check_transport(requested: str) -> None:
    """ConfigError when a transport that is named cannot be had here. Opens nothing."""
    if requested == "nixl":
        from kvferry.p2p.transports.nixl import load_nixl

        load_nixl()


def _nixl(engine_id: str, ucx_params: Mapping[str, str] | None) -> Transport:
    from kvferry.p2p.transports.nixl import NixlTransport

    return NixlTransport(engine_id, ucx_params)
