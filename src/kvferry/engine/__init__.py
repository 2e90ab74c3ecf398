"""The embedded engine: continuous batching over a paged KV cache, small enough to read, with the connector contract."""

from kvferry.engine.config import EngineConfig, SamplingParams
from kvferry.engine.llm import LLM
from kvferry.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput

__all__ = ["LLM", "CompletionOutput", "EngineConfig", "RequestMetrics", "RequestOutput", "SamplingParams"]
