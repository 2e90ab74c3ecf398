"""kvferry without its extras: what cannot work says what to install, by names that an index has."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WITHOUT = """
import sys
for name in ("torch", "transformers", "safetensors", "gguf", "accelerate", "jinja2", "tokenizers", "sentencepiece"):
    sys.modules[name] = None  # as if it were not installed
"""
PROGRAMS = {
    "LLM": "from kvferry import LLM",
    "SamplingParams": "import kvferry; kvferry.SamplingParams",
    "the engine's outputs": "from kvferry import RequestOutput",
    "kvferry serve": "import sys; sys.argv = ['kvferry', 'serve', 'm']; from kvferry.cli.main import main; main()",
    "kvferry bench": "import sys; sys.argv = ['kvferry', 'bench', 'decode']; from kvferry.cli.main import main; main()",
    "kvferry demo": "import sys; sys.argv = ['kvferry', 'demo']; from kvferry.cli.main import main; main()",
}


def engine_packages() -> list[str]:
    """Names of what the `engine` extra asks for, from the installed package's own metadata."""
    lines = metadata.metadata("kvferry").get_all("Requires-Dist") or []
    return [line.split(";")[0].strip() for line in lines if "extra ==" in line and "engine" in line.split(";")[1]]


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_needs_the_engine_says_what_to_install(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + PROGRAMS[name]], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "torch" in said
    assert re.search(r"pip install '\.\[engine(,server)?\]'", said)
    assert "kvferry[" not in said, "kvferry is on no index"
    packages = engine_packages()
    assert any(text.startswith("transformers") for text in packages)
    for package in packages:
        assert package.split("==")[0].split(">=")[0] in said
    assert (done.returncode, "Traceback" in said) == ((2, False) if name.startswith("kvferry ") else (1, True))


def test_what_needs_no_engine_works() -> None:
    program = "import kvferry; print(kvferry.KVTransferConfig.__name__, kvferry.ConfigError.__name__)"
    done = subprocess.run([sys.executable, "-c", WITHOUT + program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["KVTransferConfig", "ConfigError"]


def test_no_message_installs_from_an_index_that_has_no_kvferry() -> None:
    """`pip install 'kvferry[...]'` finds nothing; `install_hint` names what does."""
    sources = [
        path for path in (ROOT / "src").rglob("*.py") if re.search(r"pip install ['\"]?kvferry", path.read_text())
    ]
    assert sources == []
