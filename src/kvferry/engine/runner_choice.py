"""Which model runner an engine uses: the first (V1) or the second (V2).

A runner is a timetable of the connector's hooks and a view of its tensors; the rule is told in docs/guides/runners.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

V2_ARCHITECTURES: frozenset[str] = frozenset()
"""Models that get V2 without being asked; none in this release."""


@dataclass(frozen=True, slots=True)
class V2Support:
    """What this release and this machine have for V2."""

    architectures: frozenset[str] = V2_ARCHITECTURES
    missing: tuple[str, ...] = ()
    """Requirements that are not met."""
    unsupported: tuple[str, ...] = ()
    """Features in use that V2 does not have."""


@dataclass(frozen=True, slots=True)
class RunnerChoice:
    """The decision, why, and what the user should hear of."""

    use_v2: bool
    reason: str
    warnings: tuple[str, ...] = ()


def v2_support(device: str) -> V2Support:
    """What there is for V2 on `device`: vLLM's rule, which asks for Triton on CUDA devices."""
    lacks_triton = device.startswith("cuda") and importlib.util.find_spec("triton") is None
    return V2Support(missing=("Triton (pip install triton)",) if lacks_triton else ())


def choose_model_runner(
    environment: Mapping[str, bool],
    setting: bool | None,
    unable_connector: str | None,
    architecture: str,
    support: V2Support,
) -> RunnerChoice:
    """Environment before setting before the rule. Reads nothing but its arguments.

    `environment`: what `config.v2_runner_environment` found, the variable that counts first. `unable_connector`: name
    of the engine's connector, explicit or implicit, if as configured it does not declare support for V2.
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
    if unable_connector is not None:
        return RunnerChoice(False, f"{unable_connector} does not declare supports_v2_model_runner")
    if architecture not in support.architectures:
        return RunnerChoice(False, f"{architecture} is not on the list of models that get V2 by default")
    return _unless_impossible(f"{architecture} is on the list of models that get V2 by default", support, ())


def _unless_impossible(reason: str, support: V2Support, warnings: tuple[str, ...]) -> RunnerChoice:
    obstacles = [*support.missing, *(f"not supported by it: {feature}" for feature in support.unsupported)]
    if not obstacles:
        return RunnerChoice(True, reason, warnings)
    listed = "; ".join(obstacles)
    warning = f"the second model runner cannot be used, so the first one is ({reason}): {listed}"
    return RunnerChoice(False, f"V2 cannot be used: {listed}", (*warnings, warning))


def _name(use_v2: bool) -> str:
    return "V2" if use_v2 else "V1"
