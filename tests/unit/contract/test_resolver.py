"""Where connectors come from, which of several wins, what the record says, and every way it can fail."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.packages import install

import kvferry
from kvferry.config import KVTransferConfig
from kvferry.contract import CONNECTOR_API, Origin, ResolvedConnector
from kvferry.contract.resolver import BUILT_INS, ConnectorResolver, KnownConnector
from kvferry.errors import (
    ConfigError,
    ConnectorAttributeNotFound,
    ConnectorImportFailed,
    ConnectorModuleNotFound,
    ConnectorNotFound,
)

MODULE = '''
from kvferry.contract import CONNECTOR_API, KVConnectorBase_V1, KVConnectorMetadata

class Plain(KVConnectorBase_V1):
    """Moves nothing.

    More text."""
    def start_load_kv(self, forward_context, **kwargs): pass
    def wait_for_layer_load(self, layer_name): pass
    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs): pass
    def wait_for_save(self): pass
    def get_num_new_matched_tokens(self, request, num_computed_tokens): return 0, False
    def update_state_after_alloc(self, request, blocks, num_external_tokens): pass
    def build_connector_meta(self, scheduler_output): return KVConnectorMetadata()

class OffloadingConnector(Plain):
    pass

class Chosen(Plain):
    """Supports hybrid caches when told so."""
    supports_v2_model_runner = True
    @classmethod
    def supports_hma_config(cls, kv_transfer_config):
        return kv_transfer_config.kv_connector_extra_config.get("hma", False)

major, minor = CONNECTOR_API
class NextMajor(Plain): CONNECTOR_API = (major + 1, 0)
class LastMajor(Plain): CONNECTOR_API = (major - 1, 9)
class NextMinor(Plain): CONNECTOR_API = (major, minor + 1)
class SameApi(Plain): CONNECTOR_API = (major, minor)
class OneNumber(Plain): CONNECTOR_API = (1,)
class TextApi(Plain): CONNECTOR_API = "1.0"

class Kwargs(Plain):
    def __init__(self, vllm_config, role, **kwargs): pass
class OtherNames(Plain):
    def __init__(self, config, my_role, kv_cache_config=None, extra=1): pass
class KeywordOnly(Plain):
    def __init__(self, vllm_config, role, *, kv_cache_config): pass
class Everything(Plain):
    def __init__(self, *args, **kwargs): pass
class OldShape(Plain):
    def __init__(self, vllm_config, role): pass
class OnlyOne(Plain):
    def __init__(self, vllm_config): pass
class WrongOrder(Plain):
    def __init__(self, kv_cache_config, vllm_config, role): pass
class Demanding(Plain):
    def __init__(self, vllm_config, *, folder, size, role_of_mine=0): pass
class PositionOnly(Plain):
    def __init__(self, vllm_config, role, kv_cache_config, /): pass
class Renamed(Plain):
    def __init__(self, vllm_config, role, cache): pass
'''
FOREIGN = """
class KVConnectorBase_V1:
    def __init__(self, vllm_config, role, kv_cache_config): pass
class Theirs(KVConnectorBase_V1): pass
class Old(KVConnectorBase_V1):
    def __init__(self, vllm_config, role): pass
"""
ADAPTER = """
from res_conn import Plain

def adapt(foreign):
    return type(foreign.__name__, (Plain,), {"foreign_class": foreign, "__module__": foreign.__module__})
"""
LAZY = """
def __getattr__(name):
    if name == "Late":
        import a_package_nobody_has
    raise AttributeError(name)
