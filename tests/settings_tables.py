"""Settings that users get wrong, with the words of their errors, and right: doctor and both hosts judge them alike.

tests/flow/test_bad_input.py has doctor and the embedded engine, tests/vllm/test_settings.py doctor and vLLM.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvferry.cli.diagnosis import diagnose
from kvferry.cli.options import Host
from kvferry.config import parse_size, transfer_config
from kvferry.engine.config import EngineOptions
from kvferry.errors import ConfigError
from kvferry.testing.stub_model import StubModel

MiB = 1 << 20
ROOT = Path(__file__).parents[1]


def transfer(extra: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    settings = {"weights_version": "1", "cpu_bytes_to_use": MiB, **(extra or {})}
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {name: value for name, value in settings.items() if value is not None},
        **fields,
    }


def disk(**settings: Any) -> dict[str, Any]:
    return {"secondary_tiers": [{"type": "fs", **settings}]}


def offloading(size: Any = 0.01, **settings: Any) -> dict[str, Any]:
    """Settings of `LLM` for an implied connector."""
    return {"kv_offloading_size": size, **settings}


def connector(**fields: Any) -> dict[str, Any]:
    return {"kv_transfer_config": transfer(**fields)}


def extra(**settings: Any) -> dict[str, Any]:
    return {"kv_transfer_config": transfer(settings)}


def raw(config: Any) -> dict[str, Any]:
    return {"kv_transfer_config": config}


def tier(tmp: Path, **settings: Any) -> dict[str, Any]:
    return extra(**disk(path=str(tmp / "kv"), **settings))


def named(name: str, **settings: Any) -> dict[str, Any]:
    """Another connector than the OffloadingConnector, with these settings alone."""
    return raw({"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": settings})


def held(tmp: Path) -> dict[str, Any]:
    """A folder that somebody holds for as long as the test runs."""
    (tmp / "kv").mkdir()
    HELD.append(os.open(tmp / "kv" / "LOCK", os.O_RDWR | os.O_CREAT, 0o600))
    os.write(HELD[-1], b"4711 on a host")
    fcntl.flock(HELD[-1], fcntl.LOCK_EX)
    return tier(tmp)


def taken_port() -> dict[str, Any]:
    """A port that is listened on for as long as the test runs."""
    TAKEN.append(socket.create_server(("127.0.0.1", 0)))
    return named("P2PConnector", port=TAKEN[-1].getsockname()[1])


def let_go() -> None:
    """Of what `held` and `taken_port` hold."""
    while HELD:
        os.close(HELD.pop())
    while TAKEN:
        TAKEN.pop().close()


def _file(tmp: Path, text: str = "") -> Path:
    (tmp / "file").write_text(text)
    return tmp / "file"


HELD: list[int] = []
TAKEN: list[socket.socket] = []


Case = tuple[str, dict[str, Any] | Callable[[Path], dict[str, Any]], list[str]]
TYPO = {"kv_conector": "OffloadingConnector"}
CASES: list[Case] = [
    # JSON
    ("bad JSON", raw('{"kv_connector": "Off'), ["kv_transfer_config", "not valid JSON", "character 17"]),
    ("JSON list", raw("[]"), ["kv_transfer_config must be a JSON object", "'[]'"]),
    ("JSON text", raw('"OffloadingConnector"'), ["kv_transfer_config must be a JSON object"]),
    ("key twice", raw('{"kv_role": "kv_both", "kv_role": "kv_both"}'), ["kv_transfer_config", "'kv_role' twice"]),
    ("not a number", raw('{"kv_port": NaN}'), ["kv_transfer_config", "NaN", "give a number"]),
    ("number for a config", raw(3), ["kv_transfer_config=3", "JSON text"]),
    # keys, types and values of kv_transfer_config
    ("unknown key", connector(kv_rol="x"), ["kv_transfer_config.kv_rol", "'kv_role'"]),
    ("typo in the first key", raw(TYPO), ["kv_transfer_config.kv_conector", "'kv_connector'"]),
    ("connector no text", connector(kv_connector=7), ["kv_transfer_config.kv_connector=7 must be text or null"]),
    ("engine_id no text", connector(engine_id=5), ["kv_transfer_config.engine_id=5 must be text or null"]),
    ("role no text", connector(kv_role=3), ["kv_transfer_config.kv_role=3", "kv_producer, kv_consumer, kv_both"]),
    ("unknown role", connector(kv_role="kv_bot"), ["kv_transfer_config.kv_role='kv_bot'", "did you mean 'kv_both'"]),
    ("port as text", connector(kv_port="x"), ["kv_transfer_config.kv_port='x' must be int"]),
    ("port true", connector(kv_port=True), ["kv_transfer_config.kv_port=True must be int"]),
    ("broken port", connector(kv_port=80.5), ["kv_transfer_config.kv_port=80.5 must be int"]),
    ("port below", connector(kv_port=-1), ["kv_transfer_config.kv_port=-1 must be at least 0"]),
    ("port above", connector(kv_port=65536), ["kv_transfer_config.kv_port=65536 must be at most 65535"]),
    (
        "settings no object",
        connector(kv_connector_extra_config=[]),
        ["kv_transfer_config.kv_connector_extra_config=[] must be an object"],
    ),
    (
        "settings null",
        connector(kv_connector_extra_config=None),
        ["kv_transfer_config.kv_connector_extra_config=None must be an object"],
    ),
    (
        "flag as text",
        connector(enable_permute_local_kv="no"),
        ["kv_transfer_config.enable_permute_local_kv='no' must be bool"],
    ),
    (
        "module path no text",
        connector(kv_connector_module_path=["m"]),
        ["kv_transfer_config.kv_connector_module_path=['m'] must be text or null"],
    ),
    ("device no text", connector(kv_buffer_device=0), ["kv_transfer_config.kv_buffer_device=0 must be text"]),
    (
        "bad policy",
        connector(kv_load_failure_policy="retry"),
        ["kv_transfer_config.kv_load_failure_policy='retry'", "recompute"],
    ),
    ("policy null", connector(kv_load_failure_policy=None), ["kv_transfer_config.kv_load_failure_policy=None"]),
    # combinations of them
    ("no role", raw({"kv_connector": "OffloadingConnector"}), ["kv_role", "kv_both"]),
    ("role of none", raw({"kv_role": "kv_both"}), ["kv_transfer_config.kv_role='kv_both'", "kv_connector is not"]),
    (
        "settings of none",
        raw({"kv_connector_extra_config": {"a": 1}}),
        ["kv_transfer_config.kv_connector_extra_config={'a': 1}", "kv_connector is not"],
    ),
    (
        "module of none",
        raw({"kv_connector_module_path": "m"}),
        ["kv_transfer_config.kv_connector_module_path='m'", "kv_connector is not"],
    ),
    (
        "unknown connector",
        connector(kv_connector="OfloadingConnector"),
        ["'OfloadingConnector'", "'OffloadingConnector'"],
    ),
    ("empty module path", connector(kv_connector_module_path=""), ["kv_connector_module_path is empty"]),
    ("no module", connector(kv_connector_module_path="nothing.here"), ["kv_connector_module_path", "'nothing'"]),
    (
        "no class",
        connector(kv_connector_module_path="kvferry.offloading.connector", kv_connector="OffloadConnector"),
        ["'OffloadConnector'", "'OffloadingConnector'"],
    ),
    # settings of the OffloadingConnector
    (
        "unknown setting",
        extra(cpu_byte_to_use=1),
        ["kv_connector_extra_config.cpu_byte_to_use is unknown", "'cpu_bytes_to_use'"],
    ),
    ("no host memory", extra(cpu_bytes_to_use=None), ["kv_connector_extra_config.cpu_bytes_to_use is missing"]),
    ("memory as text", extra(cpu_bytes_to_use="1Gig"), ["kv_connector_extra_config.cpu_bytes_to_use='1Gig'", "8GiB"]),
    ("memory below a chunk", extra(cpu_bytes_to_use=100), ["cpu_bytes_to_use=100", "raise it to at least"]),
    ("no memory at all", extra(cpu_bytes_to_use=0), ["cpu_bytes_to_use=0 must be at least 1"]),
    ("more memory than there is", extra(cpu_bytes_to_use=1 << 50), ["/dev/shm", "lower cpu_bytes_to_use", "arena_dir"]),
    ("odd chunk", extra(chunk_tokens=40), ["chunk_tokens=40", "multiple of 16", "32 and 48"]),
    ("small chunk", extra(chunk_tokens=8), ["chunk_tokens=8 must be at least 16"]),
    ("async as text", extra(load_async="yes"), ["kv_connector_extra_config.load_async='yes' must be bool"]),
    ("timeout below 0", extra(stall_timeout_s=-1), ["stall_timeout_s=-1 must be at least 0"]),
    ("timeout no number", extra(shutdown_timeout_s=float("nan")), ["shutdown_timeout_s=nan must be a finite number"]),
    ("empty arena folder", extra(arena_dir=""), ["kv_connector_extra_config.arena_dir must not be empty"]),
    ("arena in a file", lambda tmp: extra(arena_dir=str(_file(tmp))), ["file", "set arena_dir to another folder"]),
    ("no weights version", extra(weights_version=None), ["set weights_version", "random"]),
    # tiers
    ("tiers no list", extra(secondary_tiers="fs"), ["kv_connector_extra_config.secondary_tiers='fs'", "list"]),
    ("tier no object", extra(secondary_tiers=["fs"]), ["kv_connector_extra_config.secondary_tiers=['fs']", "objects"]),
    ("no tier type", extra(secondary_tiers=[{"path": "x"}]), ["secondary_tiers[0].type is missing", "fs"]),
    ("unknown tier", extra(secondary_tiers=[{"type": "fss"}]), ["secondary_tiers[0].type='fss'", "'fs'"]),
    ("tier type no text", extra(secondary_tiers=[{"type": 3}]), ["secondary_tiers[0].type=3", "text"]),
    ("no path", extra(**disk()), ["secondary_tiers[0].path is missing"]),
    ("tier key", lambda tmp: tier(tmp, max_byte=1), ["secondary_tiers[0].max_byte is unknown", "'max_bytes'"]),
    ("quota as text", lambda tmp: tier(tmp, max_bytes="1G"), ["secondary_tiers[0].max_bytes='1G' must be", "8GB"]),
    ("quota below a chunk", lambda tmp: tier(tmp, max_bytes=5000), ["max_bytes 5000", "raise max_bytes"]),
    ("no threads", lambda tmp: tier(tmp, num_threads=0), ["num_threads", "at least 1"]),
    ("path is a file", lambda tmp: extra(**disk(path=str(_file(tmp)))), ["secondary_tiers[0]", "no writable folder"]),
    (
        "two tiers of one name",
        lambda tmp: extra(secondary_tiers=[{"type": "fs", "path": str(tmp / n)} for n in "ab"]),
        ["name of its own", "['fs', 'fs']"],
    ),
    (
        "no tier module",
        extra(secondary_tiers=[{"type": "T", "tier_module_path": "no.module"}]),
        ["secondary_tiers[0]", "no.module"],
    ),
    # implied offloading
    (
        "connector and size",
        offloading(**connector()),
        ["kv_transfer_config.kv_connector='OffloadingConnector'", "kv_offloading_size=0.01", "cpu_bytes_to_use"],
    ),
    (
        "module path and size",
        offloading(**raw({"kv_connector_module_path": "m"})),
        ["kv_transfer_config.kv_connector_module_path='m'", "kv_offloading_size=0.01"],
    ),
    (
        "another role and size",
        offloading(**raw({"kv_role": "kv_producer"})),
        ["kv_transfer_config.kv_role='kv_producer'", "kv_offloading_size=0.01"],
    ),
    (
        "size twice",
        offloading(**raw({"kv_connector_extra_config": {"cpu_bytes_to_use": 1}})),
        ["kv_connector_extra_config.cpu_bytes_to_use=1", "kv_offloading_size=0.01"],
    ),
    ("size 0", offloading(0), ["kv_offloading_size=0 must be a number above 0 (GiB"]),
    ("size below 0", offloading(-1.5), ["kv_offloading_size=-1.5 must be a number above 0"]),
    ("size inf", offloading(float("inf")), ["kv_offloading_size=inf must be a number above 0"]),
    ("size nan", offloading(float("nan")), ["kv_offloading_size=nan must be a number above 0"]),
    ("size as text", offloading("4"), ["kv_offloading_size='4' must be a number above 0"]),
    ("size true", offloading(True), ["kv_offloading_size=True must be a number above 0"]),
    ("unknown backend", offloading(kv_offloading_backend="lmcach"), ["kv_offloading_backend='lmcach'", "'lmcache'"]),
    (
        "backend without size",
        {"kv_offloading_backend": "native"},
        ["kv_offloading_backend='native' needs kv_offloading_size"],
    ),
    # the engine's own
    ("no block size", {"block_size": 0}, ["block_size=0 must be a whole number of at least 1"]),
    ("cache of no size", {"num_kv_blocks": None, "kv_cache_bytes": "much"}, ["kv_cache_bytes='much' must be", "8GB"]),
    ("block size as text", {"block_size": "16"}, ["block_size='16'"]),
    ("no sequences", {"max_num_seqs": 0}, ["max_num_seqs=0"]),
    ("no tokens", {"max_num_batched_tokens": -5}, ["max_num_batched_tokens=-5"]),
    ("cache sized twice", {"kv_cache_bytes": 1 << 20}, ["num_kv_blocks and kv_cache_bytes", "once"]),
    ("cache too small", {"num_kv_blocks": 2, "max_model_len": 64}, ["too small", "num_kv_blocks=5"]),
    ("longer than the model", {"max_model_len": 5000}, ["max_model_len=5000", "limit of 4096"]),
    ("unknown dtype", {"dtype": "float8"}, ["dtype='float8' is not one of", "bfloat16"]),
    ("unknown device", {"device": "tpu"}, ["device='tpu' is not a device"]),
    ("device not here", {"device": "meta"}, ["device='meta' is not available", "cpu"]),
    ("device as number", {"device": 0}, ["device=0 is not available"]),
    ("seed as text", {"seed": "1"}, ["seed='1' must be a whole number"]),
    ("prefix caching as text", {"enable_prefix_caching": "no"}, ["enable_prefix_caching='no'", "True or False"]),
    ("runner as text", {"use_v2_model_runner": "1"}, ["use_v2_model_runner='1'", "True or False"]),
    ("hybrid as number", {"disable_hybrid_kv_cache_manager": 0}, ["disable_hybrid_kv_cache_manager=0"]),
    # settings and needs of the other connectors
    ("P2P key", named("P2PConnector", trnsport="shm"), ["kv_connector_extra_config.trnsport", "'transport'"]),
    ("P2P transport", named("P2PConnector", transport="harbour"), ["transport='harbour'", "auto, nixl, shm"]),
    ("P2P peers", named("P2PConnector", allowed_peers=[1]), ["allowed_peers=[1]", "list of texts"]),
    ("P2P key file", named("P2PConnector", key_file="/nowhere"), ["key_file='/nowhere'", "cannot be read"]),
    ("P2P short key", lambda tmp: named("P2PConnector", key_file=str(_file(tmp, "k"))), ["fewer than 16 bytes"]),
    ("P2P key file in a list", named("MultiConnector", connectors=[{
        "kv_connector": "P2PConnector", "kv_connector_extra_config": {"key_file": "/nowhere"},
    }]), ["connector", "[0]", "key_file='/nowhere'"]),
    ("P2P without key", named("P2PConnector", host="0.0.0.0"), ["host='0.0.0.0'", "set key_file"]),
    ("P2P port taken", lambda tmp: taken_port(), ["cannot be bound", "a port that is free"]),
    ("P2P mode", named("NixlPullConnector", mode="push"), ["mode='push'", "NixlConnector"]),
    ("example without folder", named("ExampleConnector", weights_version="1"), ["shared_storage_path is missing"]),
    (
        "example in a file",
        lambda tmp: named("ExampleConnector", weights_version="1", shared_storage_path=str(_file(tmp))),
        ["shared_storage_path=", "no writable folder"],
    ),
    ("example without version", lambda tmp: named("ExampleConnector", shared_storage_path=str(tmp)), ["set weights_v"]),
    ("hidden states", named("ExampleHiddenStatesConnector", shared_storage_path="x"), ["hidden_state_layers"]),
    ("noise", named("DecodeBenchConnector", fill_stdd=1), ["fill_stdd", "'fill_std'"]),
    ("recovery", named("LoadRecoveryExampleConnector", report_by="letter"), ["report_by='letter'"]),
    ("LMCache", named("LMCacheMPConnector", weights_version="1", prt=1), ["kv_connector_extra_config.prt", "'port'"]),
    ("LMCache version", named("LMCacheMPConnector"), ["set weights_version"]),
    ("no children", named("MultiConnector", connectors=[]), ["connectors is empty"]),
    ("child's key", named("MultiConnector", connectors=[{
        "kv_connector": "OffloadingConnector", "kv_connector_extra_config": {"cpu_byte_to_use": 1},
    }]), ["[0]", "cpu_byte_to_use"]),
    # configurations written for vLLM
    ("vLLM's name", named("FerryOffloadingConnector", cpu_byte_to_use=1), ["cpu_byte_to_use", "'cpu_bytes_to_use'"]),
    (
        "vLLM's form",
        lambda tmp: connector(
            kv_connector_module_path="kvferry.vllm",
            kv_connector_extra_config={
                "cpu_bytes_to_use": MiB, "weights_version": "1", **disk(path=str(tmp), max_byte=1)
            },
        ),
        ["secondary_tiers[0].max_byte is unknown", "'max_bytes'"],
    ),
    (
        "no such form",
        connector(kv_connector="OfloadingConnector", kv_connector_module_path="kvferry.vllm"),
        ["'OfloadingConnector'"],
    ),
    # what several together lack
    (
        "two tiers of one folder",
        lambda tmp: extra(secondary_tiers=[
            {"type": "fs", "path": str(tmp / path), "name": path} for path in ("kv", "./x/../kv")
        ]),
        ["kv"],
    ),
    (
        "two parts with one folder",
        lambda tmp: named("MultiConnector", connectors=[tier(tmp)["kv_transfer_config"]] * 2),
        [os.sep + "kv"],
    ),
    ("two P2P parts", named("MultiConnector", connectors=[{
        "kv_connector": "P2PConnector", "kv_connector_extra_config": {"transport": "shm", "weights_version": "1"},
    }] * 2), ["both want to allocate the KV memory", "use one of them"]),
    ("KV cache beyond memory", {"num_kv_blocks": 10**10}, ["cannot be allocated on cpu", "lower num_kv_blocks"]),
    ("KV cache bytes beyond memory", {"num_kv_blocks": None, "kv_cache_bytes": 10**15}, ["lower num_kv_blocks"]),
    ("hidden states for nobody", {"hidden_state_layers": [1]}, ["hidden_state_layers"]),
    ("relative module", connector(kv_connector_module_path=".mine"), ["'.mine'", "relative", "my_package.my_module"]),
    ("folder in use", held, ["is in use by another process (pid 4711", "set path to another folder"]),
]  # fmt: skip


def arguments(settings: dict[str, Any] | Callable[[Path], dict[str, Any]], tmp: Path) -> dict[str, Any]:
    """A case's arguments of `LLM`; `tmp` is a folder that it may fill."""
    return settings(tmp) if callable(settings) else settings


