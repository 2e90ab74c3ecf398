"""Whose LMCacheMPConnector runs in vLLM: the class of the installed lmcache package, or kvferry's built-in one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import types
from importlib import metadata
from typing import Any

import kvferry
from kvferry.errors import ConfigError, ConnectorImportFailed
from kvferry.lmcache.config import EXTRA_CONFIG, implementation_asked_for
from kvferry.lmcache.wire import version_numbers
from kvferry.vllm.compat import check_vllm, tolerate_llvmlite
from kvferry.vllm.facade import built_in

logger = logging.getLogger(__name__)

NAME = "LMCacheMPConnector"
_PACKAGE = "lmcache"
_MODULE = "lmcache.integration.vllm.lmcache_mp_connector"
_OLDEST = "0.4.5"


def lmcache_connector(kv_transfer_config: Any = None) -> type[Any]:
    """The class that a configuration (and the environment) means; None: the environment alone.

    Raises ConfigError when it asks for the package and there is none, and when the package is there but cannot be
    used: that is a mistake to be repaired, and nothing to be silently replaced.
    """
    check_vllm()
    extra = {} if kv_transfer_config is None else kv_transfer_config.kv_connector_extra_config
    asked, setting = implementation_asked_for(extra)
    if asked != "builtin":
        if importlib.util.find_spec(_PACKAGE) is not None:
            return _package_form(setting)
        if asked == "package":
            raise ConfigError(
                f"{EXTRA_CONFIG}.implementation='package', but lmcache is not installed: pip install lmcache"
            )
        logger.info("%s: lmcache is not installed (%s), so kvferry's built-in one is used", NAME, setting)
    return built_in("LMCacheMPConnectorUpstream")


@functools.cache
def _package_form(setting: str) -> type[Any]:
    """A subclass of the package's class that says so when it is built; nothing else is changed."""
    try:
        version = metadata.version(_PACKAGE)
    except metadata.PackageNotFoundError:
        version = "of another distribution (lmcache-cli?)"
    found = _import(version)

    def __init__(self: Any, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        asked, _ = implementation_asked_for(vllm_config.kv_transfer_config.kv_connector_extra_config)
        if asked == "builtin":
            raise ConfigError(
                f"{EXTRA_CONFIG}.implementation='builtin' needs kvferry's vLLM plugin, which VLLM_PLUGINS leaves out: "
                "allow it, set LMCACHE_USE_UPSTREAM_MP=1, or name LMCacheMPConnectorUpstream"
            )
        logger.info("%s (%s): the class of lmcache %s (%s)", NAME, role.name, version, setting)
        found.__init__(self, vllm_config, role, kv_cache_config)

    body = {"__init__": __init__, "__doc__": found.__doc__, "__module__": "kvferry.vllm"}
    return types.new_class(NAME, (found,), exec_body=lambda namespace: namespace.update(body))


def _import(version: str) -> type[Any]:
    if (numbers := version_numbers(version)) and numbers < version_numbers(_OLDEST):
        raise _unusable(version, "it is too old")
    tolerate_llvmlite()
    try:
        found: type[Any] = getattr(importlib.import_module(_MODULE), NAME)
    except Exception as err:  # plugin load: the package may raise anything
        raise _unusable(version, f"{type(err).__name__}: {err}") from err
    return found


def _unusable(version: str, why: str) -> ConnectorImportFailed:
    return ConnectorImportFailed(
        f"lmcache {version} is installed, but its {NAME} cannot be used: {why}; kvferry {kvferry.__version__} needs "
        f"lmcache {_OLDEST} or later with all its dependencies. Repair it, or set implementation='builtin' in "
        f"{EXTRA_CONFIG}"
    )
