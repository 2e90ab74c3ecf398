"""A connector that does as a script says and writes down every call of a hook, in whatever host it runs.

It moves no bytes: it is for comparing hosts. `recorder_classes` makes the two classes for the contract module of a
host (`kvferry.contract.base`, or vLLM's module of these names), with a method for each row of the hook table. Both
instances of an engine must be in one process; they write to the `Record` that is newest when they are made.

    Recorder, HmaRecorder = recorder_classes(kvferry.contract.base)
    record = new_record(Script(hit_tokens=64, is_async=True))
    ...  # start an engine with one of them, run requests
    print("\\n".join(record.lines()))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from kvferry.contract.hooks import HOOKS, Hook, HookSide


@dataclass
class Script:
    """What the connector pretends. It may be changed between steps."""

    hit_tokens: int = 0
    """It has the KV of this many first tokens of every prompt (prompts must not be shorter)."""
    is_async: bool = False
    looking_times: int = 0
    """So many lookups are answered with "ask again" before the first answer."""
    load_steps: int = 0
    """An asynchronous load ends so many steps after the one that starts it."""
    failure: Literal["", "blocks", "request"] = ""
    """How the first load of each request fails: its last block, or all of it; then there is no hit for it any more."""
    send_steps: int | None = None
    """Blocks of finished requests are kept for so many steps after their end was told; None: not kept."""


@dataclass(frozen=True, slots=True)
class HookCall:
    """One call of a hook. `text` is what matters of it, written at the time of the call, the same for every host."""

    role: str
    """scheduler, worker or class."""
    hook: str
    args: tuple[Any, ...]
    text: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """Role, hook and arguments as one line."""
        return f"{self.role}.{self.hook} {self.text}".rstrip()


@dataclass
class Record:
    """The calls of one engine, and the state the connector's two instances share with the test."""

    script: Script
    calls: list[HookCall] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    """Request id -> r1, r2, ... in the order in which the host told of them."""
    worker: Any = None
    failed_ids: set[str] = field(default_factory=set)
    """Requests for which there is no hit any more."""

    def key(self, request_id: str) -> str:
        """The request's name in the record, which does not depend on the host."""
        return self.keys.setdefault(request_id, f"r{len(self.keys) + 1}")

    def names(self) -> list[tuple[str, str]]:
        """(role, hook) of each call."""
        return [(call.role, call.hook) for call in self.calls]

    def args(self, hook: str) -> list[tuple[Any, ...]]:
        """The arguments of each call of one hook."""
        return [call.args for call in self.calls if call.hook == hook]

    def lines(self) -> list[str]:
        """Each call as a line."""
        return [call.line for call in self.calls]

    def forget(self) -> None:
        """Drop all that is known of calls and requests; the script stays."""
        self.calls.clear()
        self.keys.clear()
        self.failed_ids.clear()


RECORDS: list[Record] = []
"""All records of this process; new instances write to the last."""


def new_record(script: Script | None = None) -> Record:
    """Make the record that the next engine's connector writes to."""
    RECORDS.append(Record(script or Script()))
    return RECORDS[-1]


@dataclass
class RecorderMetadata:
    """One step's orders."""

    loads: dict[str, tuple[list[int], ...]] = field(default_factory=dict)
    """Request id -> ids of the blocks to fill, per group."""
    is_async: bool = False
    sends: list[str] = field(default_factory=list)
    """Ended requests whose blocks are kept."""