def in_vllm(given: dict[str, Any]) -> dict[str, Any]:
    """The same as vLLM takes it: kvferry's connectors with their module path, or a name that its plugin registers."""
    transfer = given["kv_transfer_config"]
    if not isinstance(transfer, dict) or "kv_connector" not in transfer or "kv_connector_module_path" in transfer:
        return given
    if str(transfer["kv_connector"]).startswith("Ferry"):
        return given
    return {**given, "kv_transfer_config": {**transfer, "kv_connector_module_path": "kvferry.vllm"}}


def doctors_word(given: dict[str, Any], host: Host = Host.EMBEDDED) -> list[str]:
    """What `kvferry doctor` finds wrong with arguments of `LLM`: its error, or the problems it lists."""
    settings = {"num_kv_blocks": 32, **given}
    transfer = [
        settings.pop(f"kv_{name}", None) for name in ("transfer_config", "offloading_size", "offloading_backend")
    ]
    try:
        if settings.get("kv_cache_bytes") is not None:
            settings["kv_cache_bytes"] = parse_size(settings["kv_cache_bytes"], "kv_cache_bytes")
        return diagnose(StubModel(), EngineOptions(**settings), transfer_config(*transfer), host).problems
    except ConfigError as error:
        return [str(error)]


FOR_VLLM = [
    case
    for case in CASES
    if callable(case[1])
    or (isinstance(case[1].get("kv_transfer_config"), dict) and "kv_offloading_size" not in case[1])
]  # fmt: skip
"""Those that name a connector in a way that vLLM has too."""


