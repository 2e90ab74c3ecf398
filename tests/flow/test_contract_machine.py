"""Ten thousand steps through the contract, and the mutants that must not survive them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from hypothesis import settings, HealthCheck, Phase
from hypothesis.stateful import run_state_machine_as_test

spec = importlib.util.spec_from_file_location("contract_machine", Path(__file__).with_name("contract_machine.py"))
machine = importlib.util.module_from_spec(spec)
sys.modules["contract_machine"] = machine
spec.loader.exec_module(machine)


def test_walk():
    import logging; logging.disable(logging.CRITICAL)
    run_state_machine_as_test(machine.ContractMachine, settings=settings(max_examples=300, stateful_step_count=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)))
    print(machine.fired)
