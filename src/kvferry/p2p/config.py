"""Settings of the P2P connectors (`kv_connector_extra_config`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvferry.config import VllmsOwn, parse_settings, read_secret, without_vllms_own
from kvferry.errors import ConfigError
from kvferry.p2p.actions import P2PSettings
from kvferry.p2p.control import ControlSettings, check_listening
from kvferry.p2p.link import tls_contexts
from kvferry.p2p.transports.choice import check_transport
from kvferry.p2p.wire import LOOPBACK, parse_network

EXTRA_CONFIG = "kv_connector_extra_config"
_WAITS = P2PSettings()
_NO_WAY_BACK = "a decode engine hands no KV back here: put an OffloadingConnector beside it in a MultiConnector"
_VLLMS_OWN: VllmsOwn = {
    "backends": ((["UCX"],), "kvferry uses NIXL's UCX backend; leave the key out"),
    "num_threads": ((), 'write it as "ucx": {"num_threads": 4}'),
    "enforce_handshake_compat": (
        (True,), "engines that differ are always refused, with the name of what differs; leave the key out"
    ),
    "enable_cross_layers_blocks": ((True, False), "the layout decides; leave the key out"),
    "kv_lease_duration": ((), "write lease_s (seconds)"),
    "engine_ttl": ((), "peers are forgotten by themselves; leave the key out"),
    "kv_recompute_threshold": ((0, 64), "every hand-over that was asked for is fetched; leave the key out"),
    "bidirectional_kv_xfer": ((False,), _NO_WAY_BACK),
    "decoder_kv_blocks_ttl": ((), _NO_WAY_BACK),
    "push_registration_timeout": ((), "write load_s (seconds)"),
}  # fmt: skip


@dataclass(frozen=True)
class P2PConfig:
    """What the user may set; every key is checked, unknown keys are errors that name the nearest known one."""

    transport: Literal["auto", "shm", "nixl"] = "auto"
    """What moves the bytes. `auto`: per peer the fastest that reaches it; a named one is never replaced by another."""
    mode: Literal["pull", "push"] = "pull"
    """Who moves them: the decode engine reads (pull), or the prefill engine writes (push)."""
    host: str = "127.0.0.1"
    """Where the control channel listens; other machines reach it only with a key."""
    port: int = field(default=0, metadata={"minimum": 0, "maximum": 65535})
    """0: any free port; `kv_transfer_params` say which."""
    advertised_host: str | None = None
    """The host that peers are told to dial, where it is another than `host`."""
    key_file: str | None = None
    """File with a secret that all engines and the proxy share; with it, connections are authenticated and encrypted."""
    allowed_peers: list[Any] | None = None
    """Networks (10.0.0.0/8) and host names (*.cluster.local) that requests may name; by default this machine only."""
    weights_version: str | None = None
    """Names the weights towards peers instead of a fingerprint of the files."""
    shm_dir: str | None = None
    """Folder for the KV pool when shared memory is too small."""
    ucx: dict[str, Any] | None = None
    """Settings of NIXL's UCX backend, texts or whole numbers, e.g. `num_threads`; it ignores keys it does not know."""
    verify_loads: bool = True
    """KV that another engine hands over is proved by digests of its blocks, where both engines are set to."""
    lease_s: float = _WAITS.lease_s
    """Blocks of a finished prefill are kept for a decode engine that has not come."""
    claim_s: float = _WAITS.claim_s
    """They are kept for one that has come, and is silent."""
    announce_s: float = _WAITS.announce_s
    """A load may wait for blocks of its own engine."""
    load_s: float = _WAITS.load_s
    """A load with blocks may take, all in all."""
    handshake_s: float = _WAITS.handshake_s
    """Two engines may take to get to know each other."""
    retry_s: float = _WAITS.retry_s
    """A control message is repeated after this, then less and less often."""
    liveness_s: float = _WAITS.liveness_s
    """A peer that owes an answer may be silent."""
    quarantine_s: float = _WAITS.quarantine_s
    """A transfer that was given up may go on before its connection is destroyed."""

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any], variant: Mapping[str, Any]) -> P2PConfig:
        """Read `kv_connector_extra_config` over what the connector's name says. ConfigError: key, value and remedy."""
        own = without_vllms_own(extra_config, _VLLMS_OWN, EXTRA_CONFIG, "NixlConnector")
        config = parse_settings(cls, {**variant, **own}, EXTRA_CONFIG)
        if "mode" in variant and config.mode != variant["mode"]:
            raise ConfigError(
                f"{EXTRA_CONFIG}.mode={config.mode!r}, but the connector's name says {variant['mode']!r}: "
                "leave the key out, or use NixlConnector"
            )
        if not all(isinstance(peer, str) for peer in config.allowed_peers or ()):
            raise ConfigError(f"{EXTRA_CONFIG}.allowed_peers={config.allowed_peers!r} must be a list of texts")
        for pattern in config.peers:
            if "/" in pattern:
                parse_network(pattern)  # now, and not with the first request
        for key, value in (config.ucx or {}).items():
            if type(value) not in (str, int):
                raise ConfigError(f"{EXTRA_CONFIG}.ucx.{key}={value!r} must be a text or a whole number")
        config.waits()
        return config

    @property
    def uses_pool(self) -> bool:
        """Whether the KV memory is to lie where peers on this machine can map it."""
        return self.transport in ("auto", "shm")

    @property
    def peers(self) -> tuple[str, ...]:
        """Who may be named by requests."""
        return LOOPBACK if self.allowed_peers is None else tuple(self.allowed_peers)

    def key(self) -> str | None:
        """The shared secret; reads the file. ConfigError: unreadable, too short, or `cryptography` is not installed."""
        if self.key_file is None:
            return None
        secret = read_secret(self.key_file, f"{EXTRA_CONFIG}.key_file")
        tls_contexts(secret)
        return secret

    def problems(self) -> list[str]:
        """What this machine lacks for them, each with its remedy. Holds nothing afterwards."""
        found = []
        key = "unreadable" if self.key_file is not None else None
        for check in (
            self.key,
            lambda: check_transport(self.transport),
            lambda: check_listening(self.control(key)),
        ):
            try:
                check()
            except ConfigError as error:
                found.append(str(error))
        return found

    def waits(self) -> P2PSettings:
        """The core's deadlines. ConfigError when one is not above 0.

        Who claims a lease at its last moment, and waits for blocks as long as that may be, can still load.
        """
        own = {f.name for f in dataclasses.fields(self)}
        names = [f.name for f in dataclasses.fields(P2PSettings) if f.name in own]
        longest_s = max(_WAITS.max_lease_s, self.lease_s + self.announce_s + self.load_s)
        waits = {name: getattr(self, name) for name in names}
        return P2PSettings(**waits, max_lease_s=longest_s, max_sources=ControlSettings().num_dialled)

    def control(self, key: str | None) -> ControlSettings:
        """Where to listen."""
        return ControlSettings(
            self.host, self.port, self.advertised_host, key, silence_s=self.liveness_s, handshake_s=self.handshake_s
        )
