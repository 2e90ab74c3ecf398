"""The embedded engine: continuous batching over a paged KV cache, small enough to read, with the connector contract."""

from kvferry.engine.config import EngineConfig, RequestOutputKind, SamplingParams
from kvferry.engine.llm import LLM
from kvferry.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from kvferry.engine.request import Logprob

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
]
