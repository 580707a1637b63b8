"""How far the rooflines of `core/roofline.py` are from engines that somebody measured.

Claims (issue "The simulator and the planner": an executor from a roofline of any Hugging Face config × GPU): the median
relative error of predicted step times, per model, GPU and phase. They are stated, not judged one by one; judged is the median
over all that no factor was fitted to, at most a third. Fitted to (rows say so): Dynamo's 70B on eight H100 and 8B on H200 for
engines with CUDA graphs, Splitwise's Llama-2-70B on H100 for engines of 2023, Helix's prompts on L4 and T4. Held against: the
other GPUs of Dynamo, DistServe's fits of OPT on A100, Splitwise's A100 and BLOOM, the rest of Helix; KV capacity against
DistServe's table.

    python -m benchmarks.simulator_roofline [--quick] [--data DIR] [--json FILE]
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.rows import Row, arguments, report
from core.cost_model import StepShape, pairs
from core.gpus import gpu_named
from core.latency import percentile
from core.model_shape import ModelShape, shape_of
from core.roofline import ENGINES, Roofline

COPIED = Path(__file__).resolve().parent.parent / "tests/data"
_LLAMA = {"model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": False}
_LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
_LLAMA_70B = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
_LLAMA_30B = {"hidden_size": 6656, "num_hidden_layers": 60, "num_attention_heads": 52}
_OPT_13B = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "ffn_dim": 20480}
_OPT_66B = {"hidden_size": 9216, "num_hidden_layers": 64, "num_attention_heads": 72, "ffn_dim": 36864}
_FP8 = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "nvidia/Llama-3.3-70B-Instruct-FP8": _LLAMA | _LLAMA_70B | {"intermediate_size": 28672, "vocab_size": 128256} | _FP8,
    "nvidia/Llama-3.1-8B-Instruct-FP8": _LLAMA | _LLAMA_8B | {"intermediate_size": 14336, "vocab_size": 128256} | _FP8,
    "llama2-70b": _LLAMA | _LLAMA_70B | {"intermediate_size": 28672, "vocab_size": 32000},
    "llama1_30b": _LLAMA | _LLAMA_30B | {"intermediate_size": 17920, "vocab_size": 32000},
    "bloom-176b": {
        "model_type": "bloom", "hidden_size": 14336, "n_layer": 70, "num_attention_heads": 112, "vocab_size": 250880
    },
    "facebook/opt-13b": {"model_type": "opt", "vocab_size": 50272} | _OPT_13B,
    "facebook/opt-66b": {"model_type": "opt", "vocab_size": 50272} | _OPT_66B,
}  # fmt: skip


class Measured(NamedTuple):
    """`source`: who measured. `fitted`: whether an engine's factors were."""

    source: str
    model: str
    gpu: str
    tp: int
    phase: str
    engine: str
    fitted: bool
    step: StepShape
    seconds: float

    @property
    def group(self) -> str:
        return (
            f"{self.source} {self.model.removeprefix('nvidia/').removeprefix('facebook/')} {self.gpu} tp{self.tp} {self.phase}"
        )


def shape(model: str) -> ModelShape:
    return shape_of({"_name_or_path": model, **CONFIGS[model]}, model)


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def dynamo(folder: Path) -> Iterable[Measured]:
    for row in [*table(folder / "prefill_presweep.csv"), *table(folder / "decode_presweep.csv")]:
        tp = int(row["tp"])
        what = ("Dynamo", row["model"], row["system"], tp)
        fitted = tp == 8 or row["system"].startswith("h200")
        if "isl" in row:
            tokens = int(row["isl"])
            step, seconds = StepShape(tokens, pairs(tokens, 0)), float(row["ttft_ms"]) / 1e3
        else:
            batch = round(float(row["implied_batch"]))
            step = StepShape(decode_rows=batch, decode_context=round(batch * float(row["context_length"])))
            seconds = float(row["itl_ms"]) / 1e3
        yield Measured(*what, "prefill" if "isl" in row else "decode", "graphs", fitted, step, seconds)


