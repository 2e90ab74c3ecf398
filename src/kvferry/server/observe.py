"""What the engine reports step by step, as metrics. Runs on the engine's thread."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.clock import Clock, SystemClock
from kvferry.contract.stats_rows import by_known
from kvferry.engine.llm import LLM
from kvferry.engine.outputs import RequestOutput
from kvferry.metrics import HELD_REASONS, HIT_SOURCES, Metrics
from kvferry.server.connector_metrics import ConnectorMetrics
from kvferry.server.progress import ProgressLog


class EngineObserver:
    """Looks at each step's outputs, which must be deltas, and at the engine's own totals."""

    def __init__(self, llm: LLM, metrics: Metrics, clock: Clock | None = None, log_interval_s: float = 0) -> None:
        self._llm = llm
        self._metrics = metrics
        self._clock = clock or SystemClock()
        self._progress = ProgressLog(log_interval_s, self._clock)
        self._num_forwards = 0
        self._num_step_tokens = 0
        self._last_token_s: dict[str, float] = {}
        self._num_tokens: dict[str, int] = {}
        transfer = llm.config.kv_transfer_config
        self._connector = ConnectorMetrics(metrics, "" if transfer is None else str(transfer.kv_connector))
        self.degraded_tiers: list[str] = []
        """Tiers that could not be written to at the last step; any thread may read it."""
        self._enter_connector()

    def step_done(self, outputs: Sequence[RequestOutput]) -> None:
        """Enter one step."""
        num_forwards, self._num_forwards = self._num_forwards, self._llm.runner.num_forwards
        self._metrics.add("kvferry:engine_steps")
        now_s = self._clock.now()
        self._num_step_tokens = 0
        for output in outputs:
            self._tokens(output, now_s)
            if output.finished:
                self._end(output)
        if self._num_forwards > num_forwards:
            self._metrics.observe("vllm:iteration_tokens_total", self._num_step_tokens)
        self._engine_state()
        self._enter_connector()
        self._progress.step_done(self._llm.scheduler.stats(), self._llm.connector_stats)

    def _enter_connector(self) -> None:
        stats = self._llm.connector_stats
        self._connector.enter(stats)
        self.degraded_tiers = [] if stats is None else stats.media_down()

    def _engine_state(self) -> None:
        metrics, stats, counters = self._metrics, self._llm.scheduler.stats(), self._llm.counters
        metrics.set("vllm:num_requests_running", stats.num_running)
        metrics.set("vllm:num_requests_waiting", stats.num_waiting + stats.num_loading)
        metrics.set("vllm:num_requests_waiting_by_reason", stats.num_waiting, "capacity")
        metrics.set("vllm:num_requests_waiting_by_reason", stats.num_loading, "deferred")
        metrics.set("vllm:kv_cache_usage_perc", stats.kv_cache_usage)
        metrics.raise_to("vllm:num_preemptions", stats.num_preemptions)
        metrics.raise_to("kvferry:connector_hook_errors", sum(counters.hook_errors.values()))
        metrics.raise_to("kvferry:connector_contract_errors", sum(counters.contract_errors.values()))
        metrics.raise_to("kvferry:connector_load_failures", counters.load_failures)
        metrics.raise_to("kvferry:connector_unknown_completions", counters.unknown_completions)
        metrics.set("kvferry:connector_switched_off", bool(counters.switched_off))
        for reason, num_blocks in by_known(stats.num_held_blocks, HELD_REASONS).items():
            metrics.set("kvferry:held_blocks", num_blocks, reason)
        metrics.set("kvferry:oldest_held_seconds", stats.oldest_held_s)
        publisher = self._llm.event_publisher
        if publisher is not None:
            metrics.raise_to("kvferry:kv_events_messages", publisher.num_messages)
            metrics.raise_to("kvferry:kv_events_dropped", publisher.num_dropped)

    def _tokens(self, output: RequestOutput, now_s: float) -> None:
        num_new, request_id = len(output.outputs[0].token_ids), output.request_id
        if not num_new:
            return
        self._metrics.add("vllm:generation_tokens", num_new)
        self._num_step_tokens += num_new
        self._progress.generated(num_new)
        if request_id not in self._num_tokens:
            self._first_token(output)
        else:
            self._metrics.observe("vllm:inter_token_latency_seconds", now_s - self._last_token_s[request_id])
        self._last_token_s[request_id] = now_s
        self._num_tokens[request_id] = self._num_tokens.get(request_id, 0) + num_new

    def _first_token(self, output: RequestOutput) -> None:
        self._progress.prompt_done(output)
        add, num_prompt = self._metrics.add, len(output.prompt_token_ids)
        num_external = output.num_external_tokens
        num_local = output.num_cached_tokens - num_external
        add("vllm:prompt_tokens", num_prompt)
        self._num_step_tokens += num_prompt - output.num_cached_tokens
        add("vllm:prompt_tokens_by_source", num_prompt - output.num_cached_tokens, "local_compute")
        add("vllm:prompt_tokens_by_source", num_local, "local_cache_hit")
        add("vllm:prompt_tokens_by_source", num_external, "external_kv_transfer")
        add("vllm:prompt_tokens_cached", output.num_cached_tokens)
        add("vllm:prompt_tokens_cached_by_source", num_local, "device")
        for source, num_tokens in output.external_hit_sources.items():
            known = source if source in HIT_SOURCES else "external_unspecified"
            add("vllm:prompt_tokens_cached_by_source", num_tokens, known)
        add("vllm:prefix_cache_queries", num_prompt)
        add("vllm:prefix_cache_hits", num_local)
        if self._llm.connector is not None:
            add("vllm:external_prefix_cache_queries", num_prompt - num_local)
            add("vllm:external_prefix_cache_hits", num_external)
        assert output.metrics.ttft_s is not None
        self._metrics.observe("vllm:time_to_first_token_seconds", output.metrics.ttft_s)

    def _end(self, output: RequestOutput) -> None:
        observe, times = self._metrics.observe, output.metrics
        self._last_token_s.pop(output.request_id, None)
        num_tokens = self._num_tokens.pop(output.request_id, 0)
        self._metrics.add("vllm:request_success", 1, output.outputs[0].finish_reason or "")
        observe("vllm:request_prompt_tokens", len(output.prompt_token_ids))
        observe("vllm:request_generation_tokens", num_tokens)
        assert times.e2e_s is not None
        observe("vllm:e2e_request_latency_seconds", times.e2e_s)
        if times.queue_s is not None:
            observe("vllm:request_queue_time_seconds", times.queue_s)
            observe("vllm:request_inference_time_seconds", times.e2e_s - times.queue_s)
        if times.ttft_s is not None and times.queue_s is not None:
            observe("vllm:request_prefill_time_seconds", times.ttft_s - times.queue_s)
            observe("vllm:request_decode_time_seconds", times.e2e_s - times.ttft_s)
            if num_tokens > 1:
                observe("vllm:request_time_per_output_token_seconds", (times.e2e_s - times.ttft_s) / (num_tokens - 1))
