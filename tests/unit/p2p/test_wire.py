"""Frames, addresses, the allow-list and the proxy's tokens."""

from __future__ import annotations

import random
from contextlib import suppress

import msgspec
import pytest

from kvferry.errors import ConfigError, TransferError
from kvferry.p2p.config import P2PConfig
from kvferry.p2p.messages import Handover
from kvferry.p2p.wire import Address, Codec, check_peer, derive_key, is_allowed, sign_peer, verify_peer

KEY = "correct horse battery staple"


class Ping(msgspec.Struct, tag="ping", frozen=True):
    number: int


class Text(msgspec.Struct, tag="text", frozen=True):
    text: str


CODEC: Codec[Ping | Text] = Codec(Ping | Text, max_bytes=1000)


def test_messages_come_back() -> None:
    for message in (Ping(5), Text("grüße"), Ping(-1)):
        assert CODEC.decode(CODEC.encode(message)) == message
    assert CODEC.encode(Ping(5)) == b"KVF\x01\x82\xa4type\xa4ping\xa6number\x05"


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (b"", "no control message"),
        (b"KVF", "version"),
        (b"KVF\x02\x82\xa4type\xa4ping\xa6number\x05", "version 02, this engine speaks 01"),
        (b"KVF\x01\x82\xa4type\xa4pong\xa6number\x05", "pong"),
        (b"KVF\x01\x82\xa4type\xa4ping\xa6number\xa15", "number"),
        (b"KVF\x01" + b"\x91" * 900, "no control message"),
        (b"KVF\x01" + b"\xdd\xff\xff\xff\xff", "no control message"),
        (b"KVF\x01\x82\xa4type\xa4text\xa4text\xa2\xff\xff", "no control message"),
        (b"KVF\x01" + bytes(2000), "no control message"),
    ],
)
def test_bad_frames_are_refused(frame: bytes, words: str) -> None:
    with pytest.raises(TransferError, match=words):
        CODEC.decode(frame)