def splitwise(path: Path) -> Iterable[Measured]:
    """Medians over the five runs of each point; runs meant to give 1,024 tokens or more stopped early."""
    runs: dict[tuple[str, str, int, str, StepShape], list[float]] = {}
    for row in table(path):
        if row["hardware"].endswith("pcap"):
            continue  # not measured: exact multiples of the H100's
        prompt, batch, output = (int(row[name]) for name in ("prompt_size", "batch_size", "token_size"))
        what = (row["model"], row["hardware"], int(row["tensor_parallel"]))
        whole = StepShape(batch * prompt, batch * pairs(prompt, 0))
        runs.setdefault((*what, "prefill", whole), []).append(float(row["prompt_time"]) / 1e3)
        if output < 1024:
            step = StepShape(decode_rows=batch, decode_context=batch * (prompt + output // 2))
            runs.setdefault((*what, "decode", step), []).append(float(row["token_time"]) / 1e3)
    for (model, gpu, tp, phase, step), times in runs.items():
        fitted = model == "llama2-70b" and gpu == "h100-80gb"
        yield Measured("Splitwise", model, gpu, tp, phase, "eager", fitted, step, median(times))


def distserve(path: Path) -> Iterable[Measured]:
    """Its fitted lines, where they were fitted; what was measured is not published."""
    for model, by_tp in json.loads(path.read_text()).items():
        for tp, found in by_tp.items():
            what = ("DistServe", model, "a100-80gb", int(tp))
            a, b, c = found["prefill"]
            for n in (128, 256, 512, 1024, 2048):
                yield Measured(*what, "prefill", "graphs", False, StepShape(n, pairs(n, 0)), (a + b * n + c * n * n) / 1e3)
            for batch in (1, 4, 16, 64, 128):
                small = batch < found["decoding_large_small_bs_threshold"]
                a, b, c = found["decoding_smallbs" if small else "decoding_largebs"]
                for length in (256, 1024):
                    step = StepShape(0, 0, batch, batch * length)
                    yield Measured(*what, "decode", "graphs", False, step, (a + b * batch * length + c * batch) / 1e3)


def helix(path: Path) -> Iterable[Measured]:
    """Milliseconds of one layer; nothing is said of lengths, 512 tokens a sequence are assumed."""
    for row in table(path):
        count, ms = round(float(row["batch_tokens"])), float(row["ms_per_layer"])
        name, _, tp = row["gpu"].partition("x")
        model = {"llama2_70b": "llama2-70b"}.get(row["model"], row["model"])
        if count and ms:
            prompt = row["phase"] == "prompt"
            step = StepShape(count) if prompt else StepShape(decode_rows=count, decode_context=512 * count)
            seconds = ms * shape(model).layers / 1e3
            known = prompt and name in ("l4", "t4")  # what these boards sustain was taken from here
            phase = "prefill" if prompt else "decode"
            yield Measured("Helix", model, name, int(tp or 1), phase, "eager", known, step, seconds)


def errors(measured: Iterable[Measured]) -> dict[str, tuple[Measured, list[float]]]:
    """(predicted − measured) / measured by group, with one of the group."""
    found: dict[str, tuple[Measured, list[float]]] = {}
    known: dict[str, Roofline] = {}
    for one in measured:
        if one.group not in known:
            known[one.group] = Roofline(shape(one.model), gpu_named(one.gpu), one.tp, 1, ENGINES[one.engine])
        error = (known[one.group].step_s(one.step) - one.seconds) / one.seconds
        found.setdefault(one.group, (one, []))[1].append(error)
    return found


def capacity(path: Path) -> Row:
    off = []
    for row in table(path):
        roofline = Roofline(shape(row["model"]), gpu_named("a100-80gb"), int(row["tp"]), int(row["pp"])) if _fits(row) else None
        if roofline is not None:
            off.append(abs(roofline.kv_capacity_tokens / int(row["max_num_tokens"]) - 1))
    how = f"{len(off)} ways to cut OPT-13B and OPT-66B over A100, p90 {percentile(sorted(off), 90):.1%}"
    said = "KV capacity against DistServe's table, median error"
    return Row("roofline.kv_capacity", said, median(off), "", 0.1, "<=", how=how)


def _fits(row: Mapping[str, str]) -> bool:
    return row["model"] in CONFIGS and shape(row["model"]).heads % int(row["tp"]) == 0


def rows(data: Path | None) -> list[Row]:
    """Without a data folder, of what is copied into the repository: Dynamo's sweeps and Splitwise's BLOOM."""
    if data:
        profiles = data / "profiles"
        measured = [
            *dynamo(profiles / "dynamo"),
            *splitwise(profiles / "splitwise/perf_model.csv"),
            *distserve(profiles / "distserve/profiler-a100-80g.distserve.json"),
            *helix(profiles / "helix/per_layer_latency.csv"),
        ]
    else:
        measured = [*dynamo(COPIED / "dynamo"), *splitwise(COPIED / "splitwise/perf_model_bloom.csv")]
    made = []
    unseen: list[float] = []
    for group, (one, found) in errors(measured).items():
        absolute = [abs(error) for error in found]
        if not one.fitted:
            unseen.append(median(absolute))
        how = f"{len(found)} points, p90 {percentile(sorted(absolute), 90):.1%}, bias {median(found):+.1%}, engine {one.engine}"
        how += ", fitted to these" if one.fitted else ", not fitted to these"
        made.append(Row(f"roofline.{group.replace(' ', '.')}", f"{group}: median error", median(absolute), "", how=how))
    said = f"step times nobody was fitted to: median over {len(unseen)} models, GPUs and phases of the median error"
    made.append(Row("roofline.unseen", said, median(unseen), "", 1 / 3, "<="))
    return [*made, capacity(data / "profiles/distserve/max_num_tokens.csv")] if data else made


def main() -> int:
    args = arguments(__doc__).parse_args()
    report(rows(args.data), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
