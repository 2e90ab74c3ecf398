"""The engine's options on the command line, shared by the commands that start an engine or judge its settings."""

from __future__ import annotations

from typing import Annotated

import typer

TransferConfig = Annotated[str | None, typer.Option(metavar="JSON", help="The KV connector.")]
OffloadingSize = Annotated[
    float | None, typer.Option(metavar="GIB", help="Keep KV in this much host memory (an OffloadingConnector).")
]
OffloadingBackend = Annotated[
    str | None, typer.Option(help="What keeps the KV of --kv-offloading-size: native or lmcache.")
]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt and output together, in tokens.")]
MaxNumSeqs = Annotated[int, typer.Option(help="Requests that run at once.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(help="Tokens of one forward.")]
BlockSize = Annotated[int, typer.Option(help="Tokens of one KV block.")]
NumKVBlocks = Annotated[int | None, typer.Option(help="Size of the KV cache in blocks.")]
KVCacheBytes = Annotated[int | None, typer.Option(help="Size of the KV cache in bytes.")]
Dtype = Annotated[str, typer.Option(help="auto takes the checkpoint's.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
V2Runner = Annotated[
    bool | None,
    typer.Option("--use-v2-model-runner/--no-use-v2-model-runner", help="Decided by rule unless given."),
]
DisableHybrid = Annotated[
    bool | None,
    typer.Option(
        "--disable-hybrid-kv-cache-manager/--no-disable-hybrid-kv-cache-manager",
        help="Keep all layers' KV alike, windows or not; decided by model and connector unless given.",
    ),
]
KVCacheLayout = Annotated[
    str,
    typer.Option(help="How KV lies in memory: auto, BLNHC, BLHNC, LBNHC (or NHD), LBHNC (or HND)."),
]
KernelBlockSize = Annotated[
    int | None, typer.Option(help="Tokens of the blocks that attention works in (second model runner).")
]
EnablePrefixCaching = Annotated[bool, typer.Option(help="Reuse KV of equal prefixes in the engine.")]
Seed = Annotated[int, typer.Option(help="For requests that bring none.")]

TRANSFER_OPTIONS = ("kv_transfer_config", "kv_offloading_size", "kv_offloading_backend")
ENGINE_OPTIONS = (
    "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_kv_blocks", "kv_cache_bytes", "dtype",
    "device", "use_v2_model_runner", "disable_hybrid_kv_cache_manager", "kv_cache_layout", "kernel_block_size",
)  # fmt: skip
"""Settings that `LLM`, `EngineOptions` and the commands call by the same name."""
