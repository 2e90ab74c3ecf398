"""Keys against the published definition, written out here a second time with nothing but hashlib and struct."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

import pytest

from kvferry.errors import ConfigError
from kvferry.kv import fingerprint
from kvferry.kv.fingerprint import fingerprint_folder
from kvferry.kv.keys import Identity, KeyChain, TokenDigests, digest, first_tokens_digest, store_key
from kvferry.types import MultimodalItem

DOCS = Path(__file__).parents[3] / "docs" / "keys.md"


def field(text: str | None) -> bytes:
    return b"\xff" * 4 if text is None else struct.pack("<I", len(text.encode())) + text.encode()


def by_definition(
    model: str, salt: str | None, lora: str | None, tokens: list[int], media: tuple[MultimodalItem, ...] = ()
) -> list[bytes]:
    value = hashlib.sha256(b"kvferry-key-v1" + field(model) + field(salt) + field(lora)).digest()
    values = []
    for start in range(0, len(tokens) - 15, 16):
        unit = b"".join(struct.pack("<I", t) for t in tokens[start : start + 16])
        for item in media:
            if item.offset_tokens < start + 16 and item.offset_tokens + item.num_tokens > start:
                unit += field(item.identifier) + struct.pack("<iI", item.offset_tokens - start, item.num_tokens)
        value = hashlib.sha256(value + unit).digest()
        values.append(value)
    return values


@pytest.mark.parametrize(("salt", "lora"), [(None, None), ("tenant-a", None), (None, "sha256:00"), ("", "ü")])
def test_chain_follows_the_definition(salt: str | None, lora: str | None) -> None:
    tokens = [(i * 7919) % 50000 for i in range(100)]
    expected = by_definition("m", salt, lora, tokens)
    chain = KeyChain(Identity("m", salt, lora))
    for length in (5, 16, 17, 60, 100):  # growing tokens extend, never rewrite
        chain.extend(tokens[:length])
        assert chain.num_hashed_tokens == length // 16 * 16
    assert [chain.value_at(16 * (i + 1)) for i in range(6)] == expected


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 39, 40, 41, 48, 50])
@pytest.mark.parametrize("media", [(), (MultimodalItem("img-1", 10, 10), MultimodalItem("img-2", 40, 2))])
def test_a_digest_of_any_number_of_tokens_follows_the_definition(
    num_tokens: int, media: tuple[MultimodalItem, ...]
) -> None:
    tokens = [(i * 7919) % 50000 for i in range(50)]
    whole = num_tokens // 16 * 16
    root = hashlib.sha256(b"kvferry-key-v1" + field("hand-over") + field("salt") + field("lora")).digest()
    start = ([root, *by_definition("hand-over", "salt", "lora", tokens, media)])[whole // 16]
    rest = b"".join(struct.pack("<I", token) for token in tokens[whole:num_tokens])
    for item in media:
        if item.offset_tokens < num_tokens and item.offset_tokens + item.num_tokens > whole:
            rest += field(item.identifier) + struct.pack("<iI", item.offset_tokens - whole, item.num_tokens)
    expected = hashlib.sha256(b"kvferry-tokens-v1" + struct.pack("<I", num_tokens) + start + rest).digest()
    for known in (tokens, tokens[:num_tokens]):  # what stands behind the first tokens does not matter
        assert TokenDigests(KeyChain(Identity("hand-over", "salt", "lora"), media), known).at(num_tokens) == expected


def test_digests_differ_by_every_token_the_count_salt_adapter_and_media() -> None:
    tokens = [(i * 7919) % 50000 for i in range(40)]
    chains = [
        KeyChain(Identity("m")), KeyChain(Identity("m", "a")), KeyChain(Identity("m", None, "a")),
        KeyChain(Identity("m"), (MultimodalItem("a", 35, 3),)), KeyChain(Identity("m"), (MultimodalItem("b", 35, 3),)),
        KeyChain(Identity("m"), (MultimodalItem("a", 34, 3),)), KeyChain(Identity("m"), (MultimodalItem("a", 35, 4),)),
    ]  # fmt: skip
    digests = [TokenDigests(chain, tokens).at(40) for chain in chains]
    plain = TokenDigests(KeyChain(Identity("m")), tokens)
    digests += [plain.at(count) for count in range(40)]
    for at in range(40):
        changed = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]
        digests.append(TokenDigests(KeyChain(Identity("m")), changed).at(40))
    assert len(set(digests)) == len(digests) == 87


def test_media_belong_to_the_units_they_overlap() -> None:
    media = (MultimodalItem("img-1", 10, 10), MultimodalItem("img-2", 40, 2))
    tokens = [1] * 64
    chain = KeyChain(Identity("m"), media)
    chain.extend(tokens)
    assert [chain.value_at(16 * (i + 1)) for i in range(4)] == by_definition("m", None, None, tokens, media)
    plain = KeyChain(Identity("m"))
    plain.extend(tokens)
    assert plain.value_at(16) != chain.value_at(16)


def test_one_image_with_more_placeholder_tokens_is_another() -> None:
    """DeepSeek-VL2 cuts an image into tiles in prompts of one or two images only; vLLM names it alike in all."""
    values = set()
    for num_tokens in (48, 60):
        chain = KeyChain(Identity("m"), (MultimodalItem("img-1", 4, num_tokens),))
        chain.extend([1, 2, 3, 4, *[7] * 44])
        values |= {chain.value_at(16 * (i + 1)) for i in range(3)}
    assert len(values) == 6


def test_every_part_of_the_identity_changes_every_key() -> None:
    tokens = list(range(16))
    keys = set()
    for identity in (Identity("m"), Identity("n"), Identity("m", "s"), Identity("m", None, "s"), Identity("m", "")):
        chain = KeyChain(identity)
        chain.extend(tokens)
        keys.add(chain.value_at(16))
    assert len(keys) == 5


def test_published_vectors() -> None:
    """docs/keys.md carries vectors for other languages; they are what the code computes."""
    vectors = json.loads(re.search(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL).group(1))  # type: ignore[union-attr]
    assert len(vectors) >= 4
    for vector in vectors:
        media = tuple(MultimodalItem(*item) for item in vector["media"])
        chain = KeyChain(Identity(vector["model"], vector["cache_salt"], vector["lora"]), media)
        tokens = list(range(vector["first_token"], vector["first_token"] + vector["num_tokens"]))
        chain.extend(tokens)
        assert [chain.value_at(16 * (i + 1)).hex() for i in range(len(vector["chain"]))] == vector["chain"]
        by_hand = by_definition(vector["model"], vector["cache_salt"], vector["lora"], tokens, media)
        assert [v.hex() for v in by_hand] == vector["chain"]


def test_published_vectors_of_token_digests() -> None:
    """Of the second list; by the page's definition, and by the code."""
    vectors = json.loads(re.findall(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)[1])
    assert len(vectors) >= 3
    for vector in vectors:
        model, salt, count = vector["model"], vector["cache_salt"], vector["num_tokens"]
        tokens = list(range(vector["first_token"], vector["first_token"] + count))
        root = hashlib.sha256(b"kvferry-key-v1" + field(model) + field(salt) + field(None)).digest()
        start = [root, *by_definition(model, salt, None, tokens)][count // 16]
        rest = b"".join(struct.pack("<I", token) for token in tokens[count // 16 * 16 :])
        by_hand = hashlib.sha256(b"kvferry-tokens-v1" + struct.pack("<I", count) + start + rest).hexdigest()
        longer = [*tokens, 1, 2, 3]
        assert by_hand == vector["digest"]
        assert TokenDigests(KeyChain(Identity(model, salt)), longer).at(count).hex() == vector["digest"]


def test_store_key_appends_group_and_rank() -> None:
    assert store_key(b"\x01" * 32, 2, 258) == b"\x01" * 32 + b"\x02\x00" + b"\x02\x01"


def test_digest_sees_one_flipped_bit() -> None:
    data = bytearray(range(256)) * 16
    before = digest(data)
    data[1000] ^= 1
    assert len(before) == 16
    assert digest(data) != before


@pytest.fixture
def model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    header = b"{}      "
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(1 << 20))
    return folder


def test_one_changed_weight_byte_is_another_model(model_folder: Path) -> None:
    before = fingerprint_folder(model_folder)
    assert before == fingerprint_folder(model_folder)
    weights = model_folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint_folder(model_folder) != before
    (model_folder / "config.json").write_text('{"rope_theta": 1}')
    third = fingerprint_folder(model_folder)
    assert third.startswith("sha256:")
    assert third != before


def test_known_files_are_not_read_again(model_folder: Path) -> None:
    seen: list[int] = []
    fingerprint_folder(model_folder, lambda done, total: seen.append(done))
    assert seen[-1] == sum(f.stat().st_size for f in model_folder.iterdir())
    seen.clear()
    fingerprint_folder(model_folder, lambda done, total: seen.append(done))
    assert seen == []


def test_of_large_models_each_byte_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings that differ in one matrix, or in rows of one, have equal headers and mostly equal bytes."""
    monkeypatch.setattr(fingerprint, "LARGE_FOLDER_BYTES", 1 << 19)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, files = tmp_path / "config.json", [tmp_path / f"model-{i}.safetensors" for i in range(3)]
    config.write_text("{}")
    for file in files:
        file.write_bytes(bytes(6 << 20))
    hasher = hashlib.sha256()
    for file in (config, *files):
        name, data = file.name.encode(), file.read_bytes()
        hasher.update(
            struct.pack("<I", len(name)) + name + struct.pack("<Q", len(data)) + hashlib.sha256(data).digest()
        )
    found = {fingerprint_folder(tmp_path)}
    assert found == {f"files:{hasher.hexdigest()}"}
    (memo,) = (tmp_path / "cache").glob("**/*.json")
    memo.write_text(memo.read_text().replace('"files:', '"sampled:'))
    assert {fingerprint_folder(tmp_path)} == found, "what an earlier version noted of large files is not whole"
    for file in files:
        with file.open("r+b") as stream:
            stream.seek((3 << 20) + 12345)
            stream.write(b"x")
        found.add(fingerprint_folder(tmp_path))
    assert len(found) == 4


def test_no_weights_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights_version"):
        fingerprint_folder(tmp_path)


def index_of(*names: str) -> str:
    return json.dumps({"weight_map": {f"layer{i}": name for i, name in enumerate(names)}})


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("model.safetensors.index.json", index_of("a.safetensors"), index_of("b.safetensors")),
        ("sub/shard.safetensors", "old weights", "new weights"),
        ("pytorch_model.bin", "old weights", "new weights"),
        ("consolidated.pth", "old weights", "new weights"),
        ("modeling_own.py", "scale = 1", "scale = 2"),
        ("named/by_config.safetensors", "old weights", "new weights"),
        ("named/shard.safetensors", "old weights", "new weights"),
        *(
            (name, '{"zero_point": true}', '{"zero_point": false}')
            for name in (
                "quant_config.json",
                "quantize_config.json",
                "quantization_config.json",
                "hf_quant_config.json",
                "kv_cache_scales.json",
                "params.json",
            )
        ),
    ],
)
def test_every_file_that_weights_may_come_from_counts(model_folder: Path, name: str, before: str, after: str) -> None:
    """Whatever else lies beside it: `extra.safetensors` may be one that no host reads."""
    (model_folder / "sub").mkdir()
    (model_folder / "sub" / "shard.safetensors").write_text("shard")
    (model_folder / "a.safetensors.index.json").write_text(index_of("sub/shard.safetensors"))
    if name.startswith("named/"):  # transformers takes one file of weights, or an index, by this key
        (model_folder / "named").mkdir()
        (model_folder / "named" / "w.safetensors.index.json").write_text(index_of("shard.safetensors"))
        is_index = name.endswith("shard.safetensors")
        chosen = "named/w.safetensors.index.json" if is_index else name
        (model_folder / "config.json").write_text(json.dumps({"transformers_weights": chosen}))
    plain = fingerprint_folder(model_folder)
    (model_folder / name).write_text(before)
    first = fingerprint_folder(model_folder)
    assert first != plain
    (model_folder / name).write_text(after)
    assert fingerprint_folder(model_folder) != first


def test_what_only_tokenizers_read_does_not_count(model_folder: Path) -> None:
    plain = fingerprint_folder(model_folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md", "merges.txt"):
        (model_folder / name).write_text("{}")
    assert fingerprint_folder(model_folder) == plain


def test_a_folder_of_one_file_of_weights_has_the_fingerprint_it_always_had(model_folder: Path) -> None:
    expected = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        data = (model_folder / name).read_bytes()
        expected.update(struct.pack("<I", len(name)) + name.encode() + struct.pack("<Q", len(data)) + data)
    assert fingerprint_folder(model_folder) == f"sha256:{expected.hexdigest()}"


def test_first_tokens_are_bound_to_prompt_settings_engine_and_order() -> None:
    facts = '{"seed": "5"}'
    data = b"kvferry-first-tokens-v1" + b"p" * 32 + struct.pack("<I", 13) + facts.encode()
    data += struct.pack("<I", 2) + b"c0" + struct.pack("<II", 7, 900)
    assert first_tokens_digest(b"p" * 32, [7, 900], facts, "c0") == hashlib.sha256(data).digest()
