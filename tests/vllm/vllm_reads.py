"""What vLLM's own connectors read from the objects that a host gives them, found in their source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import vllm

_PACKAGE = Path(str(vllm.__file__)).parent
_FOLDERS = ("distributed/kv_transfer/kv_connector", "v1/kv_offload", "v1/simple_kv_offload")
_NO_CONNECTORS = ("hf3fs_metadata_server.py",)
"""Programs of their own; the `request` of this one is an HTTP request."""

_BY_NAME = {
    "vllm_config": "vllm_config",
    "model_config": "vllm_config.model_config",
    "cache_config": "vllm_config.cache_config",
    "parallel_config": "vllm_config.parallel_config",
    "scheduler_config": "vllm_config.scheduler_config",
    "kv_transfer_config": "vllm_config.kv_transfer_config",
    "kv_cache_config": "kv_cache_config",
    "request": "request",
    "scheduler_output": "scheduler_output",
    "new_req": "new_request",
    "cached_reqs": "cached_requests",
}
"""Names that mean the same object in all of these files, with or without a leading underscore."""
_BY_ANNOTATION = {
    "VllmConfig": "vllm_config",
    "ModelConfig": "vllm_config.model_config",
    "CacheConfig": "vllm_config.cache_config",
    "ParallelConfig": "vllm_config.parallel_config",
    "SchedulerConfig": "vllm_config.scheduler_config",
    "KVTransferConfig": "vllm_config.kv_transfer_config",
    "KVCacheConfig": "kv_cache_config",
    "Request": "request",
    "SchedulerOutput": "scheduler_output",
    "NewRequestData": "new_request",
    "CachedRequestData": "cached_requests",
}
_PARTS = {
    ("scheduler_output", "scheduled_new_reqs"): "list of new_request",
    ("scheduler_output", "scheduled_cached_reqs"): "cached_requests",
}
_CALLS = {"get_current_vllm_config": "vllm_config", "get_current_vllm_config_or_none": "vllm_config"}


def attribute_reads() -> dict[str, set[str]]:
    """Attributes such as "vllm_config.cache_config.block_size" -> the files that read them.

    Left out is what connectors can do without: `hasattr`, and `getattr` with a default.
    """
    reads: dict[str, set[str]] = {}
    for path in _sources():
        reader = _Reader(str(path.relative_to(_PACKAGE)))
        reader.visit(ast.parse(path.read_text()))
        for name in reader.reads:
            reads.setdefault(name, set()).add(reader.file)
    return reads


def _sources() -> Iterator[Path]:
    for folder in _FOLDERS:
        yield from (path for path in sorted((_PACKAGE / folder).rglob("*.py")) if path.name not in _NO_CONNECTORS)


class _Reader(ast.NodeVisitor):
    """Follows the objects through annotations, assignments, loops and well-known names of one file."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.reads: set[str] = set()
        self._locals: list[dict[str, str | None]] = [{}]

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        own: dict[str, str | None] = {}
        for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            if arg.annotation is not None:
                own[arg.arg] = _kind_of_annotation(arg.annotation)
            elif arg.arg == "request" and node.name.endswith("_from_new_request"):
                own[arg.arg] = "new_request"
        self._locals.append(own)
        self.generic_visit(node)
        self._locals.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self._locals[-1][target.id] = self._kind(node.value)

    def visit_For(self, node: ast.For) -> None:
        self._loop(node.target, node.iter)
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        self._locals.append({})
        for loop in node.generators:
            self._loop(loop.target, loop.iter)
        self.generic_visit(node)
        self._locals.pop()

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    def _loop(self, target: ast.expr, over: ast.expr) -> None:
        self._locals[-1].update((name.id, None) for name in ast.walk(target) if isinstance(name, ast.Name))
        kind = self._kind(over) or ""
        if isinstance(target, ast.Name) and kind.startswith("list of "):
            self._locals[-1][target.id] = kind.removeprefix("list of ")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        kind = self._kind(node.value)
        if kind is not None and not kind.startswith("list of ") and isinstance(node.ctx, ast.Load):
            self.reads.add(f"{kind}.{node.attr}")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 2:
            kind = self._kind(node.args[0])
            if kind is not None and isinstance(node.args[1], ast.Constant):
                self.reads.add(f"{kind}.{node.args[1].value}")
        self.generic_visit(node)

    def _kind(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            for names in reversed(self._locals):
                if node.id in names:
                    return names[node.id]
            return _BY_NAME.get(node.id.lstrip("_"))
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return _BY_NAME.get(node.attr.lstrip("_"))
            kind = self._kind(node.value)
            if kind is None:
                return None
            return _PARTS.get((kind, node.attr)) or (
                f"{kind}.{node.attr}" if kind == "vllm_config" and node.attr.endswith("_config") else None
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return _CALLS.get(node.func.id)
        return None


def _kind_of_annotation(node: ast.expr) -> str | None:
    text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)
    names = {part.strip().strip("\"'").split(".")[-1] for part in text.split("|")} - {"None"}
    return _BY_ANNOTATION.get(names.pop()) if len(names) == 1 else None
