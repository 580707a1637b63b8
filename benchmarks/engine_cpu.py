"""Our engine beside transformers' `generate`: same weights, dtype, threads and prompts, in one process, taking turns.

Claims
- Decoding at batch 1 and batch 8: at least twice the tokens/s on a model of about 15 M parameters; on about 110 M at least
  twice in bf16 and 1.5 times in fp32. With one thread and with two.
- Prefill tokens/s are no lower.
- llama.cpp at batch 1 is stated beside it, when installed (`make peers`).
- The machine's bounds are stated: bytes read per second give the most decode steps of batch 1 that any engine could do
  with weights of that dtype, torch's matrix products the most prefill; and the share of each that we reach.

Ours is the whole step loop (scheduler, executor, sampler), theirs is `generate` as it stands, timed at every step. Each
figure is a ratio or median over rounds in which both ran one after the other. Ours keeps bf16 checkpoints in bf16 in
memory also when it computes in fp32 (the numbers are the same), so a share of the fp32 bound may exceed 1.

    python -m benchmarks.engine_cpu [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.engine_runs import Ours, Theirs, Timed, matmul_gflops, prompts, read_gbps, threads
from benchmarks.peers import python_of
from benchmarks.rows import Row, arguments, report
from benchmarks.toy_models import make

BATCHES = (1, 8)
BARS = {("m15", "float32"): 2.0, ("m15", "bfloat16"): 2.0, ("m125", "float32"): 1.5, ("m125", "bfloat16"): 2.0}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
LLAMA_KIND = {"float32": "f32", "bfloat16": "bf16"}
LLAMA = Path(__file__).with_name("rival_llama.py")
PEER = "transformers generate"


@dataclass(frozen=True, slots=True)
class Case:
    """One model in one dtype with one number of threads. `prompt` of a batch of 8 is shorter: only its decoding is timed."""

    model: str
    dtype: str
    threads: int
    rounds: int
    prompt: int
    prompt_batched: int
    new_tokens: int

    @property
    def label(self) -> str:
        return f"{self.model}_{LLAMA_KIND[self.dtype]}_{self.threads}t"

    @property
    def said(self) -> str:
        return f"{self.model}, {LLAMA_KIND[self.dtype]}, {self.threads} thread{'s' if self.threads > 1 else ''}"


class Pairs:
    """Runs of both engines, taking turns."""

    def __init__(self) -> None:
        self.ours: list[Timed] = []
        self.theirs: list[Timed] = []

    @property
    def decode_ratio(self) -> float:
        return _gap_s(self.theirs) / _gap_s(self.ours)

    @property
    def prefill_ratio(self) -> float:
        return median(b.prefill_s / a.prefill_s for a, b in zip(self.ours, self.theirs, strict=True))


def cases(quick: bool) -> list[Case]:
    shapes = {"m15": (2, 512, 64, 16), "m125": (2, 128, 32, 12)} if quick else dict.fromkeys(("m15", "m125"), (5, 512, 512, 64))
    return [Case(model, dtype, count, *shapes[model]) for model, dtype in BARS for count in (1, 2)]


def measure(case: Case) -> list[Row]:
    folder = make(case.model)
    with threads(case.threads):
        ours = Ours(folder, case.dtype, 8 * (case.prompt + case.new_tokens + 64))
        theirs = Theirs(folder, case.dtype)
        single = _turns(ours, theirs, case, 1, case.prompt)
        batched = _turns(ours, theirs, case, 8, case.prompt_batched)
        bounds = _bounds(case, single, folder)
    how = f"{case.rounds} rounds, prompt {case.prompt}, path {ours.path}"
    bar, rows = BARS[case.model, case.dtype], []
    for batch, pairs in ((1, single), (8, batched)):
        name = f"{case.label}_b{batch}"
        claim = f"decode ratio, {case.said}, batch {batch}"
        rows.append(Row(f"decode_{name}", claim, pairs.decode_ratio, "x", bar, ">=", PEER, how))
        rate = batch / _gap_s(pairs.ours)
        rows.append(Row(f"decode_tps_{name}", f"decode, {case.said}, batch {batch}", rate, "tok/s", how=how))
    claim = f"prefill ratio, {case.said}"
    rows.append(Row(f"prefill_{case.label}", claim, single.prefill_ratio, "x", 1.0, ">=", PEER, how))
    return rows + bounds + _llama(case, folder, single)


def _turns(ours: Ours, theirs: Theirs, case: Case, batch: int, length: int) -> Pairs:
    pairs = Pairs()
    for engine in (ours, theirs):
        engine.run(prompts(batch, 64, seed=0), batch + 2)  # warms up: kernels are built, memory is touched
    for turn in range(case.rounds):
        asked = prompts(batch, length, seed=turn)
        pairs.ours.append(ours.run(asked, case.new_tokens + batch - 1))
        pairs.theirs.append(theirs.run(asked, case.new_tokens))
    return pairs


def _gap_s(runs: list[Timed]) -> float:
    return median(gap for run in runs for gap in run.gaps_s)


def _bounds(case: Case, single: Pairs, folder: Path) -> list[Row]:
    numbers = (folder / "model.safetensors").stat().st_size / 2  # the toy models are stored in bf16, heads tied
    steps_per_s = read_gbps() * 1e9 / (numbers * DTYPE_BYTES[case.dtype])
    gflops = matmul_gflops(case.dtype)
    prefill_tps = gflops * 1e9 / (2 * numbers)
    decode_share = 1 / _gap_s(single.ours) / steps_per_s
    prefill_share = case.prompt / median(run.prefill_s for run in single.ours) / prefill_tps
    memory, product = f"bound by memory, {case.said}", f"bound by products, {case.said}"
    how = "sum over 256 MiB; 1024 x 1024 matmul of torch in that dtype"
    return [
        Row(f"bound_decode_{case.label}", f"decode steps {memory}", steps_per_s, "steps/s", how=how),
        Row(f"share_decode_{case.label}", f"share of it reached, {case.said}", decode_share, "x", how=how),
        Row(f"bound_prefill_{case.label}", f"prefill {product}", prefill_tps, "tok/s", how=how),
        Row(f"share_prefill_{case.label}", f"share of it reached, {case.said}", prefill_share, "x", how=how),
    ]


def _llama(case: Case, folder: Path, single: Pairs) -> list[Row]:
    """llama.cpp's speed, and ours against it (above 1: we are ahead)."""
    python, figures = python_of("llama-cpp"), None
    if python is not None:
        command = [python, LLAMA, folder, LLAMA_KIND[case.dtype], case.threads, case.prompt, case.new_tokens]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=600)
        figures = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
        if figures is None:
            print(f"llama.cpp did not run: {done.stderr.strip().splitlines()[-1:]}")
    decode = figures and figures["gap_s"] / _gap_s(single.ours)
    prefill = figures and figures["prefill_s"] / median(run.prefill_s for run in single.ours)
    rate = figures and 1 / figures["gap_s"]
    how = "llama.cpp in a process of its own, right after"
    return [
        Row(f"llama_decode_{case.label}", f"decode ratio, {case.said}, batch 1", decode, "x", peer="llama.cpp", how=how),
        Row(f"llama_prefill_{case.label}", f"prefill ratio, {case.said}", prefill, "x", peer="llama.cpp", how=how),
        Row(f"llama_tps_{case.label}", f"its decode, {case.said}", rate, "tok/s", peer="llama.cpp", how=how),
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    for case in cases(options.quick):
        rows += measure(case)
        print(f"done: {case.said}", flush=True)
    report(rows, options.json)


if __name__ == "__main__":
    main()
