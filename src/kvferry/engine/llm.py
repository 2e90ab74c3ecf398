"""The engine as users hold it: `LLM(...)`, `generate(...)`, `step()`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvferry.clock import Clock, SystemClock
from kvferry.config import KVTransferConfig, parse_size, shown, transfer_config
from kvferry.contract import ConnectorStats, KVConnectorBase_V1
from kvferry.engine.config import EngineOptions, RequestOutputKind, SamplingParams
from kvferry.engine.connector_host import start_connectors
from kvferry.engine.detokenizer import Detokenizer
from kvferry.engine.device_events import DeviceEvents
from kvferry.engine.explain import Explainer
from kvferry.engine.guard import HostCounters
from kvferry.engine.handover import handed_over_tokens
from kvferry.engine.hidden_states import with_hidden_states
from kvferry.engine.model_loader import EngineModel, load_model
from kvferry.engine.outputs import RequestOutput, merged, report
from kvferry.engine.plan import plan_engine
from kvferry.engine.prompts import Prompt, PromptInput, is_conversation, read_prompt, read_prompts, render_messages
from kvferry.engine.request import Request
from kvferry.engine.runner import ModelRunner
from kvferry.engine.scheduler import Scheduler
from kvferry.errors import ConfigError, HostError
from kvferry.kv_events import AllBlocksCleared, EventPublisher, KVCacheEvent, KVEventsConfig

if TYPE_CHECKING:
    import torch

_IDLE_SLEEP_S = 0.0005
_DRAIN_LIMIT_S = 30.0
_CHECK_EVERY_S = 10.0


class LLM:
    """One model, one paged KV cache, one scheduler, and at most one KV connector. Not thread-safe.

    `model`: a model folder, a `.gguf` file, "smollm2", or an object that is an `EngineModel` (a stub).
    `num_kv_blocks` or `kv_cache_bytes` (a number, or text such as "8GB") sizes the KV cache (1 GiB at most when neither
    is given). `max_model_len` is
    the longest prompt plus output; what model and cache allow when not given. `max_num_batched_tokens` bounds the
    tokens of one forward, so it is the chunk size of long prompts. `dtype` "auto" takes the checkpoint's.
    `kv_offloading_size` (GiB of host memory, or "8GB") and `kv_offloading_backend` ("native", "lmcache") choose a
    connector where `kv_transfer_config` does not: see `kvferry.config.transfer_config`. `use_v2_model_runner`,
    `disable_hybrid_kv_cache_manager` and `kv_cache_layout` (BLNHC, BLHNC, LBNHC or NHD, LBHNC or HND) are decided by
    the engine unless set, and so is `kernel_block_size`, the part of a block that the second model runner's attention
    works in: see `kvferry.engine.plan`. `v2_model_architectures` names the models that get the second model
    runner where nothing else decides (None: `kvferry.engine.runner_choice.V2_ARCHITECTURES`; empty: no model).
    `explain_requests` remembers of each request, at the moment its blocks are given out, why its prefix was a hit or
    not; `explain` tells it, also of the last 256 that ended. `kv_events_config` publishes which KV lies where: see
    `kvferry.kv_events`. `hidden_state_layers` hands these hidden states of every computed token to the connector: see
    `kvferry.engine.hidden_states`; every prompt is then computed whole.
    Raises ConfigError before any work when the settings, the model or the connector's configuration are wrong.
    """

    def __init__(
        self,
        model: str | Path | EngineModel,
        *,
        block_size: int = 16,
        num_kv_blocks: int | None = None,
        kv_cache_bytes: int | str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        dtype: str | torch.dtype = "auto",
        device: str = "cpu",
        enable_prefix_caching: bool = True,
        kv_transfer_config: KVTransferConfig | Mapping[str, Any] | str | None = None,
        kv_offloading_size: float | str | None = None,
        kv_offloading_backend: str | None = None,
        use_v2_model_runner: bool | None = None,
        v2_model_architectures: Sequence[str] | None = None,
        disable_hybrid_kv_cache_manager: bool | None = None,
        kv_cache_layout: str = "auto",
        kernel_block_size: int | None = None,
        explain_requests: bool = False,
        kv_events_config: KVEventsConfig | Mapping[str, Any] | str | None = None,
        hidden_state_layers: Sequence[int] = (),
        seed: int = 0,
        clock: Clock | None = None,
    ) -> None:
        self._is_shut_down = True  # until everything stands
        self._failure: str | None = None
        options = EngineOptions(
            block_size=block_size, num_kv_blocks=num_kv_blocks,
            kv_cache_bytes=parse_size(kv_cache_bytes, "kv_cache_bytes") if kv_cache_bytes is not None else None,
            max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
            dtype=(dtype if isinstance(dtype, str) else shown(dtype)).removeprefix("torch."), device=device,
            enable_prefix_caching=enable_prefix_caching, seed=seed, use_v2_model_runner=use_v2_model_runner,
            v2_model_architectures=v2_model_architectures,  # type: ignore[arg-type]  # made a tuple when checked
            disable_hybrid_kv_cache_manager=disable_hybrid_kv_cache_manager,
            hidden_state_layers=hidden_state_layers,  # type: ignore[arg-type]  # likewise
            kv_cache_layout=kv_cache_layout, kernel_block_size=kernel_block_size,
        )  # fmt: skip
        transfer = transfer_config(kv_transfer_config, kv_offloading_size, kv_offloading_backend)
        events = KVEventsConfig.parse(kv_events_config)
        self._clock = clock or SystemClock()
        loaded = load_model(model, options.dtype, device) if isinstance(model, str | Path) else model
        self._model = with_hidden_states(loaded, options.hidden_state_layers)
        self._publisher: EventPublisher | None = None
        with self._publishing(events):
            self._start(options, transfer, events)
        if explain_requests:
            self._explainer.enable()
        self._num_added = 0
        self._next_check_s = self._clock.now() + _CHECK_EVERY_S
        self.has_moved = True
        """Whether the last step computed or told something; after one that did not, others must move first: rest."""
        self._unclaimed: list[RequestOutput] = []  # came while `generate` waited for others
        self._is_shut_down = False

    @contextmanager
    def _publishing(self, events: KVEventsConfig) -> Iterator[None]:
        """Bind the endpoints before connectors start; free them when what follows fails."""
        with ExitStack() as undo:
            if events.is_published:
                self._publisher = EventPublisher(events)
                undo.callback(self._publisher.shutdown)
            yield
            undo.pop_all()

    def _start(self, options: EngineOptions, transfer: KVTransferConfig, events: KVEventsConfig) -> None:
        model = self._model
        plan = plan_engine(model, options, transfer)
        plan.log()
        self.config, self.kv_cache_config = replace(plan.config, kv_events_config=events), plan.kv_cache_config
        self.config = replace(self.config, hidden_state_layers=options.hidden_state_layers)
        self._hosted = start_connectors(self.config, self.kv_cache_config, options.device, self._clock)
        if self._publisher is not None:
            self._collect_events(events)
        self.runner = ModelRunner(model, self._hosted, self.config, options.device)
        configured = self.config.kv_transfer_config
        self.scheduler = Scheduler(
            self.config.scheduler_config,
            self._hosted.manager,
            self._hosted.scheduler,
            max_model_len=self.config.model_config.max_model_len,
            eos_token_ids=model.eos_token_ids,
            recompute_failed_loads=configured is None or configured.kv_load_failure_policy == "recompute",
            clock=self._clock,
        )
        self._explainer = Explainer(self.config.scheduler_config, self.scheduler, self._hosted.scheduler, self._clock)

    # ---- one step at a time -----------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
        request_id: str | None = None,
    ) -> str:
        """Queue one prompt for the coming steps; returns its id. ConfigError when it cannot run.

        `request_id` must be new to this engine; one is made up unless given. For several completions (`n`) add the
        prompt once for each of `SamplingParams.per_completion()`.
        """
        params = _params(sampling_params)
        if params.n != 1:
            raise ConfigError(f"n={params.n}: add one request for each of SamplingParams.per_completion(), or generate")
        request = self._make_request(read_prompt(prompt), params, cache_salt, request_id)
        self._add(request)
        return request.request_id

    def _add(self, request: Request) -> None:
        request.skip_reading_prefix_cache = bool(self.config.hidden_state_layers)  # only what is computed has states
        self.scheduler.add_request(request)
        self._explainer.added(request)

    def step(self) -> list[RequestOutput]:
        """Run one step. Blocks for one forward.

        Returns the requests that finished, and of the others what their `SamplingParams.output_kind` asks for.
        Raises what a part of the engine raised; from then on every call raises HostError that names it, for scheduler
        and model may disagree about what was computed. KeyboardInterrupt does not count: the engine can go on.
        """
        self._require_running()
        try:
            return self._step()
        except Exception as err:  # whatever it was, the engine cannot go on
            self._failure = f"{type(err).__name__}: {err}"
            raise

    def _step(self) -> list[RequestOutput]:
        unclaimed, self._unclaimed = self._unclaimed, []
        plan = self.scheduler.schedule()
        result = self.runner.execute(plan)
        news = self.scheduler.update(plan, result)
        self.has_moved = bool(plan.batch or news)
        self._explainer.take_ends(news)
        self._publish_events()
        reports = [report(request, self.tokenizer) for request in news]
        return unclaimed + [output for output in reports if output is not None]

    def _collect_events(self, events: KVEventsConfig) -> None:
        manager = self._hosted.manager
        self._device_events = DeviceEvents(manager.block_size, events.include_token_ids)
        manager.on_cached, manager.block_pool.on_removed = self._device_events.stored, self._device_events.removed
        self._hosted.scheduler.events = []

    def _publish_events(self, *more: KVCacheEvent) -> None:
        """Hand what happened since the last call to the publisher's thread."""
        if self._publisher is None:
            return
        connector = self._hosted.scheduler
        of_connector, connector.events = connector.events or [], []
        events = [*self._device_events.take(), *of_connector, *more]
        if events:
            self._publisher.publish(events)

    def abort_request(self, request_id: str) -> None:
        """End a request now; `step` returns it with finish_reason "abort". Unknown ids are ignored."""
        self.scheduler.abort_request(request_id)

    def has_unfinished_requests(self) -> bool:
        """True while `step` has requests to return."""
        return bool(self._unclaimed) or self.scheduler.has_unfinished_requests()

    def has_requests(self) -> bool:
        """True while stepping does anything, be it only for blocks or work a connector still holds."""
        return bool(self._unclaimed) or self.scheduler.has_requests()

    # ---- whole batches ----------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many (`engine.prompts.Prompt` says what may be one); blocks until all have finished.

        The outputs are in the order of the prompts; each has `SamplingParams.n` completions. Prompts are checked
        first: with one of them wrong (ConfigError) none is started. Requests of different `cache_salt` never share
        KV. On an exception (Ctrl-C) what is unfinished is aborted.

        A connector's copies under way are waited for (30 s at most), consumers that have yet to come are not: where
        this engine shall write to them (P2P, mode push), call `step` while `has_requests()`.
        """
        return self._complete(read_prompts(prompts), sampling_params, cache_salt)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of `{"role": ..., "content": ...}`; otherwise as `generate`.

        The prompt is what the tokenizer's chat template makes of the messages and of `chat_template_kwargs`.
        """
        settings = {**(chat_template_kwargs or {}), "add_generation_prompt": add_generation_prompt}
        many = [messages] if is_conversation(messages) or not isinstance(messages, Sequence) else list(messages)
        ids = [render_messages(self.tokenizer, one, **settings) for one in many]
        return self._complete([PromptInput(token_ids=each) for each in ids], sampling_params, cache_salt)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, cache_salt: str | None = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, and yield what is new of it after each step that moved it (`RequestOutputKind.DELTA`).

        With `n` above 1 an output has one completion, whose `index` says which. A prompt that cannot run is a
        ConfigError at once; the work starts with the first `next`, and ends when the iterator is closed.
        """
        params = _params(sampling_params)
        family = self._make_family(read_prompt(prompt), params, cache_salt, RequestOutputKind.DELTA)
        return self._stream(family)

    def _stream(self, family: list[Request]) -> Iterator[RequestOutput]:
        indexes = {request.request_id: index for index, request in enumerate(family)}
        unfinished = set(indexes)
        try:
            for request in family:
                self._add(request)
            while unfinished:
                outputs = self._step_or_rest()
                self._unclaimed = [output for output in outputs if output.request_id not in indexes]
                for output in outputs:
                    if output.request_id in indexes:
                        unfinished -= {output.request_id} if output.finished else set()
                        yield merged([output], first_index=indexes[output.request_id], request_id=family[0].request_id)
            self._tie_loose_ends()
            self.check_when_idle()
        finally:
            for request_id in unfinished:
                self.abort_request(request_id)

    def _complete(
        self,
        prompts: list[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        cache_salt: str | None,
    ) -> list[RequestOutput]:
        families = self._make_families(prompts, sampling_params, cache_salt)
        requests = [request for family in families for request in family]
        unfinished = {request.request_id for request in requests}
        outputs: dict[str, RequestOutput] = {}
        others: list[RequestOutput] = []
        try:
            for request in requests:
                self._add(request)
            while unfinished:
                for output in self._step_or_rest():
                    if output.request_id in unfinished:
                        unfinished.remove(output.request_id)
                        outputs[output.request_id] = output
                    else:
                        others.append(output)
            self._unclaimed = others
            self._tie_loose_ends()
            self.check_when_idle()
        finally:
            for request in requests:
                self.abort_request(request.request_id)
        return [merged([outputs[request.request_id] for request in family]) for family in families]

    def _make_families(
        self,
        prompts: list[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        cache_salt: str | None,
    ) -> list[list[Request]]:
        """For each prompt the requests that complete it; all of them checked, none added."""
        if isinstance(sampling_params, list | tuple):
            per_prompt = [_params(one) for one in sampling_params]
        else:
            per_prompt = [_params(sampling_params)] * len(prompts)
        if len(per_prompt) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts but {len(per_prompt)} sampling_params")
        return [
            self._make_family(prompt, params, cache_salt, RequestOutputKind.FINAL_ONLY)
            for prompt, params in zip(prompts, per_prompt, strict=True)
        ]

    def _make_family(
        self, prompt: PromptInput, params: SamplingParams, cache_salt: str | None, kind: RequestOutputKind
    ) -> list[Request]:
        family = [
            self._make_request(prompt, replace(one, output_kind=kind), cache_salt) for one in params.per_completion()
        ]
        for request in family:
            self.scheduler.check_request(request)
        return family

    def _step_or_rest(self) -> list[RequestOutput]:
        """A step, and a short rest when it did nothing."""
        finished = self.step()
        if not self.has_moved:
            time.sleep(_IDLE_SLEEP_S)
        return finished

    def _tie_loose_ends(self) -> None:
        """Announce finished requests to the workers and let copies under way end; bounded."""
        deadline_s = self._clock.now() + _DRAIN_LIMIT_S
        while self.scheduler.has_loose_ends() and self._clock.now() < deadline_s:
            self._unclaimed = self._step_or_rest()

    def check_when_idle(self) -> None:
        """Assert all invariants of scheduler, tables and pool, at most every few seconds; AssertionError is our bug."""
        if not self.scheduler.has_unfinished_requests() and self._clock.now() >= self._next_check_s:
            self._next_check_s = self._clock.now() + _CHECK_EVERY_S
            self.check_integrity()

    def check_integrity(self) -> None:
        """Assert all invariants of scheduler, tables and pool; between steps."""
        self.scheduler.check_integrity()

    # ---- the engine's state -----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self._model.tokenizer

    @property
    def kv_caches(self) -> dict[str, torch.Tensor]:
        """Layer name -> its KV, a strided view [blocks, heads, tokens, content] of the pool. Not a copy."""
        return self._hosted.kv.views()

    @property
    def connector(self) -> KVConnectorBase_V1 | None:
        """The connector's scheduler instance, or None; for looking at its state."""
        return self._hosted.scheduler.connector

    @property
    def counters(self) -> HostCounters:
        """What went wrong at the border to the connector so far."""
        return self._hosted.scheduler.counters

    @property
    def connector_stats(self) -> ConnectorStats | None:
        """The connector's totals since start, as of the last step; None without one, or when it keeps none."""
        return self._hosted.scheduler.stats

    @property
    def event_publisher(self) -> EventPublisher | None:
        """What publishes KV events, or None; has the endpoints as bound, and counters."""
        return self._publisher

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """What a request waits for, and why its prefix was a hit or not, without token ids or text; None: unknown.

        Keys: see `kvferry.engine.explain`. Of requests that ended only with `explain_requests`, and only the last 256.
        """
        return self._explainer.explain(request_id)

    def live_requests(self) -> list[dict[str, Any]]:
        """Id, state and age of each request that has not ended, oldest first."""
        return self._explainer.live_requests()

    def reset_prefix_cache(self, reset_connector: bool = False) -> bool:
        """Forget the engine's own cached KV, and with `reset_connector` the connector's too.

        False, and the engine's cache untouched, while any block is held (running requests, sends, pins).
        """
        if not self.scheduler.has_unfinished_requests():
            self._tie_loose_ends()
        done = self.scheduler.manager.reset_prefix_cache()
        if reset_connector:
            done &= self._hosted.scheduler.reset_cache()
        # With a connector this would say too much: removals are told one by one.
        self._publish_events(*([AllBlocksCleared()] if done and self.connector is None else []))
        return done

    def shutdown(self) -> None:
        """Abort what is unfinished and shut the connector down. Idempotent."""
        if self._is_shut_down:
            return
        self._is_shut_down = True
        self.scheduler.abort_all()
        self._hosted.worker.shutdown()
        self._hosted.scheduler.shutdown()
        if self._publisher is not None:
            self._publisher.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # ---- in and out -------------------------------------------------------------------------------------------

    def _require_running(self) -> None:
        if self._failure is not None:
            raise HostError(f"the engine failed in an earlier step ({self._failure}): make a new one")
        if self._is_shut_down:
            raise ConfigError("the engine is shut down")

    def _token_ids(self, prompt: PromptInput) -> list[int]:
        if prompt.token_ids is not None:
            ids = prompt.token_ids
        elif self.tokenizer is None:
            raise ConfigError("the model has no tokenizer: give token ids instead of text")
        else:
            ids = list(self.tokenizer(prompt.text)["input_ids"])
        if not ids:
            raise ConfigError("the prompt is empty")
        for token in ids:
            is_id = isinstance(token, Integral) and not isinstance(token, bool)
            if not is_id or not 0 <= token < self._model.vocab_size:
                raise ConfigError(f"{token!r} is not a token id of this model (0 to {self._model.vocab_size - 1})")
        return [int(token) for token in ids]

    def _make_request(
        self, prompt: PromptInput, params: SamplingParams, cache_salt: str | None, request_id: str | None = None
    ) -> Request:
        self._require_running()
        for name, value in (("cache_salt", cache_salt), ("request_id", request_id)):
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name}={value!r} must be text")
        token_ids = self._token_ids(prompt)
        if params.stop and self.tokenizer is None:
            raise ConfigError(f"stop={params.stop!r}: the model has no tokenizer; use stop_token_ids")
        self._num_added += 1
        request = Request(
            # The random part keeps ids of restarted engines apart, where peers remember them.
            request_id or f"{self._num_added}-{secrets.token_hex(4)}",
            token_ids,
            params,
            block_size=self.config.cache_config.block_size,
            arrival_s=self._clock.now(),
            arrival_index=self._num_added,
            cache_salt=cache_salt if prompt.cache_salt is None else prompt.cache_salt,
            sampling_seed=self.config.model_config.seed + self._num_added if params.seed is None else params.seed,
            prompt=prompt.text,
            detokenizer=None if self.tokenizer is None else Detokenizer(self.tokenizer, token_ids, params),
        )
        request.handed_over_token_ids = handed_over_tokens(request, self._model.vocab_size)
        return request


def _params(given: object) -> SamplingParams:
    """`given`, or the defaults for None. ConfigError for anything else."""
    if given is None:
        return SamplingParams()
    if not isinstance(given, SamplingParams):
        raise ConfigError(f"sampling_params of type {type(given).__name__} must be a SamplingParams, or a list of them")
    return given
