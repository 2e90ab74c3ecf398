"""Settings of the P2P connectors (`kv_connector_extra_config`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvferry.config import VllmsOwn, parse_settings, read_secret, shown, without_vllms_own
from kvferry.errors import ConfigError
from kvferry.p2p.actions import P2PSettings
from kvferry.p2p.control import ControlSettings, check_listening
from kvferry.p2p.link import tls_contexts
from kvferry.p2p.transports.choice import AUTO, TRANSPORTS, check_transport, uses_pool
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
    """Settings of the user. `parse` checks every key; the error for an unknown key names the nearest known key."""

    transport: str = AUTO
    """Transport that moves the bytes: `shm`, `nixl`, or the name of an installed package's transport. `auto`: for each
    peer the fastest transport that reaches the peer. No other transport ever replaces a named one."""
    transport_config: dict[str, dict[str, Any]] | None = None
    """Settings of installed packages' transports, by the name of the transport; NIXL's settings are in `ucx`."""
    mode: Literal["pull", "push"] = "pull"
    """Engine that moves the bytes: the decode engine reads (pull), or the prefill engine writes (push)."""
    host: str = "127.0.0.1"
    """Address on which the control channel listens; an address that other machines reach needs `key_file`."""
    port: int = field(default=0, metadata={"minimum": 0, "maximum": 65535})
    """Port on which the control channel listens; 0 selects a free port, which `kv_transfer_params` carry to peers."""
    advertised_host: str | None = None
    """Host that peers dial, where it differs from `host`."""
    key_file: str | None = None
    """File with the secret that all engines and the proxy share; a key authenticates and encrypts connections."""
    allowed_peers: list[Any] | None = None
    """Networks (10.0.0.0/8) and host names (*.cluster.local) of peers that requests may name; by default this machine
    only."""
    weights_version: str | None = None
    """Name of the weights that peers compare, instead of a fingerprint of the weights' files."""
    shm_dir: str | None = None
    """Folder for the KV pool where /dev/shm is too small."""
    ucx: dict[str, Any] | None = None
    """Settings of NIXL's UCX backend, texts or whole numbers, e.g. `num_threads`; UCX ignores keys it does not know."""
    verify_loads: bool = True
    """Prove KV from another engine by digests of its blocks; both engines must have this setting on."""
    lease_s: float = _WAITS.lease_s
    """Longest time, in seconds, that the prefill engine keeps blocks for a decode engine that has not asked yet."""
    claim_s: float = _WAITS.claim_s
    """Longest time, in seconds, that the prefill engine keeps blocks for a decode engine that asked and is silent."""
    announce_s: float = _WAITS.announce_s
    """Longest time, in seconds, that a load waits for free blocks of its own engine."""
    load_s: float = _WAITS.load_s
    """Longest time, in seconds, for a load that has its blocks."""
    handshake_s: float = _WAITS.handshake_s
    """Longest time, in seconds, for two engines' handshake."""
    retry_s: float = _WAITS.retry_s
    """Time, in seconds, until an unanswered control message is sent again; the interval grows with each repetition."""
    liveness_s: float = _WAITS.liveness_s
    """Longest time, in seconds, that a peer that owes an answer may be silent."""
    quarantine_s: float = _WAITS.quarantine_s
    """Longest time, in seconds, that an abandoned transfer may run on before kvferry destroys its connection."""

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
        config.check_transport_names()
        for key, value in (config.ucx or {}).items():
            if type(value) not in (str, int):
                raise ConfigError(f"{EXTRA_CONFIG}.ucx.{key}={value!r} must be a text or a whole number")
        config.waits()
        return config

    def check_transport_names(self) -> None:
        """ConfigError for names that no transport has, and for own settings of one that is not used."""
        TRANSPORTS.check_name(self.transport, f"{EXTRA_CONFIG}.transport", also=[AUTO])
        for name, settings in (self.transport_config or {}).items():
            where = f"{EXTRA_CONFIG}.transport_config.{name}"
            if name in TRANSPORTS.built_ins:
                raise ConfigError(f"{where}: {name!r} is kvferry's own; its settings are shm_dir (shm) and ucx (nixl)")
            TRANSPORTS.check_name(name, f"{EXTRA_CONFIG}.transport_config, key")
            if not isinstance(settings, Mapping):
                raise ConfigError(f"{where}={shown(settings)} must be an object")
            if self.transport not in (AUTO, name):
                raise ConfigError(f"{where} is given, but transport is {self.transport!r}: leave one of them out")

    @property
    def transport_configs(self) -> dict[str, Mapping[str, Any]]:
        """Own settings of transports, by name."""
        return {**(self.transport_config or {}), "nixl": self.ucx or {}}

    @property
    def uses_pool(self) -> bool:
        """Whether the KV memory is to lie where peers on this machine can map it."""
        return uses_pool(self.transport)

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
            lambda: check_transport(self.transport, self.transport_configs),
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
