"""What packages add: names, which of several counts, what is said of those that cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.packages import install

from kvferry.contract.plugins import KnownName, Registry, read_offers
from kvferry.errors import ConfigError

GROUP = "kvferry.things"
FILES = {
    "plug_things.py": "class Own:\n    from_config = 1\nclass Good:\n    from_config = 2\nclass Bare: pass\n",
    "plug_other.py": "from plug_things import *\n",
    "plug_raises.py": "raise RuntimeError('no card here')",
    "plug_exits.py": "raise SystemExit(3)",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("plug_")]:
        del sys.modules[name]


@pytest.fixture
def registry(folder: Path) -> Registry:
    return Registry(GROUP, "thing", {"own": "plug_things:Own"})


def offer(folder: Path, package: str, **points: str) -> None:
    install(folder, package, points, group=GROUP)


def test_an_installed_name_is_found_when_asked_for(registry: Registry, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"x\.type='good' is unknown \(known: own\)"):
        registry.find("good", "x.type")
    offer(folder, "theirs", good="plug_things:Good [extra]")
    assert registry.names() == ["own", "good"]
    registry.check_name("good", "x.type")
    assert "plug_things" not in sys.modules, "a name imports nothing"
    assert registry.find("good", "x.type").from_config == 2
    assert registry.find("own", "x.type").from_config == 1


def test_unknown_names_list_built_in_and_installed_ones(registry: Registry, folder: Path) -> None:
    offer(folder, "theirs", good="plug_things:Good")
    with pytest.raises(ConfigError, match=r"did you mean 'good'\? known: auto, good, own\)"):
        registry.check_name("goo", "x", also=["auto"])


def test_a_built_in_name_stays_the_built_in_and_that_is_told_once(
    registry: Registry, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    offer(folder, "grabby", own="plug_things:Good")
    for _ in range(2):
        assert registry.find("own", "x").from_config == 1
    assert [record.getMessage() for record in caplog.records] == [
        "kvferry's own thing 'own' hides the entry point plug_things:Good of package grabby"
    ]
    assert registry.known()[1] == KnownName(
        "own", "entry point plug_things:Good of package grabby", "hidden by kvferry's own thing of that name"
    )


def test_one_name_of_two_packages_is_an_error_that_names_both(registry: Registry, folder: Path) -> None:
    offer(folder, "one", good="plug_things:Good", same="plug_things:Good")
    offer(folder, "two", good="plug_other:Good", same="plug_things:Good")
    with pytest.raises(ConfigError, match=r"several packages: .*of package (one|two).*of package (one|two)"):
        registry.find("good", "x")
    assert registry.find("same", "x").from_config == 2


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("plug_nothing:X", ["package theirs", "cannot import plug_nothing", "ModuleNotFoundError"]),
        ("plug_raises:X", ["package theirs", "RuntimeError: no card here"]),
        ("plug_exits:X", ["package theirs", "SystemExit: 3"]),
        ("plug_things:Godo", ["plug_things has no thing class 'Godo'", "did you mean 'Good'"]),
        ("plug_things:Bare", ["has no thing class 'Bare'", "from_config"]),
    ],
)
def test_what_cannot_be_used_is_named_with_its_package(
    registry: Registry, folder: Path, target: str, words: list[str]
) -> None:
    offer(folder, "theirs", bad=target)
    with pytest.raises(ConfigError, match="x='bad'") as caught:
        registry.find("bad", "x")
    assert all(word in str(caught.value) for word in words), caught.value
    (_, bad) = registry.known()
    assert words[-1] in (bad.problem or "")


def test_broken_metadata_hides_no_built_in(registry: Registry, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    offer(folder, "broken")
    (folder / "broken-2.5.dist-info/entry_points.txt").write_text(f"[{GROUP}]\nthis is no entry point\n")
    assert read_offers(GROUP) == []
    assert registry.names() == ["own"]
    assert registry.find("own", "x").from_config == 1
    assert "cannot read the entry points" in caplog.text
