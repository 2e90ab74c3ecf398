"""Every `--help` at 80 columns: whole, and each option says its unit and its default."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kvferry.cli.main import app

UNITS = (
    r"seconds|tokens|bytes|blocks|requests|connections|threads|port|seed|number of a layer|gib|failures|tries|pieces"
    r"|runs"
)
GIVEN_BY_TYPER = {"--install-completion", "--show-completion", "--help"}


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))
OPTIONS = [
    (path, option)
    for path, command in COMMANDS.items()
    for option in command.params
    if option.param_type_name == "option" and not GIVEN_BY_TYPER & set(option.opts)
]


def shown(path: tuple[str, ...]) -> str:
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"}, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def one_line(text: str) -> str:
    """Without line breaks: a word may be broken after a hyphen."""
    return re.sub(r"-\s+", "-", re.sub(r"\s+", " ", text))


def test_all_commands_are_seen() -> None:
    assert {("serve",), ("proxy",), ("doctor",), ("demo",), ("bench", "decode")} <= COMMANDS.keys()
    assert len(OPTIONS) > 60


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_nothing_is_cut_off_and_nothing_is_wider_than_80_columns(path: tuple[str, ...]) -> None:
    output, command = shown(path), COMMANDS[path]
    assert max(map(len, output.splitlines())) <= 80
    assert "\u2026" not in output
    text = one_line(output)
    for name, child in getattr(command, "commands", {}).items():
        first_sentence = child.help.split("\n\n")[0]
        assert f"{name} {one_line(first_sentence).strip()}" in text, "its line in the list is cut"
    for option in command.params:
        assert all(name in output for name in [*option.opts, *option.secondary_opts] if name.startswith("-"))
        assert one_line(option.help) in text, option.name
    assert one_line(command.help).strip() in text


@pytest.mark.parametrize(
    ("path", "option"), OPTIONS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else value.name
)
def test_an_option_says_its_unit_and_what_holds_without_it(path: tuple[str, ...], option: Any) -> None:
    start = one_line(shown(path)).partition(f"{option.opts[0]} ")[2]
    if re.match(r"<(list\[)?(int|float)|SIZE", start):
        assert re.search(UNITS, option.help.lower()), option.help
    is_switch = option.is_flag and not option.secondary_opts
    if is_switch or option.required:
        return
    text = one_line(option.help)
    mine = start[: start.index(text) + len(text) + len(" [default: ")]
    assert " [default: " in mine or "default" in option.help, option.help


def test_the_package_is_a_command_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvferry", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert re.fullmatch(r"kvferry \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(shell: str) -> None:
    run = [sys.executable, "-c", "import sys; sys.argv[0] = 'kvferry'; from kvferry.cli.main import main; main()"]
    words = "kvferry serve --kv-off"
    spoken = {
        "_KVFERRY_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": "2",
        "_TYPER_COMPLETE_ARGS": words,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **spoken})
    assert "--kv-offloading-size" in done.stdout, done.stderr
    assert "--kv-offloading-backend" in done.stdout
    assert "--host" not in done.stdout
