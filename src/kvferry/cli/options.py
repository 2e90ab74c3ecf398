"""Options on the command line that several commands share, most of them the embedded engine's."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from kvferry.config import parse_size


def size_option(help_text: str, *, default: str | None = None) -> Any:
    """An option for a number of bytes that also takes a unit; `default` is how the help shows the default."""
    shown = "" if default is None else f" {default} by default."
    unit = 'Bytes, or a number with a unit ("8GB", "8GiB").'
    return typer.Option(parser=_size, metavar="SIZE", help=f"{help_text} {unit}{shown}", show_default=False)


def _size(value: str | int) -> int:
    return parse_size(value, "SIZE")


def _offloading_size(value: str | float) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value  # with a unit; `transfer_config` reads and checks it


Model = Annotated[str, typer.Option(help="A model folder, a .gguf file, or smollm2.")]
TransferConfig = Annotated[
    str | None,
    typer.Option(metavar="JSON", help="The KV connector and its settings, as in vLLM. No connector by default."),
]
OffloadingSize = Annotated[
    Any,
    typer.Option(
        parser=_offloading_size,
        metavar="SIZE",
        help="Keep KV in so much host memory with an OffloadingConnector: GiB, or a number with a unit "
        '("8GB"). Not kept by default.',
    ),
]
OffloadingBackend = Annotated[
    str | None, typer.Option(help="What keeps the KV of --kv-offloading-size: native (the default) or lmcache.")
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(help="Longest prompt and output together, in tokens. By default what model and KV cache allow."),
]
MaxNumSeqs = Annotated[int, typer.Option(help="Requests that run at once.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(help="Most tokens of one forward pass.")]
BlockSize = Annotated[int, typer.Option(help="Tokens of one KV block.")]
NumKVBlocks = Annotated[
    int | None, typer.Option(help="Size of the KV cache in blocks. By default --kv-cache-bytes decides.")
]
KVCacheBytes = Annotated[
    int | None,
    size_option("Size of the KV cache. By default what --max-num-seqs requests can use, at most 1 GiB."),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's own.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
V2Runner = Annotated[
    bool | None,
    typer.Option(
        "--use-v2-model-runner/--no-use-v2-model-runner",
        help="The model runner; by default model, connector and environment decide (`kvferry doctor` says how).",
    ),
]
V2Architectures = Annotated[
    list[str] | None,
    typer.Option(
        "--v2-model-architectures",
        callback=lambda names: names or None,  # an option that was not given is an empty list
        help="A model class, such as LlamaForCausalLM, that gets the second model runner where nothing else decides; "
        "may be repeated. By default Qwen3ForCausalLM and Qwen3MoeForCausalLM.",
    ),
]
DisableHybrid = Annotated[
    bool | None,
    typer.Option(
        "--disable-hybrid-kv-cache-manager/--no-disable-hybrid-kv-cache-manager",
        help="Keep the KV of all layers alike, whether they have a window or not. By default model and connector "
        "decide.",
    ),
]
KVCacheLayout = Annotated[
    str,
    typer.Option(help="How KV lies in memory: auto, BLNHC, BLHNC, LBNHC (or NHD), LBHNC (or HND)."),
]
KernelBlockSize = Annotated[
    int | None,
    typer.Option(
        help="Tokens of the blocks that attention works in; only for the second model runner. By default 32 or 16 "
        "where the block size is a multiple of it."
    ),
]
HiddenStateLayers = Annotated[
    list[int] | None,
    typer.Option(
        "--hidden-state-layer",
        help="Number of a layer whose hidden states go to the connector; may be repeated. None by default.",
    ),
]
EnablePrefixCaching = Annotated[bool, typer.Option(help="Reuse the KV of equal prefixes in the engine.")]
Seed = Annotated[int, typer.Option(help="Seed for requests that bring none.")]
NumThreads = Annotated[
    int | None,
    typer.Option(
        min=1, help="Threads for computing; take 1 where other processes share the cores. By default as torch decides."
    ),
]
ListenHost = Annotated[str, typer.Option(help="Address to listen on.")]
ListenPort = Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")]
MaxBodyBytes = Annotated[int, size_option("Largest request body.", default="8MiB")]
MaxStops = Annotated[
    int, typer.Option(help="Most stop strings of a request, and most tokens that stop it; more are refused with 400.")
]
MaxConnections = Annotated[
    int | None,
    typer.Option(
        help="Most connections; when there are more, the one that has waited longest for a whole request is closed. By "
        "default what the limit of open files (`ulimit -n`) has room for, at most 2048."
    ),
]
HeaderTimeout = Annotated[float, typer.Option(help="Seconds that the headers of a request may take to come.")]
BodyTimeout = Annotated[float, typer.Option(help="Seconds that the body of a request may take to come.")]
APIKey = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Key that clients must send (`Authorization: Bearer KEY`); any of several is enough (repeat it). "
        "Other users of this machine can see it; the environment variable KVFERRY_API_KEY (or vLLM's VLLM_API_KEY) is "
        "safer. No key by default.",
    ),
]
AllowedOrigins = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help='Web pages that may use this server from a browser, as ["https://chat.example.com"]; ["*"] for all. None '
        "by default.",
    ),
]
AllowedHosts = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help='Names that requests may call this server by, as ["llm.example.com"]; ["*"] for any. By default any, but '
        "only localhost where the server listens on a loopback address.",
    ),
]
DrainTimeout = Annotated[float, typer.Option(help="Seconds that requests under way may take to end after SIGTERM.")]
TRANSFER_OPTIONS = ("kv_transfer_config", "kv_offloading_size", "kv_offloading_backend")


class Host(Enum):
    """Whose start `doctor` judges."""

    EMBEDDED = "embedded"
    VLLM = "vllm"


ENGINE_OPTIONS = (
    "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_kv_blocks", "kv_cache_bytes", "dtype",
    "device", "use_v2_model_runner", "v2_model_architectures",
    "disable_hybrid_kv_cache_manager", "kv_cache_layout", "kernel_block_size",
)  # fmt: skip
"""Settings that `LLM`, `EngineOptions` and the commands call by the same name."""