def shared_key(tmp: Path) -> str:
    """A file that holds one."""
    (tmp / "kvferry.key").write_text("0123456789abcdef" * 4)
    (tmp / "kvferry.key").chmod(0o600)
    return str(tmp / "kvferry.key")


GOOD: list[tuple[str, dict[str, Any] | Callable[[Path], dict[str, Any]]]] = [
    ("sizes as text", lambda tmp: extra(cpu_bytes_to_use="1MiB", **disk(path=str(tmp / "kv"), max_bytes="4MB"))),
    ("sizes as floats", lambda tmp: extra(cpu_bytes_to_use=1e6, **disk(path=str(tmp / "a" / "b"), max_bytes=4e6))),
    ("two tiers", lambda tmp: extra(secondary_tiers=[
        {"type": "fs", "path": str(tmp / name), "name": name} for name in ("fast", "slow")
    ])),
    ("arena on a disk", lambda tmp: extra(arena_dir=str(tmp / "arena"))),
    ("chunks", extra(chunk_tokens=128, load_async=False, verify_host_loads=False)),
    ("vLLM's keys", extra(block_size=64, spec_name="CPUOffloadingSpec")),
    ("all fields", connector(
        engine_id="e", kv_buffer_device="cpu", kv_port=1, enable_permute_local_kv=False, kv_load_failure_policy="fail"
    )),
    ("producer", connector(kv_role="kv_producer")),
    ("P2P", named("P2PConnector", weights_version="1", transport="shm")),
    ("P2P of any transport", named("P2PConnector", weights_version="1")),
    ("P2P in a folder", lambda tmp: named("P2PConnector", weights_version="1", transport="shm", shm_dir=str(tmp))),
    ("P2P without version", named("P2PConnector", transport="shm")),
    ("P2P that pushes", lambda tmp: named(
        "P2PConnector", weights_version="1", transport="shm", mode="push", key_file=shared_key(tmp), host="0.0.0.0",
        advertised_host="10.0.0.1", allowed_peers=["10.0.0.0/8", "::1"], lease_s=30,
    )),
    ("example", lambda tmp: named("ExampleConnector", weights_version="1", shared_storage_path=str(tmp / "new"))),
    ("noise", named("DecodeBenchConnector")),
    ("recovery", named("LoadRecoveryExampleConnector", fail_block_indexes=[1], fail_every_nth_load=2)),
    ("Ferry's name", named("FerryOffloadingConnector", cpu_bytes_to_use=MiB, weights_version="1")),
    ("children that inherit", named("MultiConnector", connectors=[
        {"kv_connector": "DecodeBenchConnector"},
        {"kv_connector": "P2PConnector", "kv_connector_extra_config": {"transport": "shm", "weights_version": "1"}},
        {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [transfer()]}},
    ])),
    ("children of one class", lambda tmp: named("MultiConnector", load_policy="longest", connectors=[
        tier(tmp)["kv_transfer_config"], tier(tmp / "other")["kv_transfer_config"], transfer(),
    ])),
]  # fmt: skip
"""Settings that doctor has nothing against, and with which both hosts start."""

