"""What the identity of KV takes from vLLM's configuration: every field of it is judged."""

from __future__ import annotations

import dataclasses
import re
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import vllm.config
import vllm.envs
from conftest import TINY, StartEngines
from engine_process import PATIENT, random_prompt
from vllm.model_executor.model_loader import LoadFormats

from kvferry.contract.host import _no_hits_reason
from kvferry.contract.numerics import (
    FOLDER_FORMATS,
    HARMLESS,
    HARMLESS_ENVIRONMENT,
    adapter_settings,
    chosen_by,
    numerics_of,
)

# Fields that make KV another one, by class. A field that stands neither here nor among the harmless fails the test.
COUNTED = {
    "ModelConfig": {
        "trust_remote_code", "dtype", "is_submodel_config", "revision", "code_revision", "quantization",
        "quantization_config", "disable_sliding_window", "model_class_overrides", "model_impl",
    },
    "CacheConfig": {"kv_cache_dtype_skip_layers", "kv_sharing_fast_prefill", "swa_bounded_replay"},
    "AttentionConfig": {
        "use_trtllm_attention", "disable_flashinfer_q_quantization", "use_prefill_query_quantization",
        "indexer_kv_dtype", "indexer_sparse_logits", "hisparse_config", "use_non_causal",
    },
    "MultiModalConfig": {
        "language_model_only", "media_io_kwargs", "mm_processor_kwargs", "mm_device_do_normalize",
        "mm_hasher_algorithm", "mm_encoder_only", "mm_encoder_attn_dtype", "mm_encoder_fp8_scale_path",
        "video_pruning_rate", "video_pruning_method",
    },
    "LoadConfig": {"model_loader_extra_config", "ignore_patterns"},
    "KernelConfig": {"moe_backend", "linear_backend", "linear_backend_per_quant", "sparse_indexer_topk_backend"},
    "VllmConfig": {
        "model_config", "cache_config", "attention_config", "load_config", "kernel_config", "lora_config",
        "speculative_config", "additional_config", "engram_config", "diffusion_config",
    },
    "LoRAConfig": {"lora_dtype", "target_modules", "enable_tower_connector_lora"},
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_every_field_is_counted_or_harmless_for_a_reason(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(getattr(vllm.config, name))}
    unjudged = fields - COUNTED[name] - HARMLESS[name].keys()
    assert not unjudged, f"say of each of {sorted(unjudged)} whether KV depends on it"
    assert not COUNTED[name] & HARMLESS[name].keys()


# Of the variables that vLLM reads, with wildcards: those by which it computes or takes other kernels, weights or code.
COUNTED_VARIABLES = (
    "VLLM_FLOAT32_MATMUL_PRECISION", "VLLM_BATCH_INVARIANT", "VLLM_REPLICATE_EMBED", "VLLM_TRITON_*",
    "VLLM_USE_MODELSCOPE", "VLLM_MODEL_REDIRECT_PATH", "VLLM_TEST_FORCE_LOAD_FORMAT", "VLLM_PLUGINS",
    "VLLM_PP_LAYER_PARTITION", "VLLM_CPU_INT4_W4A8", "VLLM_CPU_ATTN_SPLIT_KV", "VLLM_ZENTORCH_WEIGHT_PREPACK",
    "VLLM_VIDEO_LOADER_BACKEND", "VLLM_MEDIA_CONNECTOR", "VLLM_XLA_USE_SPMD", "VLLM_XPU_*", "VLLM_ROCM_*",
    "VLLM_ADAPTIVE_VERIFICATION_PROFILE_CONTEXT_LEN", "VLLM_DISABLED_KERNELS", "VLLM_USE_HW_AGNOSTIC",
    "VLLM_ENABLE_FLA_PACKED_RECURRENT_DECODE", "VLLM_GDN_DECODE_KERNEL", "VLLM_DISABLE_PYNCCL", "VLLM_USE_OINK_OPS",
    "VLLM_MXFP4_*", "VLLM_MXFP8_*", "VLLM_MARLIN_*", "VLLM_HUMMING_*", "VLLM_DEEPEP*", "VLLM_TPU_USING_PATHWAYS",
    "VLLM_USE_DEEP_GEMM*", "VLLM_MOE_*", "VLLM_DCP_Q_REPLICATE", "VLLM_USE_FUSED_MOE_GROUPED_TOPK", "VLLM_KIMI_K3_*",
    "VLLM_ENABLE_GEMM_RS", "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER", "VLLM_B12X_MOE_FP4_FORCE_A16",
    "VLLM_USE_FLASHINFER_MOE_INT4", "VLLM_FLASHINFER_*", "VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE",
    "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE", "VLLM_ALLREDUCE_*", "VLLM_USE_NCCL_SYMM_MEM",
    "VLLM_DISABLE_DSV4_MEGAMOE_SHARED_EXPERT_FUSION", "VLLM_USE_DIRECT_DCP_*", "VLLM_ENABLE_HPC_OPS",
    "VLLM_USE_TRITON_*",
)  # fmt: skip


def test_every_environment_variable_is_counted_or_harmless_for_a_reason() -> None:
    """What does not begin with VLLM_ says where programs lie, and is never counted."""
    variables = [name for name in vllm.envs.environment_variables if name.startswith("VLLM_")]
    patterns = [pattern for group in (*HARMLESS_ENVIRONMENT.values(), COUNTED_VARIABLES) for pattern in group]
    unjudged = [name for name in variables if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    assert not unjudged, f"say of each of {unjudged} whether KV depends on it"
    for pattern in patterns:
        assert any(fnmatchcase(name, pattern) for name in variables), f"vLLM reads no {pattern}"


def test_every_variable_that_vllm_reads_without_declaring_it_is_judged() -> None:
    """Of one process or machine: they were part of the identity, and no restart found what had been stored."""
    harmless = {
        "VLLM_DIST_IDENT", "VLLM_CPU_SIM_MULTI_NUMA", "VLLM_MORIIO_TRANSFER_TIMEOUT_S", "VLLM_SNAPSHOT_TIMEOUT_S",
        "VLLM_PRECOMPILED_WHEEL_LOCATION",
    }  # fmt: skip
    sources = "".join(path.read_text() for path in Path(vllm.envs.__file__).parent.rglob("*.py"))
    read = re.findall(r"""(?:environ(?:\.get\(|\[)|getenv\()\s*["'](VLLM_[A-Z0-9_]+)""", sources)
    assert set(read) - set(vllm.envs.environment_variables) == harmless | {"VLLM_CUSTOM_ALLREDUCE_ALGO"}


def test_variables_that_change_arithmetic_are_told_apart(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = numerics_of(make_config())
    for name, value, counts in (
        ("VLLM_CPU_INT4_W4A8", "0", True), ("VLLM_MARLIN_INPUT_DTYPE", "fp8", True),
        ("VLLM_CUSTOM_ALLREDUCE_ALGO", "1stage", True), ("NVIDIA_TF32_OVERRIDE", "1", True),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", True),
        ("VLLM_CPU_KVCACHE_SPACE", "2", False), ("VLLM_API_KEY", "secret", False),
        ("VLLM_USE_V2_MODEL_RUNNER", "1", False), ("VLLM_DIST_IDENT", "kvferry", False),
        ("VLLM_SERVICE_HOST", "10.0.0.7", False), ("VLLM_PORT_8000_TCP_ADDR", "10.0.0.7", False),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            other = numerics_of(make_config())
        assert [key for key in plain if plain[key] != other[key]] == (["environment"] if counts else []), name
        assert not counts or name in other["environment"]


def test_what_all_tokens_are_chosen_by_is_told(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The embedded engine, which takes first tokens over, has none of it: its own would be others."""
    assert chosen_by(make_config()) == ""
    (tmp_path / "generation_config.json").write_text('{"suppress_tokens": [5], "temperature": 0.5}')
    suppressed = make_config(generation_config=str(tmp_path))
    assert chosen_by(suppressed) == '{"suppress_tokens":[5]}'
    assert "fleet:Force" in chosen_by(make_config(logits_processors=["fleet:Force"]))
    marked = make_config()
    marked.watermark_config = vllm.config.WatermarkConfig(key=1)
    assert "gumbel" in chosen_by(marked)
    folder = tmp_path / "fleet-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fleet\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[vllm.logits_processors]\nforce = fleet:Force\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert chosen_by(make_config()) == '{"plugins":["force=fleet:Force of fleet 1.0"]}'


def test_plugins_of_others_count(make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They may put another model in the place of vLLM's, under the same name of an architecture."""
    plain = numerics_of(make_config())
    assert plain["plugins"] == "null"
    folder = tmp_path / "fleet-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fleet\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[vllm.general_plugins]\nfleet = fleet.models:register\n")
    monkeypatch.syspath_prepend(tmp_path)
    other = numerics_of(make_config())
    assert {name: text for name, text in other.items() if plain[name] != text} == {
        "plugins": '["fleet=fleet.models:register of fleet 1.0"]'
    }


@pytest.fixture(scope="module")
def make_config(tiny_llama: str) -> Any:
    def make(cache: dict[str, Any] | None = None, **model: Any) -> Any:
        settings = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 512, **model}
        return SimpleNamespace(
            model_config=vllm.config.ModelConfig(model=tiny_llama, **settings),
            cache_config=vllm.config.CacheConfig(block_size=32, **(cache or {})),
            attention_config=vllm.config.AttentionConfig(),
        )

    return make


MODELS = Path(vllm.config.__file__).parents[1] / "model_executor/models"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0}


def test_overrides_and_settings_are_told_apart_by_name(make_config: Any, tmp_path: Path, tiny_llama: str) -> None:
    plain = numerics_of(make_config())
    assert plain == numerics_of(make_config())
    other = tmp_path / "config"
    vllm.config.ModelConfig(model=tiny_llama, skip_tokenizer_init=True).hf_config.save_pretrained(other)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    for field, config in {
        "hf_config.rope_parameters": make_config(hf_overrides={"rope_parameters": YARN}),
        "hf_config.initializer_range": make_config(hf_overrides={"initializer_range": 0.5}),
        "hf_config.pad_token_id": make_config(hf_overrides={"pad_token_id": 7}),
        "hf_overrides": make_config(hf_overrides={"a_key_without_value": None}),
        "hf_config.rms_norm_eps": make_config(hf_config_path=str(other)),
        "model_dtype": make_config(dtype="bfloat16"),
        "model_impl": make_config(model_impl="transformers"),
        "revision": make_config(revision="main"),
        "cache_dtype": make_config({"cache_dtype": "fp8_e4m3"}),
        "cache.kv_cache_dtype_skip_layers": make_config({"kv_cache_dtype_skip_layers": ["1"]}),
    }.items():
        assert field in {name for name, value in numerics_of(config).items() if plain[name] != value}, field


@pytest.mark.parametrize("num_factors", [2, 16, 48, 64, 2000])
def test_the_longest_request_counts_where_positions_depend_on_it(make_config: Any, num_factors: int) -> None:
    """However long the text of the factors is: tiny models have few, real ones as many as half a head is wide."""
    assert numerics_of(make_config(max_model_len=256)) == numerics_of(make_config(max_model_len=512))
    yarn = {"hf_overrides": {"rope_parameters": YARN}}
    assert numerics_of(make_config(max_model_len=256, **yarn)) == numerics_of(make_config(max_model_len=512, **yarn))
    half = [1.0] * num_factors
    longrope = {
        "rope_type": "longrope", "short_factor": half, "long_factor": half, "rope_theta": 10000.0,
        "original_max_position_embeddings": 256, "factor": 4.0,
    }  # fmt: skip
    options = {"hf_overrides": {"rope_parameters": longrope}}
    short, long = (numerics_of(make_config(max_model_len=n, **options)) for n in (256, 512))
    assert {name for name in short if short[name] != long[name]} == {"max_model_len"}


def test_llama_4_scales_queries_in_engines_for_long_requests() -> None:
    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {"text_config": {"model_type": "llama4_text"}, "model_type": "llama4"}

    def engine(max_model_len: int, **overrides: Any) -> Any:
        return SimpleNamespace(
            model_config=SimpleNamespace(
                hf_config=Config(), max_model_len=max_model_len, override_generation_config=overrides, model="m"
            )
        )

    assert numerics_of(engine(1 << 14)) != numerics_of(engine(1 << 16))
    assert numerics_of(engine(1 << 14)) != numerics_of(engine(1 << 14, attn_temperature_tuning=True))
    assert numerics_of(engine(1 << 14)) == numerics_of(engine(1 << 14, temperature=0.5))


def test_generation_config_of_llama_4_counts_where_it_lies(make_config: Any, tmp_path: Path) -> None:
    """vLLM's Llama 4 reads `attn_temperature_tuning` there, in a file that is no part of the weights' fingerprint."""
    plain = numerics_of(make_config())
    (tmp_path / "generation_config.json").write_text('{"attn_temperature_tuning": true, "temperature": 0.5}')
    other = numerics_of(make_config(generation_config=str(tmp_path)))
    assert {name for name in plain if plain[name] != other[name]} == {"attn_temperature_tuning"}


def test_nothing_else_of_a_generation_config_reaches_a_model() -> None:
    """Of vLLM's models, three more read suppressed tokens there, and one how it samples by diffusion."""
    readers = {file.name for file in MODELS.glob("**/*.py") if "try_get_generation_config" in file.read_text()}
    assert readers == {"llama4.py", "gemma4_mm.py", "gemma4_unified.py", "gemma4_mtp.py", "diffusion_gemma.py"}


def test_every_place_from_which_a_model_takes_more_weights_is_known() -> None:
    """`named_paths` counts the folder's subfolders, and what the configuration names. Drafts change no answers."""
    readers = {
        file.name
        for file in MODELS.glob("**/*.py")
        if re.search(r"get_hf_file_bytes\(|DefaultModelLoader\.Source\(|load_file\(|torch\.load\(", file.read_text())
    }
    of_the_folder, of_subfolders = {"roberta.py", "clef_omni.py"}, {"kimi_audio.py", "jina.py", "mimo_audio.py"}
    named, after_the_kv = {"ultravox.py"}, {"adapters.py", "qwen3_dflash.py"}
    assert readers == of_the_folder | of_subfolders | named | after_the_kv


def test_no_hits_where_the_transformers_backend_picks_rope_by_batch(tiny_longrope: str) -> None:
    for model_impl, is_given in (("vllm", True), ("transformers", False)):
        model = vllm.config.ModelConfig(
            model=tiny_longrope, model_impl=model_impl, skip_tokenizer_init=True, dtype="float32", max_model_len=512
        )
        reason = _no_hits_reason(SimpleNamespace(model_config=model))
        assert (reason is None) is is_given
        assert is_given or "rope_type 'longrope'" in str(reason)


def test_no_hits_where_vllm_tells_routed_experts() -> None:
    for is_enabled in (False, True):
        outputs = vllm.config.AuxOutputConfig(enable_return_routed_experts=is_enabled)
        reason = _no_hits_reason(SimpleNamespace(aux_output_config=outputs, model_config=SimpleNamespace()))
        assert (reason is not None) is is_enabled


@pytest.mark.parametrize("has_mistrals", [False, True])
def test_formats_are_told_apart_where_they_read_other_files(has_mistrals: bool, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    if has_mistrals:
        (tmp_path / "consolidated.00.safetensors").write_bytes(b"")

    def named(load_format: str) -> str:
        load_config = vllm.config.LoadConfig(load_format=load_format)
        model_config = SimpleNamespace(hf_config=None, model=str(tmp_path), max_model_len=8)
        return numerics_of(SimpleNamespace(model_config=model_config, load_config=load_config))["load_format"]

    assert named("hf") == named("safetensors") == named("fastsafetensors")
    assert (named("auto") == named("hf")) is not has_mistrals
    assert (named("auto") == named("mistral")) is has_mistrals
    assert len({named(name) for name in ("hf", "pt", "npcache", "mistral", "sharded_state")}) == 5


def test_only_formats_that_read_the_folders_files_are_named_by_them() -> None:
    """npcache keeps copies, ipc_cache asks another process, of whose weights it compares names and shapes."""
    elsewhere = set(get_args(LoadFormats)) - FOLDER_FORMATS
    assert elsewhere == {"dummy", "ipc_cache", "modelexpress", "npcache", "tensorizer"}
    assert set(get_args(LoadFormats)) >= FOLDER_FORMATS - {"bitsandbytes"}


def test_how_weights_are_loaded_and_kernels_chosen_counts(make_config: Any) -> None:
    plain = make_config()
    for where, value in {
        "load_config": vllm.config.LoadConfig(model_loader_extra_config={"pattern": "other-{rank}.safetensors"}),
        "kernel_config": vllm.config.KernelConfig(moe_backend="triton"),
    }.items():
        other = make_config()
        setattr(other, where, value)
        if where == "load_config":
            plain.load_config = vllm.config.LoadConfig()
        else:
            plain.kernel_config = vllm.config.KernelConfig()
        assert numerics_of(plain) != numerics_of(other)
        delattr(plain, where)


def test_settings_of_adapters(make_config: Any) -> None:
    config = make_config()
    assert adapter_settings(config) == ""
    config.lora_config = vllm.config.LoRAConfig(lora_dtype="auto", max_loras=2)
    assert adapter_settings(config) == ""
    config.lora_config = vllm.config.LoRAConfig(target_modules=["q_proj"])
    assert adapter_settings(config) == 'target_modules=["q_proj"]'


LONGROPE_TOKENS = 256
DECODE = {"do_remote_decode": True}


def engine_args(model: str, connector: str, extra: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model": model, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "block_size": 32,
        "num_gpu_blocks_override": 64, "max_model_len": 512, "disable_log_stats": False,
        "kv_transfer_config": {
            "kv_connector": connector, "kv_connector_module_path": "kvferry.vllm", "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute", "kv_connector_extra_config": extra,
        },
        **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tiny_longrope(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Phi-3 whose rope has one set of factors up to 256 tokens, and another for engines that go further."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-phi3")
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 16, "long_factor": [8.0] * 16}
    config = Phi3Config(
        num_hidden_layers=2, initializer_range=0.2, original_max_position_embeddings=LONGROPE_TOKENS,
        rope_parameters={**rope, "original_max_position_embeddings": LONGROPE_TOKENS}, **TINY,
    )  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.timeout(900)
def test_a_store_is_read_only_with_the_length_it_was_filled_with(
    start_engines: StartEngines, tiny_longrope: str, tmp_path: Path
) -> None:
    extra = {"cpu_bytes_to_use": 1 << 24, "secondary_tiers": [{"type": "fs", "path": str(tmp_path / "kv")}]}
    prompt = random_prompt(7, 200)

    def ask(max_model_len: int) -> tuple[int, list[int]]:
        (engine,) = start_engines(engine_args(tiny_longrope, "OffloadingConnector", extra, max_model_len=max_model_len))
        got = engine.ask(generate=prompt, max_tokens=8)
        engine.stop()
        return got["external_hits"], got["token_ids"]

    assert ask(LONGROPE_TOKENS)[0] == 0
    assert ask(2 * LONGROPE_TOKENS)[0] == 0, "it computes with other factors"
    assert ask(LONGROPE_TOKENS)[0] > 0


@pytest.mark.timeout(900)
def test_engines_of_which_one_has_overrides_exchange_nothing(start_engines: StartEngines, tiny_llama: str) -> None:
    args = engine_args(tiny_llama, "P2PConnector", {"transport": "shm", **PATIENT})
    prefill, decode = start_engines(args, {**args, "hf_overrides": {"rope_parameters": YARN}})
    prompt = random_prompt(7, 200)
    params = prefill.ask(generate=prompt, max_tokens=1, transfer=DECODE)["kv_transfer_params"]
    got = decode.ask(generate=prompt, max_tokens=8, transfer=params)
    assert got["num_cached_tokens"] == 0
    reason = got["kv_transfer_params"]["load_error"]
    assert "hf_config.rope_parameters: " in reason
    assert '"rope_type":"yarn"' in reason
    assert '"rope_type":"default"' in reason
