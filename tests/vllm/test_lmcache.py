"""LMCacheMPConnector in real vLLM, both implementations, against a real LMCache server."""

from __future__ import annotations

import os
import site
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_process import assert_same_tokens, random_prompt
from tests.lmcache_server import LMCacheServer, server_python

pytestmark = pytest.mark.skipif(
    not server_python().exists() and "KVFERRY_LMCACHE_PYTHON" not in os.environ,
    reason="no LMCache server here: `make test-lmcache` makes its virtual environment",
)
CHUNK = 256
SRC = Path(__file__).parents[2] / "src"
PROMPT = random_prompt(seed=11, num_tokens=2 * CHUNK + 70)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LMCacheServer]:
    started = LMCacheServer(tmp_path_factory.mktemp("lmcache") / "server.log")
    yield started
    started.kill()


@pytest.fixture
def package(tmp_path: Path) -> str:
    """A folder with lmcache and those of its dependencies that vLLM's environment lacks, for PYTHONPATH."""
    theirs = next(server_python().parents[1].glob("lib/python*/site-packages"))
    ours = Path(site.getsitepackages()[0])
    for found in theirs.iterdir():
        wanted = found.suffix != ".dist-info" or found.name.startswith("lmcache-")
        if wanted and found.suffix != ".pth" and not (ours / found.name).exists():
            (tmp_path / found.name).symlink_to(found)
    assert (tmp_path / "lmcache").exists()
    return str(tmp_path)


def llm_options(model: str, **extra: Any) -> dict[str, Any]:
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "block_size": 32,
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "disable_log_stats": False,
        "worker_extension_cls": "engine_child.WorkerProbe",
        "kv_transfer_config": {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "kvferry.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        },
    }


@pytest.mark.parametrize("asked", ["auto", "builtin", "package"])
def test_a_restarted_engine_hits(
    start_engine: Any, tiny_llama: str, server: LMCacheServer, package: str, asked: str
) -> None:
    """`auto` without the package; the other two with it. In one process, where the package brings numba in early."""
    extra: dict[str, Any] = {"implementation": asked, "lmcache.mp.port": server.port}
    path = [str(SRC), str(Path(__file__).parent)]
    if asked != "auto":
        path.append(package)
    if asked == "package":
        extra |= {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.mp_transfer_mode": "lmcache_driven"}
        origin = "kvferry.vllm:LMCacheMPConnector"
    else:
        extra |= {"lmcache.mp.host": "127.0.0.1", "weights_version": asked, "staging_bytes": 1 << 24}
        extra |= {"lookup_timeout_s": 60.0, "lmcache.mp.mq_timeout": 60.0}
        origin = "kvferry.vllm:LMCacheMPConnectorUpstream"
    env = {
        "PYTHONPATH": os.pathsep.join(path),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "LMCACHE_TRACK_USAGE": "false",
    }
    engine = start_engine(env, **llm_options(tiny_llama, **extra))
    assert engine.ask(connector=True)["origin"] == origin
    cold = engine.ask(generate=PROMPT, max_tokens=8)
    assert cold["external_hits"] == 0
    engine.restart()
    warm = engine.ask(generate=PROMPT, max_tokens=8)
    assert warm["external_hits"] == 2 * CHUNK
    assert_same_tokens(warm, cold)


def test_a_broken_package_is_an_error_not_a_silent_change(
    start_engine: Any, tiny_llama: str, server: LMCacheServer, tmp_path: Path
) -> None:
    (tmp_path / "lmcache").mkdir()
    (tmp_path / "lmcache" / "__init__.py").write_text("raise OSError('a library of the driver is missing')")
    env = {"PYTHONPATH": os.pathsep.join([str(SRC), str(Path(__file__).parent), str(tmp_path)])}
    with pytest.raises(AssertionError, match=r"LMCacheMPConnector cannot be used: OSError: a library of"):
        start_engine(env, **llm_options(tiny_llama, **{"lmcache.mp.port": server.port}))
