"""Rooflines: sizes of known models, what does not fit, and the shape of the times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.cost_model import StepShape, pairs
from core.errors import ConfigError
from core.gpus import GPUS, gpu_named
from core.model_shape import ModelShape, shape_of
from core.roofline import ENGINES, Roofline
from core.roofline_file import read_roofline

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
FP8 = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
QWEN3_8B = {
    **LLAMA_70B,
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
}
LLAMA2_7B = {
    **LLAMA_70B,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
OPT_13B = {
    "model_type": "opt",
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "ffn_dim": 20480,
    "vocab_size": 50272,
    "torch_dtype": "float16",
}
OPT_66B = OPT_13B | {"hidden_size": 9216, "num_hidden_layers": 64, "num_attention_heads": 72, "ffn_dim": 36864}
BLOOM = {"model_type": "bloom", "hidden_size": 14336, "n_layer": 70, "num_attention_heads": 112, "vocab_size": 250880}
MIXTRAL = {
    **LLAMA_70B,
    "model_type": "mixtral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8"},
}


@pytest.mark.parametrize(
    ("config", "billions", "kv_token_bytes"),
    [
        (LLAMA_70B, 70.6, 327_680),
        (QWEN3_8B, 8.2, 147_456),
        (LLAMA2_7B, 6.74, 524_288),
        (OPT_13B, 12.8, 819_200),
        (OPT_66B, 65.7, 2_359_296),
        (BLOOM, 176.2, 4_014_080),
        (MIXTRAL, 46.7, 131_072),
        (DEEPSEEK_V3, 671.0, 70_272),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else None,
)
def test_sizes_of_published_models(config: dict[str, Any], billions: float, kv_token_bytes: int) -> None:
    shape = shape_of(config, "config.json")
    assert shape.params / 1e9 == pytest.approx(billions, rel=0.005)
    assert shape.kv_token_bytes == kv_token_bytes


@pytest.mark.parametrize(
    ("quantisation", "stored"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"num_bits": 8, "type": "float"}}}}, "fp8"),
        (None, "bfloat16"),
    ],
)
def test_quantised_weights_are_smaller_and_kv_is_not(quantisation: dict[str, Any] | None, stored: str) -> None:
    shape, plain = shape_of(LLAMA_70B | {"quantization_config": quantisation}, "c"), shape_of(LLAMA_70B, "c")
    assert shape.weight_dtype == stored
    assert shape.kv_token_bytes == plain.kv_token_bytes
    assert (shape.weights_bytes < plain.weights_bytes) == (stored != "bfloat16")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, got 0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers must be a whole number"),
        ({"torch_dtype": "int3"}, "torch_dtype 'int3'"),
    ],
)
def test_a_config_that_says_too_little_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shape_of(LLAMA_70B | change, "x/config.json")


def test_memory_left_for_kv_agrees_with_an_engine() -> None:
    """DistServe's table of KV capacity on 80 GB A100 (max_num_tokens.csv): 66,144, 163,008 and 78,496 tokens."""
    for config, tp, tokens in ((OPT_13B, 1, 66_144), (OPT_13B, 2, 163_008), (OPT_66B, 4, 78_496)):
        assert Roofline(shape_of(config, "c"), gpu_named("A100"), tp).kv_capacity_tokens == pytest.approx(tokens, rel=0.08)


def test_what_does_not_fit_says_by_how_much() -> None:
    llama = shape_of(LLAMA_70B, "c")
    with pytest.raises(ConfigError, match=r"does not fit on 1 x h100-80g .* 141\.1 GB of weights .* 65\.\d GB more than 90%"):
        Roofline(llama, gpu_named("h100")).cost_model()
    with pytest.raises(ConfigError, match=r"hold KV of \d+ tokens of llama, not of 10000000: \d+\.\d GB per GPU are missing"):
        Roofline(llama, gpu_named("h100"), 4).check_fits(10_000_000)