class _Answers:
    """The script's connector; goes before a host's base class."""

    record: Record
    role: Any

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self.record = RECORDS[-1]
        self.record.calls.append(HookCall(role.name.lower(), "__init__", (), ""))
        if role.name == "WORKER":
            self.record.worker = self
        super().__init__(vllm_config, role, kv_cache_config)  # type: ignore[call-arg]  # the host's base is next
        self._block_size = vllm_config.cache_config.block_size
        self._orders = RecorderMetadata()
        self._local_tokens: dict[str, int] = {}
        self._loading: dict[str, int] = {}
        self._load_blocks: dict[str, tuple[list[int], ...]] = {}
        self._sending: dict[str, int] = {}
        self._bad_blocks: set[int] = set()
        self._failed: set[str] = set()

    # ---- scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        script = self.record.script
        if script.looking_times > 0:
            script.looking_times -= 1
            return None, False
        num = script.hit_tokens - num_computed_tokens
        if num <= 0 or request.request_id in self.record.failed_ids:
            return 0, False
        self._local_tokens[request.request_id] = num_computed_tokens
        return num, script.is_async

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            first = self._local_tokens[request.request_id]
            part = slice(first // self._block_size, -(-(first + num_external_tokens) // self._block_size))
            self._orders.loads[request.request_id] = tuple(list(group[part]) for group in blocks.get_block_ids())
            if self.record.script.failure:
                self.record.failed_ids.add(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> RecorderMetadata:
        orders, self._orders = self._orders, RecorderMetadata()
        orders.is_async = self.record.script.is_async
        return orders

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        if self.record.script.send_steps is None:
            return False, None
        self._orders.sends.append(request.request_id)
        return True, None

    # ---- worker

    def bind_connector_metadata(self, connector_metadata: RecorderMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)  # type: ignore[misc]
        self._sending.update(dict.fromkeys(connector_metadata.sends, self.record.script.send_steps or 0))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        orders: RecorderMetadata = self._get_connector_metadata()  # type: ignore[attr-defined]
        for request_id, block_ids in orders.loads.items():
            self._load_blocks[request_id] = block_ids
            if orders.is_async:
                self._loading[request_id] = self.record.script.load_steps
            else:
                self._load_ended(request_id)

    def _load_ended(self, request_id: str) -> None:
        block_ids = self._load_blocks.pop(request_id)
        if self.record.script.failure == "blocks":
            self._bad_blocks.add(block_ids[0][-1])
        elif self.record.script.failure == "request":
            self._failed.add(request_id)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        received = _due(self._loading)
        for request_id in received:
            self._load_ended(request_id)
        return _due(self._sending), received

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results = super().get_transfer_results(finished_req_ids)  # type: ignore[misc]
        results.failed_recving, self._failed = self._failed, set()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad


def _due(steps_left: dict[str, int]) -> set[str]:
    """Take out whose time has come, and bring the others one step nearer."""
    due = {request_id for request_id, steps in steps_left.items() if steps <= 0}
    for request_id in list(steps_left):
        steps_left[request_id] -= 1
        if request_id in due:
            del steps_left[request_id]
    return due


class _HmaAnswers(_Answers):
    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return _Answers.request_finished(self, request, block_ids)


def recorder_classes(contract: Any) -> tuple[type[Any], type[Any]]:
    """(Recorder, HmaRecorder) for a host's contract module, the second with support for hybrid KV caches."""
    contract.KVConnectorMetadata.register(RecorderMetadata)
    base, hma = contract.KVConnectorBase_V1, contract.SupportsHMA
    plain = type("Answers", (_Answers, base), {})
    hybrid = type("HmaAnswers", (_HmaAnswers, base, hma), {})
    return _recording_class("Recorder", plain), _recording_class("HmaRecorder", hybrid)


def _recording_class(name: str, answers: type[Any]) -> type[Any]:
    made: type[Any] = type(name, (answers,), {})
    for hook in HOOKS:
        if not hook.is_own and hasattr(answers, hook.name):
            setattr(made, hook.name, _recording(hook, made))
    return made


def _recording(hook: Hook, made: type[Any]) -> Any:
    def note(record: Record, role: str, *args: Any, **kwargs: Any) -> None:
        text = _TEXTS[hook.name](record, *args) if hook.name in _TEXTS else ""
        record.calls.append(HookCall(role, hook.name, args, text, kwargs))

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(super(made, self), hook.name)
        inspect.signature(method).bind(*args, **kwargs)
        note(self.record, self.role.name.lower(), *args, **kwargs)
        return method(*args, **kwargs)

    def read(self: Any) -> Any:
        note(self.record, self.role.name.lower())
        return getattr(super(made, self), hook.name)

    def call_class(cls: Any, *args: Any, **kwargs: Any) -> Any:
        note(RECORDS[-1], "class", *args)
        return getattr(super(made, cls), hook.name)(*args, **kwargs)

    if hook.side is HookSide.CLASS:
        return classmethod(call_class)
    return property(read) if hook.is_property else call


# ---- what matters of the arguments ----------------------------------------------------------------------------


def _counts(groups: Any) -> str:
    """Number of blocks per group, of one list or of a tuple of lists."""
    if groups is None:
        return "none"
    lists = groups if isinstance(groups, tuple) else (groups,)
    return ",".join(str(len(group)) for group in lists)


def _keys(record: Record, request_ids: Iterable[str] | None) -> str:
    return ",".join(sorted(record.key(request_id) for request_id in request_ids or ())) or "none"


def _scheduled(record: Record, output: Any) -> str:
    parts = []
    for new in output.scheduled_new_reqs:
        num = output.num_scheduled_tokens[new.req_id]
        parts.append(f"new={record.key(new.req_id)}:{new.num_computed_tokens}+{num}:blocks={_counts(new.block_ids)}")
    cached = output.scheduled_cached_reqs
    for index, request_id in enumerate(cached.req_ids):
        kind = "resumed" if request_id in cached.resumed_req_ids else "cached"
        tokens = f"{cached.num_computed_tokens[index]}+{output.num_scheduled_tokens[request_id]}"
        new_blocks = _counts(cached.new_block_ids[index])
        parts.append(f"{kind}={record.key(request_id)}:{tokens}:new_blocks={new_blocks}")
    sets = {"finished": output.finished_req_ids, "preempted": output.preempted_req_ids}
    parts += [f"{name}={_keys(record, ids)}" for name, ids in sets.items() if ids]
    return " ".join([*parts, *(["sync_loads"] if output.has_sync_kv_loads else [])])


def _reported(record: Record, output: Any) -> str:
    sets = {"sent": output.finished_sending, "received": output.finished_recving, "failed": output.failed_recving}
    parts = [f"{name}={_keys(record, ids)}" for name, ids in sets.items() if ids]
    return " ".join([*parts, *([f"bad_blocks={len(output.invalid_block_ids)}"] if output.invalid_block_ids else [])])


def _ended(record: Record, request: Any, block_ids: Any) -> str:
    key, status = record.key(request.request_id), request.status.name
    return f"{key} {status} computed={request.num_computed_tokens} blocks={_counts(block_ids)}"


def _layer(record: Record, name: str, *_: Any) -> str:
    return name.removeprefix("language_model.").removesuffix(".self_attn.attn")


_TEXTS: dict[str, Callable[..., str]] = {
    "register_kv_caches": lambda record, caches: f"layers={len(caches)}",
    "set_xfer_handshake_metadata": lambda record, by_rank: f"ranks={len(by_rank)}",
    "set_xfer_handshake_metadata_pp_aware": lambda record, by_rank: f"ranks={len(by_rank)}",
    "on_new_request": lambda record, request: f"{record.key(request.request_id)} tokens={request.num_tokens}",
    "get_num_new_matched_tokens": lambda record, request, num: (
        f"{record.key(request.request_id)} {request.status.name} tokens={request.num_tokens} local={num}"
    ),
    "get_loaded_kv_cache_group_ids": lambda record, request: record.key(request.request_id),
    "update_state_after_alloc": lambda record, request, blocks, num: (
        f"{record.key(request.request_id)} computed={request.num_computed_tokens} "
        f"blocks={_counts(blocks.get_block_ids())} external={num}"
    ),
    "get_external_cache_hit_sources": lambda record, request, num: f"{record.key(request.request_id)} external={num}",
    "build_connector_meta": _scheduled,
    "start_load_kv": lambda record, context, **_: (
        "no attn_metadata" if context.attn_metadata is None else f"layers={len(context.attn_metadata)}"
    ),
    "wait_for_layer_load": _layer,
    "save_kv_layer": _layer,
    "get_finished": lambda record, ids: f"finished={_keys(record, ids)}",
    "get_transfer_results": lambda record, ids: f"finished={_keys(record, ids)}",
    "update_connector_output": _reported,
    "request_finished": _ended,
    "request_finished_all_groups": _ended,
}
"""Hook -> its arguments as text; hooks that are not here have none that matter."""
