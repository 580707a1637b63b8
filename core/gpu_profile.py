"""Cost models from public measurements of whole steps on GPUs, recognised by content.

| profile | file | `wanted` keys | by |
|---|---|---|---|
| Splitwise | `perf_model.csv` | model, hardware, tensor_parallel | Patel et al., ISCA 2024 (splitwise-sim, MIT) |
| DistServe | `profiler-*.json` | model, tp | Zhong et al., OSDI 2024 (Apache-2.0) |
| Dynamo | `prefill_presweep.csv` and `decode_presweep.csv` beside each other | system, model, tp | NVIDIA Dynamo (Apache-2.0) |
| Helix | `per_layer_latency.csv` | model, gpu | Mei et al., ASPLOS 2025 (Apache-2.0) |

Each is turned into steps and their seconds and fitted like our own; the error of the linear model is in the result.
Files of single kernels need the model's shape to become steps and are refused.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from core.cost_fit import fit_steps, heldout_errors
from core.cost_model import CostModel, StepShape, pairs
from core.errors import ConfigError
from core.profile_table import Curve, Lookup, ProfileTable

Sample = tuple[StepShape, float]
Row = Mapping[str, str]
_GZIP_MAGIC = b"\x1f\x8b"
_MS = 1e-3


class _Kv(NamedTuple):
    """Of a model named in these files: its layers, and bytes of KV per token in 16 bits."""

    layers: int
    token_bytes: int


_MODELS = {
    "llama2-70b": _Kv(80, 80 * 2 * 8 * 128 * 2),
    "llama2_70b": _Kv(80, 80 * 2 * 8 * 128 * 2),
    "llama1_30b": _Kv(60, 60 * 2 * 52 * 128 * 2),
    "bloom-176b": _Kv(70, 70 * 2 * 112 * 128 * 2),
    "facebook/opt-13b": _Kv(40, 40 * 2 * 40 * 128 * 2),
    "facebook/opt-66b": _Kv(64, 64 * 2 * 72 * 128 * 2),
    "nvidia/Llama-3.3-70B-Instruct-FP8": _Kv(80, 80 * 2 * 8 * 128 * 2),
    "nvidia/Llama-3.1-8B-Instruct-FP8": _Kv(32, 32 * 2 * 8 * 128 * 2),
}
_KERNEL_COLUMNS = ({"latency_ms", "num_heads"}, {"gemm_dtype"}, {"latency_us"}, {"num_gpus"}, {"num_tensor_parallel_workers"})


def read_gpu_profile(path: str, wanted: Mapping[str, str]) -> CostModel:
    """`wanted` picks one configuration of the file: what is left out must leave only one.

    Raises ConfigError for a file that cannot be read, is none of the above or is damaged, and naming the configurations there
    are when `wanted` fits none or several.
    """
    text = _read(path)
    try:
        if text.lstrip().startswith("{"):
            samples, chosen = _distserve(path, text, wanted)
        else:
            samples, chosen = _tabular(path, text, wanted)
        fit, (heldout_median, heldout_p90) = fit_steps(samples), heldout_errors(samples)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"{path} cannot be used as a GPU profile: {type(error).__name__} {error}") from None
    return CostModel(
        steps=fit.cost,
        kv_token_bytes=_MODELS[chosen["model"]].token_bytes if chosen["model"] in _MODELS else 0,
        machine=f"{Path(path).name}: " + ", ".join(f"{key} {value}" for key, value in chosen.items()),
        samples=fit.samples,
        median_error=fit.median_error,
        p90_error=fit.p90_error,
        heldout_median_error=heldout_median,
        heldout_p90_error=heldout_p90,
    )


def read_profile_table(path: str, wanted: Mapping[str, str], lookup: Lookup = Lookup.ROWS) -> ProfileTable:
    """Splitwise's `perf_model.csv` as its own simulator reads it: the points themselves, not a line fitted to them.

    Raises ConfigError as `read_gpu_profile` does, and for every other file.
    """
    rows = list(csv.DictReader(io.StringIO(_read(path))))
    if not rows or not {"prompt_size", "token_time"} <= set(rows[0]):
        raise ConfigError(f"{path} has no points to interpolate between; give Splitwise's perf_model.csv")
    chosen, kept = _choose(path, rows, ("model", "hardware", "tensor_parallel"), wanted)
    try:
        tokens = [int(row["prompt_size"]) * int(row["batch_size"]) for row in kept]
        prompt, token = (
            Curve.of((x, float(row[column]) * _MS) for x, row in zip(tokens, kept, strict=True))
            for column in ("prompt_time", "token_time")
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be used as a GPU profile: {type(error).__name__} {error}") from None
    kv = _MODELS.get(chosen["model"])
    return ProfileTable(prompt, token, kv.token_bytes if kv else 0, lookup)


def _read(path: str) -> str:
    try:
        data = Path(path).read_bytes()
        return (gzip.decompress(data) if data.startswith(_GZIP_MAGIC) else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the GPU profile {path}: {error}") from None


def _tabular(path: str, text: str, wanted: Mapping[str, str]) -> tuple[list[Sample], dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(text)))
    columns = set(rows[0]) if rows else set()
    if {"prompt_size", "token_time"} <= columns:
        chosen, kept = _choose(path, rows, ("model", "hardware", "tensor_parallel"), wanted)
        return _splitwise(kept), chosen
    if {"isl", "ttft_ms"} <= columns or {"implied_batch", "itl_ms"} <= columns:
        prefill, decode = (_beside(path, name) for name in ("prefill_presweep.csv", "decode_presweep.csv"))
        chosen, kept = _choose(path, [*prefill, *decode], ("system", "model", "tp"), wanted)
        return _dynamo(kept), chosen
    if {"phase", "ms_per_layer"} <= columns:
        chosen, kept = _choose(path, rows, ("model", "gpu"), wanted)
        return _helix(kept, _MODELS[chosen["model"]].layers), chosen
    if any(some <= columns for some in _KERNEL_COLUMNS):
        raise ConfigError(f"{path} holds times of single kernels, not of steps; give a profile of whole steps")
    raise ConfigError(f"{path} is no GPU profile known here; its columns are {', '.join(sorted(columns)) or 'none'}")


def _choose(path: str, rows: Sequence[Row], keys: Sequence[str], wanted: Mapping[str, str]) -> tuple[dict[str, str], list[Row]]:
    """The one configuration that agrees with `wanted`, and its rows."""
    unknown = set(wanted) - set(keys)
    found = sorted({tuple(row[key] for key in keys) for row in rows})
    fitting = [one for one in found if all(dict(zip(keys, one, strict=True)).get(k) == v for k, v in wanted.items())]
    if len(fitting) != 1 or unknown:
        shown = "; ".join(",".join(f"{key}={value}" for key, value in zip(keys, one, strict=True)) for one in fitting or found)
        raise ConfigError(f"{path} has {len(fitting)} configurations that fit the selection; choose one of: {shown}")
    chosen = dict(zip(keys, fitting[0], strict=True))
    return chosen, [row for row in rows if all(row[key] == value for key, value in chosen.items())]


def _splitwise(rows: Iterable[Row]) -> list[Sample]:
    """Medians of a point's repeats. Runs meant to give 1,024 tokens or more stopped early: their prompts alone count."""
    prompts: dict[StepShape, list[float]] = {}
    streams: dict[StepShape, list[float]] = {}
    for row in rows:
        prompt, batch, output = (int(row[key]) for key in ("prompt_size", "batch_size", "token_size"))
        whole = StepShape(prefill_tokens=batch * prompt, prefill_pairs=batch * pairs(prompt, 0))
        prompts.setdefault(whole, []).append(float(row["prompt_time"]) * _MS)
        if output < 1024:
            step = StepShape(decode_rows=batch, decode_context=batch * (prompt + output // 2))
            streams.setdefault(step, []).append(float(row["token_time"]) * _MS)
    return [(shape, median(times)) for kind in (prompts, streams) for shape, times in kind.items()]


def _dynamo(rows: Iterable[Row]) -> list[Sample]:
    """Each row is a point of its own; outliers stay in and show in the error."""
    samples = []
    for row in rows:
        if "ttft_ms" in row:
            length = int(row["isl"])
            samples.append((StepShape(length, pairs(length, 0)), float(row["ttft_ms"]) * _MS))
        else:
            batch = round(float(row["implied_batch"]))
            context = round(batch * float(row["context_length"]))
            samples.append((StepShape(decode_rows=batch, decode_context=context), float(row["itl_ms"]) * _MS))
    return samples


def _helix(rows: Iterable[Row], layers: int) -> list[Sample]:
    """Nothing is said of lengths, so tokens and streams alone carry the cost."""
    samples = []
    for row in rows:
        count, seconds = round(float(row["batch_tokens"])), float(row["ms_per_layer"]) * layers * _MS
        if count and seconds:
            samples.append((StepShape(count) if row["phase"] == "prompt" else StepShape(decode_rows=count), seconds))
    return samples


def _distserve(path: str, text: str, wanted: Mapping[str, str]) -> tuple[list[Sample], dict[str, str]]:
    """Their coefficients at points where they were fitted: prefill a + b Σ len + c Σ len², decode a + b Σ context + c batch."""
    tree: dict[str, Any] = json.loads(text)
    rows = [{"model": model, "tp": tp} for model, by_tp in tree.items() for tp in _mapping(path, by_tp)]
    chosen, _ = _choose(path, rows, ("model", "tp"), wanted)
    found = tree[chosen["model"]][chosen["tp"]]
    a, b, c = found["prefill"]
    lengths = [2**n for n in range(5, 12)]
    samples: list[Sample] = [(StepShape(n, pairs(n, 0)), (a + b * n + c * n * n) * _MS) for n in lengths]
    for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        small = batch < found["decoding_large_small_bs_threshold"]
        a, b, c = found["decoding_smallbs" if small else "decoding_largebs"]
        contexts = [batch * length for length in (64, 256, 1024)]
        samples += [(StepShape(0, 0, batch, context), (a + b * context + c * batch) * _MS) for context in contexts]
    return samples, chosen


def _mapping(path: str, value: object) -> Mapping[str, Any]:
    if isinstance(value, Mapping) and all(isinstance(inner, Mapping) and "prefill" in inner for inner in value.values()):
        return value
    raise ConfigError(f"{path} is no GPU profile known here: it is JSON, but not of DistServe's shape")


def _beside(path: str, name: str) -> list[Row]:
    return list(csv.DictReader(io.StringIO(_read(str(Path(path).with_name(name))))))
