"""Options on the command line that several commands share, most of them the embedded engine's."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from kvferry.config import parse_size


def size_option(help_text: str, *, default: str | None = None) -> Any:
    """An option for a number of bytes that also takes a unit; `default` is how the help shows the default."""
    shown = "" if default is None else f" {default} by default."
    unit = 'In bytes, or a number with a unit ("8GB", "8GiB").'
    return typer.Option(parser=_size, metavar="SIZE", help=f"{help_text} {unit}{shown}", show_default=False)


def _size(value: str | int) -> int:
    return parse_size(value, "SIZE")


def _offloading_size(value: str | float) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value  # with a unit; `transfer_config` reads and checks it


Model = Annotated[str, typer.Option(help="Model: a folder, a .gguf file, or smollm2.")]
TransferConfig = Annotated[
    str | None,
    typer.Option(metavar="JSON", help="KV connector and its settings, in vLLM's format. No connector by default."),
]
OffloadingSize = Annotated[
    Any,
    typer.Option(
        parser=_offloading_size,
        metavar="SIZE",
        help="Host memory for an OffloadingConnector, in GiB, or a number with a unit "
        '("8GB"). No offloading by default.',
    ),
]
OffloadingBackend = Annotated[
    str | None, typer.Option(help="Connector for --kv-offloading-size: native (the default) or lmcache.")
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        help="Largest length of prompt and output together, in tokens. By default the limit of model and KV cache."
    ),
]
MaxNumSeqs = Annotated[int, typer.Option(help="Largest number of requests that run at the same time.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(help="Largest number of tokens in one forward pass.")]
BlockSize = Annotated[int, typer.Option(help="Size of one KV block, in tokens.")]
NumKVBlocks = Annotated[
    int | None, typer.Option(help="Size of the KV cache, in blocks. By default --kv-cache-bytes decides.")
]
KVCacheBytes = Annotated[
    int | None,
    size_option("Size of the KV cache. By default the size that --max-num-seqs requests can fill, at most 1 GiB."),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Data type of weights and KV: float32, bfloat16, float16, or auto for the type of the checkpoint."
    ),
]
Device = Annotated[str, typer.Option(help="Device that computes: cpu or cuda.")]
V2Runner = Annotated[
    bool | None,
    typer.Option(
        "--use-v2-model-runner/--no-use-v2-model-runner",
        help="Second (V2) or first model runner. By default model, connector and environment decide; `kvferry doctor` "
        "shows the choice and its reason.",
    ),
]
V2Architectures = Annotated[
    list[str] | None,
    typer.Option(
        "--v2-model-architectures",
        callback=lambda names: names or None,  # an option that was not given is an empty list
        help="Model class, such as LlamaForCausalLM, that runs in the second model runner where no other setting "
        "decides; may be repeated. By default Qwen3ForCausalLM and Qwen3MoeForCausalLM.",
    ),
]
DisableHybrid = Annotated[
    bool | None,
    typer.Option(
        "--disable-hybrid-kv-cache-manager/--no-disable-hybrid-kv-cache-manager",
        help="Keep the KV of layers with a window as long as that of layers without one. By default model and "
        "connector decide.",
    ),
]
KVCacheLayout = Annotated[
    str,
    typer.Option(
        help="Order of the KV cache's dimensions in memory: auto, BLNHC, BLHNC, LBNHC (or NHD), LBHNC (or HND)."
    ),
]
KernelBlockSize = Annotated[
    int | None,
    typer.Option(
        help="Size of the blocks that attention reads, in tokens; for the second model runner only. By default 32 or "
        "16, whichever divides the block size."
    ),
]
HiddenStateLayers = Annotated[
    list[int] | None,
    typer.Option(
        "--hidden-state-layer",
        help="Number of a layer whose hidden states the engine gives to the connector; may be repeated. No layer by "
        "default.",
    ),
]
EnablePrefixCaching = Annotated[bool, typer.Option(help="Reuse of KV of equal prefixes within the engine.")]
Seed = Annotated[int, typer.Option(help="Seed for requests without a seed of their own.")]
NumThreads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of compute threads; use 1 where other processes share the cores. By default torch's own choice.",
    ),
]
ListenHost = Annotated[str, typer.Option(help="Address on which the server listens.")]
ListenPort = Annotated[int, typer.Option(help="Port on which the server listens; 0 selects a free port.")]
MaxBodyBytes = Annotated[int, size_option("Largest request body.", default="8MiB")]
MaxStops = Annotated[
    int,
    typer.Option(
        help="Largest number of stop strings, and of stop tokens, in one request; the server refuses more with status "
        "400."
    ),
]
MaxConnections = Annotated[
    int | None,
    typer.Option(
        help="Largest number of connections. Beyond it, the server closes the connection that has waited longest "
        "without a complete request. By default the room within the limit of open files (`ulimit -n`), at most 2048."
    ),
]
HeaderTimeout = Annotated[float, typer.Option(help="Longest time, in seconds, for the headers of a request to arrive.")]
BodyTimeout = Annotated[float, typer.Option(help="Longest time, in seconds, for the body of a request to arrive.")]
APIKey = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Key that clients must send (`Authorization: Bearer KEY`); may be repeated, and one of several keys is "
        "enough. Other users of this machine can see keys on the command line; the environment variable "
        "KVFERRY_API_KEY (or vLLM's VLLM_API_KEY) hides its key. No key by default.",
    ),
]
AllowedOrigins = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="Origins of web pages that may call this server from a browser, for example "
        '["https://chat.example.com"]; ["*"] allows all. No origin by default.',
    ),
]
AllowedHosts = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help='Values of the `Host` header that the server accepts, for example ["llm.example.com"]; ["*"] accepts all. '
        "By default all, but only localhost where the server listens on a loopback address.",
    ),
]
DrainTimeout = Annotated[
    float, typer.Option(help="Longest time, in seconds, for running requests to end after SIGTERM.")
]
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
