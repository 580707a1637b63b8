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

    python -m benchmarks.engine_cpu [--quick] [--json FILE] [--only m15_f32_1t,m125_bf16_2t]

With --quick a pair that is slow (transformers in bf16 on a processor without such products) plays fewer rounds, at least one.
"""

from __future__ import annotations

import json
import subprocess
import time
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
    budget_s: float  # no further round begins after it

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
    shapes = {"m15": (3, 512, 32, 24, 6.0), "m125": (2, 128, 16, 12, 8.0)}
    if not quick:
        shapes = dict.fromkeys(shapes, (5, 512, 512, 64, 600.0))
    return [Case(model, dtype, count, *shapes[model]) for model, dtype in BARS for count in (1, 2)]


def measure(case: Case) -> list[Row]:
    folder = make(case.model)
    with threads(case.threads):
        ours = Ours(folder, case.dtype, 8 * (case.prompt + case.new_tokens + 64))
        theirs = Theirs(folder, case.dtype)
        single = _turns(ours, theirs, case, 1, case.prompt)
        batched = _turns(ours, theirs, case, 8, case.prompt_batched)
        bounds = _bounds(case, single, folder)
    how = f"prompt {case.prompt}, path {ours.path}"
    bar, rows = BARS[case.model, case.dtype], []
    for batch, pairs in ((1, single), (8, batched)):
        name = f"{case.label}_b{batch}"
        claim, said = f"decode ratio, {case.said}, batch {batch}", f"{how}, {len(pairs.ours)} rounds"
        rows.append(Row(f"decode_{name}", claim, pairs.decode_ratio, "x", bar, ">=", PEER, said))
        rate = batch / _gap_s(pairs.ours)
        rows.append(Row(f"decode_tps_{name}", f"decode, {case.said}, batch {batch}", rate, "tok/s", how=said))
    claim, said = f"prefill ratio, {case.said}", f"{how}, {len(single.ours)} rounds"
    rows.append(Row(f"prefill_{case.label}", claim, single.prefill_ratio, "x", 1.0, ">=", PEER, said))
    return rows + bounds + _llama(case, folder, single)


def _turns(ours: Ours, theirs: Theirs, case: Case, batch: int, length: int) -> Pairs:
    pairs = Pairs()
    for engine in (ours, theirs):
        engine.run(prompts(batch, 8, seed=0), batch + 2)  # warms up: kernels are built, memory is touched
    started = time.perf_counter()
    for turn in range(case.rounds):
        if turn and time.perf_counter() - started > case.budget_s:
            break
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
    parser = arguments(__doc__)
    parser.add_argument("--only", help="which cases, separated by commas")
    options = parser.parse_args()
    only = options.only and options.only.split(",")
    torch.manual_seed(0)
    rows: list[Row] = []
    for case in cases(options.quick):
        if only and case.label not in only:
            continue
        started = time.perf_counter()
        rows += measure(case)
        print(f"done: {case.said}, {time.perf_counter() - started:.0f} s", flush=True)
    report(rows, options.json)


if __name__ == "__main__":
    main()
