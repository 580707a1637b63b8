"""What a worker of a pool is, by its profile."""

from __future__ import annotations

import json
from typing import Any

import pytest

from core.config import Config
from core.errors import ConfigError
from sim.cluster import Pools
from sim.replica import replica_of
from sim.sweep import MODEL

COLUMNS = "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel\n"


@pytest.fixture
def profile(tmp_path):
    """Of one model on two GPUs, each twice and eight times: prompts and tokens take a time of their own on each."""
    rows = [
        f"llama2-70b,{gpu},{prompt},{batch},{token},{prompt * batch * speed / tp},{(10 + batch) * speed},{tp}\n"
        for gpu, speed in (("a100-80gb", 2.0), ("h100-80gb", 1.0))
        for tp in (2, 8)
        for prompt in (128, 512, 1024, 2048)
        for batch in (1, 4, 16)
        for token in (128, 512)
    ]
    path = tmp_path / "perf_model.csv"
    path.write_text(COLUMNS + "".join(rows))
    return str(path)


def made(profile: Any, engine: dict[str, Any] | None = None, **pool: Any):
    tree = {"engine": engine or {}, "sim": {"profile": profile, "pools": [{"role": "colocated"} | pool]}}
    config = Config.model_validate(tree)
    return replica_of(config, config.sim.pools[0])


def test_gpu_and_parallelism_of_a_pool_choose_the_configuration(profile):
    slow, fast = made(profile, gpu="a100-80gb", tp=2), made(profile, gpu="h100-80gb", tp=8)
    assert slow.cost.prefill_s(1024) > 4 * fast.cost.prefill_s(1024)
    assert (slow.gpus, fast.gpus) == (2, 8)


def test_a_selection_may_name_them_too_and_counts_its_gpus(profile):
    select = {"model": "llama2-70b", "hardware": "h100-80gb", "tensor_parallel": "8"}
    assert made({"file": profile, "select": select}).gpus == 8


def test_memory_is_what_weights_leave_of_the_gpus_unless_it_is_said(profile):
    room_bytes = 0.9 * 8 * 80 * 2**30 - 70e9 * 2
    token_bytes = 80 * 2 * 8 * 128 * 2
    assert made(profile, gpu="h100-80gb", tp=8).num_blocks == pytest.approx(room_bytes / token_bytes / 16, rel=0.001)
    assert made(profile, gpu="h100-80gb", tp=8, kv_bytes=2**30).num_blocks == 2**30 // token_bytes // 16
    assert made(profile, {"kv_bytes": 2**31}, gpu="h100-80gb", tp=8).num_blocks == 2**31 // token_bytes // 16


def test_a_model_that_does_not_fit_is_refused_with_what_is_missing(tmp_path, profile):
    path = tmp_path / "large.csv"
    path.write_text((tmp_path / "perf_model.csv").read_text().replace("llama2-70b", "bloom-176b"))
    with pytest.raises(ConfigError, match=r"352 GB of weights are 197\.4 GB more than 90%"):
        made(str(path), gpu="h100-80gb", tp=2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gpu": "tpu"}, "choose one of"),
        ({}, "choose one of"),
    ],
)
def test_what_a_profile_does_not_have_is_said_with_what_it_has(profile, given, said):
    with pytest.raises(ConfigError, match=said):
        made(profile, **given)


def test_a_file_of_ours_fits_every_gpu(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(MODEL.to_json()))
    assert made(str(path), gpu="anything", tp=2).cost == MODEL.steps


def test_a_roofline_of_a_model_and_a_gpu(tmp_path):
    llama = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(llama))
    roofline = {"roofline": {"model": str(tmp_path / "config.json"), "gpu": "H100"}}
    one, two = made(roofline), made(roofline, tp=2, usd_per_gpu_hour=2.0)
    assert one.num_blocks * 16 > 100_000
    assert two.num_blocks > 2 * one.num_blocks
    assert (two.gpus, two.usd_per_hour) == (2, 4.0)


def test_slots_of_a_role_are_dealt_to_its_pools_in_order(profile):
    pools = [
        {"role": "prefill", "count": 1, "gpu": "a100-80gb", "tp": 2},
        {"role": "prefill", "count": 2, "gpu": "h100-80gb", "tp": 8},
        {"role": "decode", "count": 1, "gpu": "h100-80gb", "tp": 8},
    ]
    dealt = Pools(Config.model_validate({"sim": {"profile": profile, "pools": pools}}))
    role = next(iter(dealt.desired))
    assert [dealt.of(f"prefill-{n}", role)[1].gpus for n in range(4)] == [2, 8, 8, 8]
