"""What README and docs tell people to type is what CI runs; their figures are those of committed results."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from kvferry.cli.main import app
from kvferry.config import KVTransferConfig
from kvferry.contract import KVConnectorFactory
from kvferry.kv_events import KVEventsConfig
from kvferry.offloading.config import OffloadingConfig
from kvferry.p2p.config import P2PConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}

EXECUTED_BY = {
    "make demo": ("Makefile", "kvferry demo"),
    "make venv": ("Makefile", "test: venv"),
    ".venv/bin/kvferry demo --json demo.json --plot demo.png": (
        "tests/e2e/test_demo.py",
        "kvferry demo --json demo.json --plot demo.png",
    ),
    "kvferry serve smollm2 --port 800": ("tests/e2e/test_proxy_p2p.py", 'commands("kvferry serve smollm2")'),
    "kvferry serve MODEL --host 10.0.0.": ("tests/e2e/test_proxy_p2p.py", 'commands("kvferry serve MODEL")'),
    "kvferry proxy --prefill http://10": ("tests/e2e/test_proxy_p2p.py", 'commands("kvferry proxy --prefill http://10'),
    "openssl rand": ("tests/e2e/test_proxy_p2p.py", 'commands("openssl rand")'),
    "curl -s": ("tests/e2e/test_proxy_p2p.py", 'commands("curl")'),
    "kvferry serve": ("tests/e2e/test_serve.py", '"--kv-offloading-size"'),
    "kvferry proxy": ("tests/e2e/test_proxy_process.py", 'fenced("proxy.md", "console")'),
    "kvferry connectors": ("tests/unit/cli/test_connectors.py", '"connectors"'),
    "kvferry bench decode": ("tests/model/test_bench_decode.py", '"bench", "decode"'),
    "kvferry doctor": ("tests/unit/cli/test_doctor.py", "doctor"),
    "vllm serve MODEL --host 10.0.0.": ("tests/vllm/test_p2p_serve.py", "^vllm serve MODEL .*$"),
    "vllm serve MODEL --shutdown-timeout 30 --kv-transfer-config": ("tests/vllm/test_serve.py", "readme_command(model"),
    "vllm serve MODEL --kv-transfer-config": ("tests/vllm/test_serve.py", "readme_command(model"),
    "pip install ./examples/": ("tests/flow/test_packages.py", "pip install ./examples/"),
    "python -m pytest examples/": ("tests/flow/test_packages.py", '"-m", "pytest"'),
    "lmcache server": ("tests/lmcache_server.py", '"server", "--host"'),
}
"""Command (or how it begins) -> the file that makes CI execute it, and the words there that do."""


def blocks(language: str) -> list[tuple[str, str]]:
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(name, match) for name, text in TEXT.items() for match in fence.findall(text)]


COMMANDS = [(name, line) for name, block in blocks("console") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_console_command_is_executed_by_ci(page: str, command: str) -> None:
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    if command in ci:
        return
    known = [start for start in EXECUTED_BY if command.startswith(start)]
    assert known, f"{page} tells people to run {command!r}, which nothing executes"
    file, words = EXECUTED_BY[known[0]]
    assert words in (ROOT / file).read_text()


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if "--kv-transfer-config '" in c[1]])
def test_configuration_in_a_command_is_valid(page: str, command: str) -> None:
    words = shlex.split(command)
    config = KVTransferConfig.parse(words[words.index("--kv-transfer-config") + 1])
    if words[0] == "vllm":
        assert config.kv_connector_module_path == "kvferry.vllm"
        assert OffloadingConfig.parse(config.kv_connector_extra_config).secondary_tiers
    else:
        assert KVConnectorFactory.resolve(config).name == config.kv_connector


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that `kvferry` with these words behind it runs, and the words that are its own."""
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


OURS = [(name, line) for name, line in COMMANDS if re.match(r"\S*kvferry (?!vllm)", line)]
SPANS = [(n, s) for n, t in TEXT.items() if n != "CHANGELOG.md" for s in re.findall(r"`kvferry ([a-z][^`\n]*)`", t)]


@pytest.mark.parametrize(("page", "line"), OURS)
def test_our_commands_take_what_documents_give_them(page: str, line: str) -> None:
    command, words = command_of([word for word in shlex.split(line, comments=True)[1:] if word != "&"])
    command.make_context("kvferry", words)  # a click.UsageError says what is wrong