@pytest.mark.parametrize(("tp", "pp", "said"), [(3, 1, "tp 3 does not divide the 64"), (0, 1, "tp 0"), (1, 81, "pp 81")])
def test_impossible_splits_are_refused(tp: int, pp: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Roofline(shape_of(LLAMA_70B, "c"), gpu_named("h100"), tp, pp)


@pytest.mark.parametrize(("written", "name"), [("H100_SXM", "h100-80g"), ("a100-80gb", "a100-80g"), (" NVIDIA_L4 ", "l4-24g")])
def test_gpus_are_found_by_the_names_people_write(written: str, name: str) -> None:
    assert gpu_named(written).name == name


def test_an_unknown_gpu_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no GPU named 'tpu-v5' is known; choose one of a100-40g, "):
        gpu_named("tpu-v5")


def test_anchors_of_measured_engines() -> None:
    """Dynamo, vLLM 0.10, Llama-3.3-70B-FP8 on eight H100: 321 ms for 8,240 tokens, 9.5 ms a token; Splitwise, BLOOM."""
    fp8 = Roofline(shape_of(LLAMA_70B | FP8, "c"), gpu_named("h100"), 8)
    assert fp8.prefill_s(8240) == pytest.approx(0.321, rel=0.15)
    assert fp8.decode_s(1, 350) == pytest.approx(0.0095, rel=0.35)
    bloom = Roofline(shape_of(BLOOM, "c"), gpu_named("h100"), 8, efficiency=ENGINES["eager"])
    assert bloom.prefill_s(2048) == pytest.approx(0.253, rel=0.25)
    assert bloom.decode_s(1, 576) == pytest.approx(0.0361, rel=0.25)


def test_a_prompt_in_chunks_reads_its_prefix_again() -> None:
    replica = Roofline(shape_of(LLAMA_70B, "c"), gpu_named("h100"), 4)
    assert replica.prefill_s(8192, chunk_tokens=512) > replica.prefill_s(8192)
    assert replica.prefill_s(1024, context=65_536) > replica.prefill_s(1024)
    assert replica.prefill_s(0) == replica.step_s(StepShape()) == 0.0


def test_a_pipeline_costs_latency_and_gives_throughput() -> None:
    llama, h100, prompt = shape_of(LLAMA_70B, "c"), gpu_named("h100"), StepShape(2048, pairs(2048, 0))
    flat, deep = Roofline(llama, h100, 4, 1), Roofline(llama, h100, 4, 2)
    assert deep.step_s(prompt) > flat.step_s(prompt)
    assert deep.stage_s(prompt) < 0.6 * flat.stage_s(prompt)
    assert deep.kv_capacity_tokens > 2 * flat.kv_capacity_tokens


def test_more_ranks_than_kv_heads_keep_copies() -> None:
    narrow = shape_of(LLAMA_70B | {"num_key_value_heads": 2}, "c")
    assert (
        Roofline(narrow, gpu_named("h100"), 8).kv_gpu_token_bytes == Roofline(narrow, gpu_named("h100"), 2).kv_gpu_token_bytes
    )


def test_across_nodes_tensor_parallelism_uses_the_network() -> None:
    h100 = gpu_named("h100")
    inside, across = Roofline(shape_of(LLAMA_70B, "c"), h100, 8), Roofline(shape_of(LLAMA_70B, "c"), h100, 16)
    assert across.allreduce_s(1e9) > 5 * inside.allreduce_s(1e9)
    assert Roofline(shape_of(LLAMA_70B, "c"), h100).allreduce_s(1e9) == 0.0


def test_few_rows_of_a_mixture_read_few_experts() -> None:
    mixtral = Roofline(shape_of(MIXTRAL, "c"), gpu_named("h100"), 2)
    dense = Roofline(replace(shape_of(MIXTRAL, "c"), experts=None, ffn=8 * 14336), gpu_named("h100"), 2)
    assert mixtral.decode_s(1, 1) < 0.6 * dense.decode_s(1, 1)
    assert mixtral.prefill_s(4096) < 0.5 * dense.prefill_s(4096)


def test_the_linear_model_stays_near_the_roofline() -> None:
    for config, name, tp in ((LLAMA_70B, "h100", 4), (LLAMA_70B | FP8, "h200", 2), (LLAMA2_7B, "l4", 1), (OPT_13B, "a100", 1)):
        replica = Roofline(shape_of(config, "c"), gpu_named(name), tp)
        model = replica.cost_model()
        assert model.median_error < 0.15
        assert model.p90_error < 0.35
        assert model.kv_token_bytes == replica.shape.kv_token_bytes
        assert model.links["shm"].bytes_per_s > model.links["tcp"].bytes_per_s


SHAPES: list[ModelShape] = [shape_of(config, "c") for config in (LLAMA_70B, QWEN3_8B, OPT_13B, MIXTRAL, DEEPSEEK_V3)]


@given(
    shape=st.sampled_from(SHAPES),
    gpu=st.sampled_from(sorted(GPUS)),
    tp=st.sampled_from([1, 2, 4, 8]),
    prefill=st.integers(0, 20_000),
    rows=st.integers(0, 300),
    length=st.integers(1, 50_000),
    more=st.integers(1, 1000),
)
def test_more_work_never_takes_less_time(
    shape: ModelShape, gpu: str, tp: int, prefill: int, rows: int, length: int, more: int
) -> None:
    replica = Roofline(shape, gpu_named(gpu), tp)
    step = StepShape(prefill, pairs(prefill, 0), rows, rows * length)
    took_s = replica.step_s(step)
    assert took_s >= 0
    assert replica.step_s(step + StepShape(prefill_tokens=more, prefill_pairs=pairs(more, 0))) >= took_s
    assert replica.step_s(step + StepShape(decode_rows=1, decode_context=more)) >= took_s


def test_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    assert read_roofline(str(tmp_path), "h100").shape.kv_token_bytes == 147_456
    with pytest.raises(ConfigError, match=r"cannot read the model's shape from .*absent"):
        read_roofline(str(tmp_path / "absent"), "h100")
    with pytest.raises(ConfigError, match="no engine named 'fast' is known; choose one of graphs, eager"):
        read_roofline(str(tmp_path), "h100", engine="fast")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="not a mapping"):
        read_roofline(str(tmp_path), "h100")