def test_random_frames_are_refused_and_nothing_else() -> None:
    rng = random.Random(8)
    good = CODEC.encode(Text("x" * 50))
    for _ in range(20_000):
        frame = bytearray(good if rng.random() < 0.7 else b"KVF\x01" + rng.randbytes(rng.randrange(60)))
        for _ in range(rng.randrange(4)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        with suppress(TransferError):
            assert isinstance(CODEC.decode(bytes(frame)), Ping | Text)


def test_too_large_messages_are_not_sent() -> None:
    with pytest.raises(TransferError, match=r"Text of 10.* is above 1000"):
        CODEC.encode(Text("x" * 1000))


@pytest.mark.parametrize(
    ("text", "address"),
    [("a-b.c_d:80", ("a-b.c_d", 80)), ("127.0.0.1:65535", ("127.0.0.1", 65535)), ("[::1]:7", ("::1", 7))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert Address.parse(text) == address
    assert str(Address(*address)) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "host", ":1", "host:", "host:0", "host:65536", "host:-1", "host:1e3", "eth0;1.2.3.4:5", "a/b:1", "a b:1",
        "*:1", "host:²", "[host]:1", "::1:7", "host:1\n", "-x:1", "x" * 300 + ":1", "host:" + "9" * 99,
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(TransferError):
        Address.parse(text)


@pytest.mark.parametrize(
    ("host", "patterns", "expected"),
    [
        ("10.1.2.3", ["10.0.0.0/8"], True), ("11.1.2.3", ["10.0.0.0/8"], False), ("::1", ["::/8", "10.0.0.0/8"], True),
        ("A.Cluster.Local", ["*.cluster.local"], True), ("a.cluster.local.evil", ["*.cluster.local"], False),
        ("localhost", ["127.0.0.0/8"], False), ("a", [], False), ("10.evil.org", ["10.0.0.0/8"], False),
    ],
)  # fmt: skip
def test_allow_list(host: str, patterns: list[str], expected: bool) -> None:
    assert is_allowed(host, patterns) is expected


def test_a_malformed_network_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"10.0.0.0/99"):
        is_allowed("10.0.0.1", ["10.0.0.0/99"])
    with pytest.raises(ConfigError, match=r"allowed_peers: '10.0.0.1/8' .*did you mean '10.0.0.0/8'\?"):
        P2PConfig.parse({"allowed_peers": ["10.0.0.1/8"]}, {})
    assert P2PConfig.parse({"allowed_peers": ["10.0.0.0/8"]}, {}).peers == ("10.0.0.0/8",)


ADDRESS = Address("10.0.0.7", 4711)


def test_a_token_is_good_for_what_it_names_and_until_it_expires() -> None:
    token = sign_peer(KEY, ADDRESS, "transfer-1", 1000)
    verify_peer(KEY, token, ADDRESS, "transfer-1", 999.9)
    with pytest.raises(TransferError, match="expired 5 s ago"):
        verify_peer(KEY, token, ADDRESS, "transfer-1", 1005)
    forged = [
        (KEY + "x", token, ADDRESS, "transfer-1"),
        (KEY, token, ADDRESS._replace(port=4712), "transfer-1"),
        (KEY, token, ADDRESS._replace(host="10.0.0.8"), "transfer-1"),
        (KEY, token, ADDRESS, "transfer-2"),
        (KEY, token.replace(".1000.", ".9000."), ADDRESS, "transfer-1"),
        (KEY, token[:-1] + ("A" if token[-1] != "A" else "B"), ADDRESS, "transfer-1"),
        (KEY, "v1.1000.", ADDRESS, "transfer-1"),
        (KEY, "", ADDRESS, "transfer-1"),
        *(
            (KEY, token.replace("1000", digits), ADDRESS, "transfer-1")
            for digits in ("\u0661000", "\uff11000", "\u0967000")
        ),
        (KEY, token + "\n", ADDRESS, "transfer-1"),
    ]
    for arguments in forged:
        with pytest.raises(TransferError, match="token"):
            verify_peer(*arguments, 1)


def test_fields_cannot_run_into_each_other() -> None:
    token = sign_peer(KEY, Address("a", 1), "bc", 1000)
    with pytest.raises(TransferError):
        verify_peer(KEY, token, Address("ab", 1), "c", 1)


def test_a_request_may_name_allowed_or_signed_peers_only() -> None:
    check_peer(Address("127.0.0.3", 5), now_s=0)
    check_peer(ADDRESS, allowed=["10.0.0.0/24"], now_s=0)
    token = sign_peer(KEY, ADDRESS, "t", 1000)
    check_peer(ADDRESS, key=KEY, token=token, transfer_id="t", now_s=0)
    for lacking in ({"key": None}, {"token": None}, {"transfer_id": None}):
        with pytest.raises(TransferError, match=r"10.0.0.7:4711.*allowed_peers"):
            check_peer(ADDRESS, **{"key": KEY, "token": token, "transfer_id": "t", **lacking}, now_s=0)
    with pytest.raises(TransferError, match="not signed"):
        check_peer(ADDRESS, key=KEY, token=token, transfer_id="other", now_s=0)


def test_short_keys_are_refused_and_purposes_differ() -> None:
    with pytest.raises(ConfigError, match="openssl rand"):
        derive_key("short", "x")
    assert derive_key(KEY, "client") != derive_key(KEY, "server")
    assert KEY.encode() not in derive_key(KEY, "client")


def random_value(rng: random.Random, depth: int = 0) -> object:
    """What JSON can bring along, and a little more."""
    texts = [
        "",
        "\0",
        "\ud800",
        "a\udfff",
        "\u0661\u0662",
        "x" * 600,
        "127.0.0.1",
        "::1",
        "pull",
        "push",
        "[",
        "-",
        "v1.1.x",
    ]
    plain = [None, True, False, -1, 0, 1, 65535, 65536, 2**31, 2**63, 2**64, 10**30, 1.5, float("nan"), float("inf")]
    nested: list[object] = []
    if depth < 3:
        nested = [
            [random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))],
            {rng.choice(texts): random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))},
        ]
    return rng.choice([*texts, *plain, *nested])


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_request_names_is_refused_or_can_be_sent(seed: int) -> None:
    rng = random.Random(seed)
    good = {
        "remote_host": "10.0.0.7",
        "remote_port": 4711,
        "transfer_mode": "push",
        "transfer_id": "t",
        "remote_request_id": "r",
        "remote_num_tokens": 3,
        "remote_first_token_ids": [1],
    }
    for _ in range(500):
        params = dict(good)
        for name in rng.sample([*good], rng.randint(0, 3)):
            params[name] = random_value(rng)
        try:
            handover = Handover.parse(params)
            address = Address(handover.remote_host, handover.remote_port)
            check_peer(address, key=KEY, token=str(params.get("remote_host")), transfer_id="t", now_s=0)
        except TransferError:
            continue
        msgspec.msgpack.encode(handover)
    with pytest.raises(TransferError):
        Handover.parse({**good, "transfer_id": "\ud800"})
    assert Handover.parse(good).peer == "10.0.0.7:4711"