APART = {"ExampleHiddenStatesConnector", "LMCacheMPConnector"}
"""Need what no kv_transfer_config says: layers that are extracted, a server. Tests of their own start them."""


def documented() -> list[tuple[str, str]]:
    """Page and number, and text, of every configuration that README and docs show.

    Those of extending.md need packages that are not installed here: tests/flow/test_packages.py starts them.
    """
    found = []
    pages = {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {ROOT / "docs" / "guides" / "extending.md"}
    for page in sorted(pages):
        text = page.read_text()
        blocks = re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        blocks += re.findall(r"--kv-transfer-config '(\{.*?\})'", text)
        found += [(f"{page.name} {i}", block) for i, block in enumerate(blocks) if '"kv_connector"' in block]
    return [(name, text) for name, text in found if json.loads(text)["kv_connector"] not in APART]


def as_shown(text: str, tmp: Path) -> dict[str, Any]:
    """Arguments of `LLM` for a documented configuration: in folders that are ours, of a size that a test takes,
    without the reader's own connector, and with a version, for the tests' models have no weights to name KV by."""
    text = text.replace("/var/cache", str(tmp)).replace("kvferry.key", shared_key(tmp))
    config = json.loads(re.sub(r"(\d)e9\b", r"\1e6", text))
    parts = config.get("kv_connector_extra_config", {}).get("connectors", [])
    parts[:] = [part for part in parts if part["kv_connector"] != "MyConnector"]
    for part in (config, *parts):
        if "OffloadingConnector" in part["kv_connector"]:
            part["kv_connector_extra_config"]["weights_version"] = "1"
    return raw(config)


DOCUMENTED = documented()
