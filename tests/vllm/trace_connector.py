"""The recording connector on vLLM's base class."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1 import base

from kvferry.testing.recorder import recorder_classes

Recorder, HmaRecorder = recorder_classes(base)
