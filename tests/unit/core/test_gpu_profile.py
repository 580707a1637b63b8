"""Public GPU profiles become cost models; the values here are a few of the published ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from core.cost_model import StepShape
from core.errors import ConfigError
from core.gpu_profile import read_gpu_profile

SPLITWISE = (
    "model,hardware,prompt_size,batch_size,token_size,peak_power,average_power,prompt_time,token_time,e2e_time,"
    "tensor_parallel\n"
)


def splitwise(prompt_ms: float = 0.05, token_ms: float = 0.2) -> str:
    """Three lines of points, as the source has them, of a machine that is linear: 20 ms + these per token and stream."""
    rows = []
    for hardware, slower in (("h100", 1.0), ("a100", 2.0)):
        points = [(n, 1, 128) for n in (128, 512, 1024, 4096)] + [(512, b, 128) for b in (1, 2, 8, 32)] + [(512, 1, 4096)]
        for prompt, batch, output in points:
            first, each = slower * (20 + prompt_ms * prompt * batch), slower * (20 + token_ms * batch)
            stopped = each * (1 if output < 1024 else 9)  # of runs that stopped early nothing is to be believed
            rows += [f"llama2-70b,{hardware},{prompt},{batch},{output},0,0,{first},{stopped},0,8\n"] * 2
    return SPLITWISE + "".join(rows)


def saved(tmp_path: Path, text: str, name: str = "profile") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_splitwise_runs_become_steps_in_seconds(tmp_path: Path) -> None:
    model = read_gpu_profile(saved(tmp_path, splitwise()), {"hardware": "h100"})
    assert model.steps.step_s(StepShape(1024, 1024 * 1025 // 2)) == pytest.approx(0.0712, rel=0.02)
    assert model.steps.step_s(StepShape(decode_rows=16, decode_context=16 * 576)) == pytest.approx(0.0232, rel=0.02)
    assert (model.kv_token_bytes, model.samples, model.fingerprint) == (327_680, 14, "")
    assert model.p90_error < 0.01
    assert "hardware h100" in model.machine


def test_a_compressed_file_reads_the_same(tmp_path: Path) -> None:
    plain = read_gpu_profile(saved(tmp_path, splitwise(), "p.csv"), {"hardware": "a100"})
    (tmp_path / "p.csv.gz").write_bytes(gzip.compress(splitwise().encode()))
    assert read_gpu_profile(str(tmp_path / "p.csv.gz"), {"hardware": "a100"}).steps == plain.steps


DISTSERVE = {
    "facebook/opt-13b": {
        "1": {
            "decoding_large_small_bs_threshold": 95,
            "prefill": [22.05, 0.1405, 8.0766e-06],
            "decoding_smallbs": [23.475, 0.00059293, 0.0607],
            "decoding_largebs": [20.206, 0.00049077, 0.12],
        }
    }
}


def test_distserve_coefficients_give_its_times_back(tmp_path: Path) -> None:
    model = read_gpu_profile(saved(tmp_path, json.dumps(DISTSERVE)), {})
    prompt_s = (22.05 + 0.1405 * 1024 + 8.0766e-06 * 1024**2) / 1e3
    assert model.steps.prefill_s(1024) == pytest.approx(prompt_s, rel=0.05)
    assert model.steps.decode_s(32, 32 * 256) == pytest.approx((23.475 + 0.00059293 * 8192 + 0.0607 * 32) / 1e3, rel=0.1)
    assert model.kv_token_bytes == 40 * 2 * 5120 * 2


PREFILL = "system,model,framework,tp,isl,ttft_ms,prefill_tok_s_per_gpu\n" + "".join(
    f"h100_sxm,m,vllm,{tp},{isl},{(16 + 0.037 * isl) * 8 / tp},0\n" for tp in (4, 8) for isl in (100, 2135, 4170, 8240, 12000)
)
DECODE = (
    "system,model,framework,tp,max_kv_tokens,kv_usage,context_length,implied_batch,itl_ms,decode_tok_s_per_gpu\n"
    + "".join(
        f"h100_sxm,m,vllm,{tp},224133,0.1,{context},{batch}.0,{(9 + 0.05 * batch + 5e-5 * batch * context) * 8 / tp},0\n"
        for tp in (4, 8)
        for batch in (1, 47, 93)
        for context in (350.0, 2000.0)
    )
)


@pytest.mark.parametrize("named", ["prefill_presweep.csv", "decode_presweep.csv"])
def test_dynamos_two_sweeps_are_one_profile_whichever_is_named(tmp_path: Path, named: str) -> None:
    saved(tmp_path, PREFILL, "prefill_presweep.csv")
    saved(tmp_path, DECODE, "decode_presweep.csv")
    model = read_gpu_profile(str(tmp_path / named), {"tp": "8"})
    assert model.steps.decode_s(47, 47 * 350) == pytest.approx(0.0122, rel=0.2)
    assert model.steps.prefill_s(8240) == pytest.approx(0.321, rel=0.1)
    assert model.kv_token_bytes == 0, "nobody said of this model"


def test_dynamos_other_sweep_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prefill_presweep\.csv"):
        read_gpu_profile(saved(tmp_path, DECODE, "decode_presweep.csv"), {"tp": "8"})


def test_helix_counts_all_layers(tmp_path: Path) -> None:
    rows = [f"llama2_70b,a100,prompt,{n},{n * 0.008}\n" for n in (0, 250, 500, 1000)]
    rows += [f"llama2_70b,a100,decode,{n},{1.0 + n * 0.01}\n" for n in (1, 10, 100, 200)]
    model = read_gpu_profile(saved(tmp_path, "model,gpu,phase,batch_tokens,ms_per_layer\n" + "".join(rows)), {"gpu": "a100"})
    assert model.steps.decode_s(100, 0) == pytest.approx(80 * 2.0e-3, rel=0.2)
    assert model.steps.prefill_pair_s == model.steps.decode_context_s == 0


@pytest.mark.parametrize(
    ("text", "wanted", "why"),
    [
        (splitwise(), {}, r"2 configurations.*hardware=a100.*hardware=h100"),
        (splitwise(), {"hardware": "tpu"}, r"0 configurations.*hardware=a100"),
        (splitwise(), {"gpu": "h100"}, "configurations.*hardware=a100"),
        ("", {}, "no GPU profile known here"),
        ("a,b\n1,2\n", {}, "its columns are a, b"),
        ("gemm_dtype,m,n,k,latency_ms\nbf16,1,1,1,1\n", {}, "single kernels"),
        (splitwise().replace(",20.2,", ",soon,"), {"hardware": "h100"}, "cannot be used.*ValueError"),
        (SPLITWISE + "llama2-70b,h100,128,1,128,0,0,26,20,0,8\n", {}, "at least 5"),
        ('{"a": 1}', {}, "not of DistServe's shape"),
        ("{", {}, "cannot be used"),
        (json.dumps({"m": {"1": {"prefill": [1, 2]}}}), {}, "cannot be used"),
    ],
)
def test_what_cannot_be_used_says_why(tmp_path: Path, text: str, wanted: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        read_gpu_profile(saved(tmp_path, text), wanted)


def test_a_missing_or_cut_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the GPU profile"):
        read_gpu_profile("/nowhere.csv", {})
    (tmp_path / "cut.gz").write_bytes(gzip.compress(splitwise().encode())[:-30])
    with pytest.raises(ConfigError, match="cannot read the GPU profile"):
        read_gpu_profile(str(tmp_path / "cut.gz"), {})
