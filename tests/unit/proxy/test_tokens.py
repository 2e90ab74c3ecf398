"""Whom the proxy signs, and that decode engines believe it."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.errors import ConfigError, TransferError
from kvferry.p2p.wire import Address, check_peer
from kvferry.proxy.tokens import TOKEN_LIFE_S, peer_signer

KEY = "0123456789abcdef"
PEER = {"remote_host": "10.0.0.7", "remote_port": 4711, "transfer_id": "t"}
START_S = 1_700_000_000.5


def test_engine_with_the_key_believes_it_while_it_lives() -> None:
    token = peer_signer(KEY, now=lambda: START_S)(PEER, ["10.0.0.7"])

    def check(**change: Any) -> None:
        asked = {"address": Address("10.0.0.7", 4711), "transfer_id": "t", "key": KEY, "now_s": START_S} | change
        check_peer(asked.pop("address"), allowed=(), token=token, **asked)

    check()
    check(now_s=START_S + TOKEN_LIFE_S - 1)
    with pytest.raises(TransferError, match=r"expired 0 s ago.*clocks"):
        check(now_s=START_S + TOKEN_LIFE_S)
    for change in ({"address": Address("10.0.0.7", 4712)}, {"transfer_id": "u"}, {"key": KEY[::-1]}):
        with pytest.raises(TransferError, match=r"not signed with this engine's key.*--shared-key-file"):
            check(**change)


@pytest.mark.parametrize("change", [{"remote_host": None}, {"remote_port": "4711"}, {"transfer_id": 7}], ids=repr)
def test_params_that_name_no_peer_get_no_token(change: dict[str, Any]) -> None:
    assert peer_signer(KEY)(PEER | change, ["10.0.0.7"]) is None


@pytest.mark.parametrize(
    ("named", "own", "allowed", "is_signed"),
    [
        ("10.0.0.7", ["prefill-0", "10.0.0.7"], [], True),
        ("Prefill-0", ["prefill-0", "10.0.0.7"], [], True),
        ("0:0::7", ["::7"], [], True),
        ("localhost", ["127.0.0.1"], [], True),
        ("127.0.0.1", ["10.0.0.7"], [], False),
        ("10.0.0.8", ["10.0.0.7"], [], False),
        ("10.0.0.7.evil", ["10.0.0.7"], [], False),
        ("169.254.169.254", ["prefill-0", "10.0.0.7"], ["10.0.0.0/8"], False),
        ("10.9.9.9", ["192.168.0.7"], ["10.0.0.0/8"], True),
        ("a.cluster.local", ["192.168.0.7"], ["*.cluster.local"], True),
        ("a.cluster.local.evil", ["192.168.0.7"], ["*.cluster.local"], False),
        ("", ["10.0.0.7"], [], False),
    ],
)
def test_only_hosts_of_the_proxys_own_engines_are_signed(
    named: str, own: list[str], allowed: list[str], is_signed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    sign = peer_signer(KEY, allowed)
    for _ in range(3):
        assert (sign(PEER | {"remote_host": named}, own) is not None) == is_signed
    assert ["--allowed-peers" in record.getMessage() for record in caplog.records] == [True] * (not is_signed), "once"


def test_network_that_is_none_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"--allowed-peers: '10.0.0.1/8' is no network.*10.0.0.0/8"):
        peer_signer(KEY, ["10.0.0.1/8"])


def test_key_that_is_too_short_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"fewer than 16 bytes.*openssl rand"):
        peer_signer("short")