"""
FILES = {
    "res_conn.py": MODULE,
    "res_other.py": MODULE,
    "res_pack/__init__.py": "",
    "res_pack/leaf.py": "from res_conn import *\n",
    "res_raises.py": "\n\nraise RuntimeError('no card here')",
    "res_exits.py": "import sys\nprint('bye')\nsys.exit(3)",
    "res_needs.py": "import a_package_nobody_has",
    "res_inner.py": "import res_pack.nothing",
    "res_syntax.py": "def (",
    "res_foreign.py": FOREIGN,
    "res_adapter.py": ADAPTER,
    "res_lazy.py": LAZY,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("res_")]:
        del sys.modules[name]


@pytest.fixture
def resolver() -> ConnectorResolver:
    return ConnectorResolver(BUILT_INS)


def config(name: str | None, path: str | None = None, **more: Any) -> KVTransferConfig:
    return KVTransferConfig(name, kv_role="kv_both", kv_connector_module_path=path, **more)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# ---- origins and the record ------------------------------------------------------------------------------------


def test_record_of_a_built_in(resolver: ConnectorResolver) -> None:
    found = resolver.resolve(config("OffloadingConnector"))
    assert isinstance(found, ResolvedConnector)
    assert (found.name, found.origin) == ("OffloadingConnector", Origin.BUILT_IN)
    assert found.module == "kvferry.offloading.connector"
    assert found.file == str(Path(kvferry.__file__).parent / "offloading/connector.py")
    assert found.version == kvferry.__version__
    assert found.capabilities.supports_hma is True
    assert found.capabilities.supports_v2_model_runner is True
    assert found.capabilities.connector_api == CONNECTOR_API


def test_record_of_a_module_path(resolver: ConnectorResolver, folder: Path) -> None:
    found = resolver.resolve(config("Plain", "res_conn"))
    assert (found.origin, found.module, found.file) == (Origin.MODULE, "res_conn", str(folder / "res_conn.py"))
    assert found.version is None
    assert found.capabilities.supports_hma is False


def test_module_and_class_in_one_name(resolver: ConnectorResolver, folder: Path) -> None:
    found = resolver.resolve(config("res_pack.leaf:Plain"))
    assert (found.name, found.origin) == ("res_pack.leaf:Plain", Origin.MODULE)
    assert (found.module, found.file) == ("res_conn", str(folder / "res_conn.py")), "where the class really is"


@pytest.mark.usefixtures("folder")
def test_registered_names_are_imported_late(resolver: ConnectorResolver) -> None:
    resolver.register("Mine", "res_conn", "Plain")
    assert "res_conn" not in sys.modules
    found = resolver.resolve(config("Mine"))
    assert (found.name, found.origin, found.connector_class.__name__) == ("Mine", Origin.REGISTERED, "Plain")
    assert resolver.find_class_by_name("Mine") is found.connector_class
    with pytest.raises(ConfigError, match="already registered as res_conn:Plain"):
        resolver.register("Mine", "res_other", "Plain")


def test_entry_points_are_found_when_asked_for(resolver: ConnectorResolver, folder: Path) -> None:
    with pytest.raises(ConnectorNotFound):
        resolver.resolve(config("FromPackage"))
    install(folder, "their-package", {"FromPackage": "res_conn:Plain [extra]", "Broken": "res_raises:Plain"})
    found = resolver.resolve(config("FromPackage"))
    assert (found.origin, found.version, found.module) == (Origin.ENTRY_POINT, "2.5", "res_conn")
    assert resolver.find_class_by_name("FromPackage") is found.connector_class
    with pytest.raises(ConnectorImportFailed, match="entry point res_raises:Plain of package their-package"):
        resolver.resolve(config("Broken"))


def test_version_is_that_of_the_distribution_the_module_is_in(resolver: ConnectorResolver, folder: Path) -> None:
    install(folder, "res_pack", {}, version="7.1")
    (folder / "res_pack/own.py").write_text(MODULE)
    assert resolver.resolve(config("Plain", "res_pack.own")).version == "7.1"
    assert resolver.resolve(config("Plain", "res_conn")).version is None


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("hma", [True, False])
def test_capabilities_are_of_the_class_as_configured(resolver: ConnectorResolver, hma: bool) -> None:
    transfer = config("Chosen", "res_conn", kv_connector_extra_config={"hma": hma})
    found = resolver.resolve(transfer).capabilities
    assert found.supports_hma is hma
    assert found.supports_v2_model_runner is True


# ---- one name, several origins ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_module_path_wins_and_is_told_once_per_module(
    resolver: ConnectorResolver, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("res_conn", "res_conn", "res_other", "res_conn"):
        assert resolver.find_class(config("OffloadingConnector", path)).__module__ == path
    first, second = warnings_of(caplog)
    assert "module path res_conn:OffloadingConnector" in first
    assert "module path res_other:OffloadingConnector" in second
    for text in (first, second):
        assert "built-in kvferry.offloading.connector:OffloadingConnector" in text


@pytest.mark.usefixtures("folder")
def test_what_hides_nothing_warns_of_nothing(resolver: ConnectorResolver, caplog: pytest.LogCaptureFixture) -> None:
    resolver.resolve(config("Plain", "res_conn"))
    resolver.resolve(config("OffloadingConnector", on_shadow="error"))
    resolver.resolve(config("OffloadingConnector", "kvferry.offloading.connector", on_shadow="error"))
    resolver.resolve(config("res_conn:OffloadingConnector", on_shadow="error"))
    assert warnings_of(caplog) == []


def test_registered_names_win_over_entry_points(
    resolver: ConnectorResolver, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(folder, "grabby", {"OffloadingConnector": "res_conn:OffloadingConnector", "Mine": "res_conn:Plain"})
    resolver.register("Mine", "res_other", "Plain")
    for _ in range(2):
        assert resolver.resolve(config("OffloadingConnector")).origin is Origin.BUILT_IN
        assert resolver.resolve(config("Mine")).module == "res_other"
    built_in, mine = warnings_of(caplog)
    assert "entry point res_conn:OffloadingConnector of package grabby" in built_in
    assert "registered res_other:Plain" in mine


def test_a_module_that_fails_shadows_nothing(
    resolver: ConnectorResolver, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "res_late.py").write_text("raise RuntimeError('no device')\n")
    importlib.invalidate_caches()
    with pytest.raises(ConnectorNotFound, match="no device"):
        resolver.find_class(config("OffloadingConnector", "res_late"))
    assert warnings_of(caplog) == [], "a class that cannot be used hides none"


def test_two_argument_form_has_its_remedy_and_a_line_in_the_log(
    resolver: ConnectorResolver, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "res_two.py").write_text(
        "from res_conn import Plain\nclass Two(Plain):\n    def __init__(self, vllm_config, role): pass\n"
    )
    importlib.invalidate_caches()
    with pytest.raises(ConnectorNotFound) as caught:
        resolver.find_class(config("Two", "res_two"))
    for text in ("third argument", "super().__init__(vllm_config, role, kv_cache_config)"):
        assert text in str(caught.value)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "super().__init__(vllm_config, role, kv_cache_config)" in errors[0]


@pytest.mark.parametrize("path", [".res_conn", "..res_conn"])
def test_a_relative_path_is_called_relative(resolver: ConnectorResolver, path: str) -> None:
    with pytest.raises(ConnectorNotFound, match="relative module path"):
        resolver.find_class(config("Plain", path))


def test_shadows_can_be_refused(resolver: ConnectorResolver, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"module path res_conn:.* built-in kvferry\..*on_shadow='warn'"):
        resolver.find_class(config("OffloadingConnector", "res_conn", on_shadow="error"))
    assert "res_conn" not in sys.modules, "refused before it is imported"
    install(folder, "grabby", {"OffloadingConnector": "res_conn:OffloadingConnector"})
    with pytest.raises(ConfigError, match=r"built-in .* hides the entry point .* of package grabby"):
        resolver.find_class(config("OffloadingConnector", on_shadow="error"))
    assert warnings_of(caplog) == []


def test_two_packages_with_one_name_are_an_error(resolver: ConnectorResolver, folder: Path) -> None:
    install(folder, "one", {"X": "res_conn:Plain", "Same": "res_conn:Plain"})
    install(folder, "two", {"X": "res_other:Plain", "Same": "res_conn:Plain"})
    with pytest.raises(ConnectorNotFound, match=r"several packages.*of package (one|two).*of package (one|two)"):
        resolver.resolve(config("X"))
    assert resolver.resolve(config("Same")).module == "res_conn"
    assert resolver.resolve(config("res_other:Plain")).module == "res_other"


def test_broken_metadata_of_a_package_hides_no_built_in(
    resolver: ConnectorResolver, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(folder, "broken", {})
    (folder / "broken-2.5.dist-info/entry_points.txt").write_text("[kvferry.connectors]\nthis is no entry point\n")
    assert resolver.resolve(config("OffloadingConnector")).origin is Origin.BUILT_IN
    assert "cannot read the entry points" in caplog.text


# ---- failures --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "path", "error", "also", "text"),
    [
        (None, "res_conn", ConnectorNotFound, ValueError, "kv_connector is not set"),
        ("Plain", "", ConnectorNotFound, ValueError, "kv_connector_module_path is empty"),
        ("res_conn:Plain", "res_conn", ConfigError, ValueError, "give one of them"),
        (":Plain", None, ConnectorNotFound, ValueError, "with both parts"),
        ("res_conn:", None, ConnectorNotFound, ValueError, "with both parts"),
        ("Plain", "res_none.sub", ConnectorModuleNotFound, ModuleNotFoundError, "no module 'res_none'; install"),
        ("Plain", "res_pack.none", ConnectorModuleNotFound, ModuleNotFoundError, "no module 'res_pack.none'; install"),
        ("res_none:Plain", None, ConnectorModuleNotFound, ModuleNotFoundError, "kv_connector='res_none:Plain'"),
        ("Plain", "res_raises", ConnectorImportFailed, ImportError, r"RuntimeError: no card here \(at .*raises.py:3\)"),
        ("Plain", "res_needs", ConnectorImportFailed, ImportError, "install the package that has 'a_package_nobody"),
        ("Plain", "res_inner", ConnectorImportFailed, ImportError, "install the package that has 'res_pack.nothing'"),
        ("Plain", "res_syntax", ConnectorImportFailed, ImportError, "SyntaxError: .*res_syntax.py, line 1"),
        ("Plain", "res_exits", ConnectorImportFailed, ImportError, "SystemExit: 3"),
        ("Late", "res_lazy", ConnectorImportFailed, ImportError, "'a_package_nobody_has'"),
        ("Plian", "res_conn", ConnectorAttributeNotFound, AttributeError, "did you mean 'Plain'"),
        ("Zzz", "res_lazy", ConnectorAttributeNotFound, AttributeError, "has no class 'Zzz'"),
        ("major", "res_conn", ConnectorNotFound, ValueError, "must subclass kvferry.KVConnectorBase_V1"),
        ("KVConnectorBase_V1", "res_conn", ConnectorNotFound, ValueError, "must subclass"),
        ("Theirs", "res_foreign", ConnectorNotFound, ValueError, "its base is the one of res_foreign"),
        (
            "OfloadingConnector",
            None,
            ConnectorNotFound,
            ValueError,
            "mean 'OffloadingConnector'.*known: .*Multi",
        ),
        ("Zzzzzz", None, ConnectorNotFound, ValueError, r"\(known: .*MultiConnector, .*OffloadingConnector.*\)"),
    ],
)
def test_each_failure_has_its_own_error(
    resolver: ConnectorResolver, name: str | None, path: str | None, error: type, also: type, text: str
) -> None:
    with pytest.raises(also, match=text) as caught:
        resolver.resolve(config(name, path))
    assert type(caught.value) is error
    assert isinstance(caught.value, ConfigError)


@pytest.mark.usefixtures("folder")
def test_classes_of_another_host_are_adapted(resolver: ConnectorResolver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.contract.resolver.HOST_ADAPTERS", {"res_foreign": "res_adapter"})
    with pytest.raises(ConnectorAttributeNotFound, match="did you mean 'Theirs'"):
        resolver.resolve(config("Thiers", "res_foreign"))
    assert "res_adapter" not in sys.modules, "imported only for a class that needs it"
    with pytest.raises(ConnectorNotFound, match="must subclass kvferry"):
        resolver.resolve(config("KVConnectorBase_V1", "res_foreign"))
    with pytest.raises(ConnectorNotFound, match="has neither kv_cache_config"):
        resolver.resolve(config("Old", "res_foreign"))
    monkeypatch.setattr("kvferry.contract.resolver.HOST_ADAPTERS", {"res_foreign": "res_raises"})
    with pytest.raises(ConnectorImportFailed, match=r"'res_raises' is there, but .*no card here"):
        resolver.resolve(config("Theirs", "res_foreign"))
    monkeypatch.setattr("kvferry.contract.resolver.HOST_ADAPTERS", {"res_foreign": "res_adapter"})
    record = resolver.resolve(config("Theirs", "res_foreign"))
    assert record.connector_class.foreign_class is sys.modules["res_foreign"].Theirs  # type: ignore[attr-defined]
    assert record.module == "res_foreign"


@pytest.mark.usefixtures("folder")
def test_the_cause_of_a_failed_import_is_kept(resolver: ConnectorResolver) -> None:
    with pytest.raises(ConnectorImportFailed) as caught:
        resolver.resolve(config("Plain", "res_raises"))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.usefixtures("folder")
def test_a_failing_module_never_falls_back(resolver: ConnectorResolver) -> None:
    for path in ("res_raises", "res_none", "res_lazy", "res_foreign"):
        with pytest.raises(ConnectorNotFound):
            resolver.resolve(config("OffloadingConnector", path))


def test_a_repaired_module_is_found_by_the_next_call(resolver: ConnectorResolver, folder: Path) -> None:
    with pytest.raises(ConnectorImportFailed):
        resolver.resolve(config("Plain", "res_raises"))
    (folder / "res_raises.py").write_text(MODULE)
    importlib.invalidate_caches()
    assert resolver.resolve(config("Plain", "res_raises")).module == "res_raises"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["Plain", "Kwargs", "OtherNames", "KeywordOnly", "Everything", "SameApi"])
def test_constructors_that_pass(resolver: ConnectorResolver, name: str) -> None:
    found = resolver.resolve(config(name, "res_conn")).connector_class
    assert found.__name__ == name


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "problems"),
    [
        ("OldShape", ["neither kv_cache_config nor **kwargs"]),
        ("OnlyOne", ["takes no role", "neither kv_cache_config nor **kwargs"]),
        ("WrongOrder", ["third parameter, not number 1"]),
        ("PositionOnly", ["does not take kv_cache_config by keyword"]),
        ("Renamed", ["neither kv_cache_config nor **kwargs", "requires 'cache'"]),
        ("Demanding", ["takes no role", "neither kv_cache_config", "requires 'folder'", "requires 'size'"]),
    ],
)
def test_all_problems_of_a_constructor_are_told_at_once(
    resolver: ConnectorResolver, name: str, problems: list[str]
) -> None:
    with pytest.raises(ConnectorNotFound) as caught:
        resolver.resolve(config(name, "res_conn"))
    text = str(caught.value)
    assert f"res_conn:{name} must be constructible as (vllm_config, role, kv_cache_config)" in text
    assert all(problem in text for problem in problems), text
    assert text.count("; ") == len(problems) - 1, text


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NextMajor", "install a later kvferry"),
        ("NextMinor", "install a later kvferry"),
        ("LastMajor", "install a later release of the connector"),
        ("OneNumber", r"CONNECTOR_API=\(1,\) must be two whole numbers"),
        ("TextApi", "CONNECTOR_API='1.0' must be two whole numbers"),
    ],
)
def test_connector_api_is_checked(resolver: ConnectorResolver, name: str, text: str) -> None:
    with pytest.raises(ConnectorNotFound, match=f"res_conn:{name}.*{text}"):
        resolver.resolve(config(name, "res_conn"))


# ---- the list --------------------------------------------------------------------------------------------------


def rows(resolver: ConnectorResolver) -> dict[tuple[str, Origin], KnownConnector]:
    return {(row.target.name, row.target.origin): row for row in resolver.known()}


def test_every_connector_is_listed_also_broken_ones(
    resolver: ConnectorResolver, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    points = {"Good": "res_conn:Plain", "Bad": "res_exits:Plain", "OffloadingConnector": "res_conn:OffloadingConnector"}
    install(folder, "their-package", points)
    resolver.register("Mine", "res_conn", "Chosen")
    known = rows(resolver)
    built_in = known["OffloadingConnector", Origin.BUILT_IN]
    assert built_in.resolved is not None
    assert built_in.resolved.capabilities.supports_hma is True
    good = known["Good", Origin.ENTRY_POINT]
    assert good.resolved is not None
    assert (good.description, good.resolved.version) == ("Moves nothing.", "2.5")
    mine = known["Mine", Origin.REGISTERED].resolved
    assert mine is not None
    assert mine.capabilities.supports_hma is None, "its configuration decides"
    bad = known["Bad", Origin.ENTRY_POINT]
    assert bad.resolved is None
    assert "SystemExit" in (bad.problem or "")
    hidden = known["OffloadingConnector", Origin.ENTRY_POINT]
    assert hidden.resolved is None
    assert "hidden by the built-in kvferry.offloading.connector:OffloadingConnector" in (hidden.problem or "")
    assert set(known) == {
        *((target.name, Origin.BUILT_IN) for target in BUILT_INS),
        *((name, Origin.ENTRY_POINT) for name in points),
        ("Mine", Origin.REGISTERED),
    }
    assert warnings_of(caplog) == [], "a list is no use of a name"


@pytest.mark.parametrize("target", BUILT_INS, ids=lambda target: target.name)
def test_every_built_in_has_a_sentence(target: Any) -> None:
    assert target.description.endswith(".")
    assert target.origin is Origin.BUILT_IN


def test_resolving_loads_no_torch() -> None:
    code = "import sys, kvferry.contract.factory, kvferry.testing as t; t.make_kv_cache_config; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "kvferry.contract.resolver" in loaded
    assert not {"torch", "kvferry.offloading.connector"} & set(loaded)