def test_commands_and_options_that_documents_name_exist() -> None:
    assert len(SPANS) > 10
    for page, span in SPANS:
        command, words = command_of(span.split())
        assert not hasattr(command, "commands") or words[:1] in ([], ["--help"], ["--version"]), (page, span)
        known = {name for option in command.params for name in [*option.opts, *option.secondary_opts]}
        named = {word.partition("=")[0].rstrip(",") for word in words if word.startswith("--")}
        assert named <= known | {"--help", "--version"} or command.name == "vllm", (page, span)


NO_CONFIGURATIONS = ("docs/keys.md", "docs/guides/vllm.md", "docs/guides/extending.md")
"""Vectors; vLLM's, which tests/vllm/test_exports.py starts; packages', which tests/flow/test_packages.py does."""


@pytest.mark.parametrize(("page", "text"), [b for b in blocks("json") if b[0] not in NO_CONFIGURATIONS])
def test_json_is_a_configuration(page: str, text: str) -> None:
    values = json.loads(text)
    if "kv_connector" in values:
        transfer = KVTransferConfig.parse(values)
        resolved = KVConnectorFactory.resolve(transfer) if "module_path" not in text else None
        assert resolved is None or resolved.name == values["kv_connector"]
        assert values["kv_connector"] != "P2PConnector" or P2PConfig.parse(transfer.kv_connector_extra_config, {})
    else:
        assert KVEventsConfig.parse(values)


def test_every_setting_of_p2p_and_its_default_are_told() -> None:
    (section,) = re.findall(
        r"^## All settings\n(.*?)^## ", TEXT["docs/guides/disaggregation.md"], re.MULTILINE | re.DOTALL
    )
    told = re.findall(r"^\| `(\w+)` \| `(.+?)` \| \S", section, re.MULTILINE)
    assert told == [(field.name, json.dumps(field.default)) for field in dataclasses.fields(P2PConfig)]


def test_rates_of_transports_are_those_of_the_committed_run() -> None:
    result = json.loads((ROOT / "bench" / "results" / "p2p_transports.json").read_text())
    sizes = result["median_gb_per_s"]["raw nixl"]
    for case, rates in result["median_gb_per_s"].items():
        row = " | ".join([f"| {case}", *(f"{rates[size]:.1f}" if size in rates else "-" for size in sizes)])
        assert f"\n{row} |\n" in TEXT["docs/guides/disaggregation.md"]


def test_make_targets_in_the_text_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for text in TEXT.values() for target in re.findall(r"`make ([a-z-]+)`", text)}
    assert named <= targets


def test_links_between_pages_lead_somewhere() -> None:
    for name, text in TEXT.items():
        for link in re.findall(r"\]\(((?!https?:)[^)#]+)\)", text):
            assert ((ROOT / name).parent / link).exists(), f"{name} links to {link}"


def test_picture_in_readme_is_that_of_the_committed_run() -> None:
    result = json.loads((ROOT / "bench" / "results" / "demo.json").read_text())
    assert f"```text\n{result['terminal']}\n```" in TEXT["README.md"]


def test_console_pages_are_found() -> None:
    assert len(COMMANDS) >= 5, "the pattern for console blocks finds nothing"


def test_every_picture_stands_in_a_document_with_words_for_who_cannot_see_it() -> None:
    pictures = {path.resolve() for folder in ("bench/results", "docs/images") for path in (ROOT / folder).glob("*.png")}
    shown = {
        ((ROOT / name).parent / link).resolve(): words
        for name, text in TEXT.items()
        for words, link in re.findall(r"!\[(.*?)\]\((.+?)\)", text)
    }
    assert len(pictures) >= 7
    assert {path.name for path in pictures - shown.keys()} == set()
    assert all(len(words.split()) > 4 for words in shown.values())


def test_no_page_installs_from_an_index_that_has_no_kvferry() -> None:
    assert [name for name, text in TEXT.items() if "install 'kvferry" in text or "install kvferry" in text] == []


def test_messages_in_the_quickstart_are_those_of_the_source() -> None:
    """The words outside of ellipses and capitals, which stand for values."""
    _, _, table = TEXT["docs/quickstart.md"].partition("| you see |")
    messages = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    source = " ".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    plain = re.sub(r"\s+", " ", re.sub(r'"\s+f?"', "", source))
    assert len(messages) >= 3
    for message in messages:
        for piece in re.split(r"\.\.\.|\b[A-Z]+\b|[()]", message.replace("tier fs", "")):
            assert piece.strip(" :") in plain, message
