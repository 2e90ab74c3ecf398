"""Which model runner an engine uses: the first (V1) or the second (V2).

A runner is a timetable of the connector's hooks and a view of its tensors; the rule is told in docs/guides/runners.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvferry.config import KVTransferConfig
from kvferry.contract import KVConnectorFactory
from kvferry.engine.hybrid import parts_of

V2_ARCHITECTURES: frozenset[str] = frozenset({"Qwen3ForCausalLM", "Qwen3MoeForCausalLM"})
"""Models that get V2 unasked, unless `v2_model_architectures` says otherwise: those that vLLM began with."""


@dataclass(frozen=True, slots=True)
class V2Support:
    """What this release and this machine have for V2."""

    architectures: frozenset[str] = V2_ARCHITECTURES
    missing: tuple[str, ...] = ()
    """Requirements that are not met."""
    unsupported: tuple[str, ...] = ()
    """Features in use that V2 does not have; the embedded engine's V2 has them all."""


@dataclass(frozen=True, slots=True)
class RunnerChoice:
    """The decision, why, and what the user should hear of."""

    use_v2: bool
    reason: str
    warnings: tuple[str, ...] = ()


def v2_support(device: str, architectures: Iterable[str] | None = None) -> V2Support:
    """What there is for V2 on `device`: vLLM's rule, which asks for Triton on CUDA devices.

    `architectures` is the setting `v2_model_architectures`; None means `V2_ARCHITECTURES`.
    """
    lacks_triton = device.startswith("cuda") and importlib.util.find_spec("triton") is None
    listed = V2_ARCHITECTURES if architectures is None else frozenset(architectures)
    return V2Support(listed, missing=("Triton (pip install triton)",) if lacks_triton else ())


def without_v2(transfer: KVTransferConfig) -> list[str]:
    """The configured connector if it does not declare support for V2; of a composite, those of its parts."""
    if KVConnectorFactory.resolve(transfer).capabilities.supports_v2_model_runner:
        return []
    unable = [name for part in parts_of(transfer) for name in without_v2(part)]
    return list(dict.fromkeys(unable)) or [str(transfer.kv_connector)]


def choose_model_runner(
    environment: Mapping[str, bool],
    setting: bool | None,
    unable_connectors: Sequence[str],
    architecture: str,
    support: V2Support,
) -> RunnerChoice:
    """Environment before setting before the rule. Reads nothing but its arguments.

    `environment`: what `config.v2_runner_environment` found, the variable that counts first. `unable_connectors`:
    what `without_v2` found, for the engine's connector, explicit or implicit.
    """
    said = dict(environment) | ({} if setting is None else {"use_v2_model_runner": setting})
    if said:
        first, wanted = next(iter(said.items()))
        warnings = tuple(
            f"{name}={value} is overruled by {first}={wanted}: the model runner is {_name(wanted)} if it can be"
            for name, value in said.items()
            if value != wanted
        )
        if not wanted:
            return RunnerChoice(False, f"{first}={wanted}", warnings)
        return _unless_impossible(f"{first}={wanted}", support, warnings)
    if unable_connectors:
        verb = "does" if len(unable_connectors) == 1 else "do"
        return RunnerChoice(False, f"{' and '.join(unable_connectors)} {verb} not declare supports_v2_model_runner")
    the_list = "the list of models that get V2 by default (v2_model_architectures)"
    if architecture not in support.architectures:
        return RunnerChoice(False, f"{architecture} is not on {the_list}")
    return _unless_impossible(f"{architecture} is on {the_list}", support, ())


def _unless_impossible(reason: str, support: V2Support, warnings: tuple[str, ...]) -> RunnerChoice:
    obstacles = [*support.missing, *(f"not supported by it: {feature}" for feature in support.unsupported)]
    if not obstacles:
        return RunnerChoice(True, reason, warnings)
    listed = "; ".join(obstacles)
    warning = f"the second model runner cannot be used, so the first one is ({reason}): {listed}"
    return RunnerChoice(False, f"V2 cannot be used: {listed}", (*warnings, warning))


def _name(use_v2: bool) -> str:
    return "V2" if use_v2 else "V1"
