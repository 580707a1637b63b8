"""What each KV codec costs and saves on the demo model's own KV, and what the lossy ones do to its answers.

Claims
- Lossless codecs change nothing: the perplexity of the continuation is the same number.
- int8 changes the perplexity of held-out text by less than 1 %.
- Size against raw, the speed of one thread, and the link rate below which it is quicker than raw are stated for every codec.

Held-out files of the standard library; the KV of a prompt half is computed, encoded, decoded and put back, then the other
half is fed token by token and judged. The same KV and tokens for every codec.

    python -m benchmarks.kv_codecs [--quick] [--json FILE]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.rows import Row, arguments, report
from core.blocks import KvLayout, blocks_for
from engine.load import load_model
from engine.step import Row as StepRow
from engine.step import StepPlan
from engine.torch_executor import TorchExecutor
from kvtransfer.arena import Blocks, HostArena
from kvtransfer.codecs import FACTORIES, Codec, make_codec
from models.corpus import standard_library

MODEL = Path(__file__).resolve().parent.parent / "models" / "demo"
PROMPT_TOKENS = 256
SPEED_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Judged:
    perplexity: float
    best: list[int]  # the likeliest token at every position


class Continuations:
    """Texts whose first half stands in the KV of an executor and whose second half is judged against it."""

    def __init__(self, dtype: str, texts: int, judged_tokens: int) -> None:
        loaded = load_model(str(MODEL), dtype)
        self.layout: KvLayout = loaded.layout
        self._judged_tokens = judged_tokens
        self._tokens = held_out(texts, PROMPT_TOKENS + judged_tokens)
        per_text = blocks_for(PROMPT_TOKENS + judged_tokens, self.layout.block_size)
        self.blocks = HostArena(texts * per_text, self.layout.block_bytes).bytes_view()
        memory = torch.from_numpy(self.blocks.reshape(-1))
        self._executor = TorchExecutor(loaded, loaded.kv_tensor(memory))
        self._tables = [list(range(n * per_text, (n + 1) * per_text)) for n in range(texts)]
        prompt_blocks = PROMPT_TOKENS // self.layout.block_size
        self.prompt_blocks = [block for table in self._tables for block in table[:prompt_blocks]]
        for n in range(texts):
            self._scores([StepRow(n, self._tokens[n][:PROMPT_TOKENS], 0, self._tables[n], None)])
        self.prompt_kv = self.blocks[self.prompt_blocks].copy()

    def judge(self, codec: Codec) -> Judged:
        """Puts the prompts' KV back as it comes out of the codec, then feeds the rest."""
        for block, plain in zip(self.prompt_blocks, self.prompt_kv, strict=True):
            codec.decode(codec.encode(plain), self.blocks[block])
        losses, best = [], []
        for at in range(PROMPT_TOKENS, PROMPT_TOKENS + self._judged_tokens - 1):
            rows = [StepRow(n, [text[at]], at, self._tables[n], None) for n, text in enumerate(self._tokens)]
            scores = self._scores(rows).float().log_softmax(-1)
            targets = torch.tensor([text[at + 1] for text in self._tokens])
            losses.append(-scores.gather(1, targets[:, None]).double().mean().item())
            best += scores.argmax(-1).tolist()
        return Judged(float(np.exp(np.mean(losses))), best)

    def _scores(self, rows: list[StepRow]) -> torch.Tensor:
        return self._executor.logits(StepPlan(tuple(rows)))


def held_out(texts: int, num_tokens: int) -> list[list[int]]:
    """The beginnings of files that the demo model was not trained on."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    found: list[list[int]] = []
    for source in standard_library():
        if source.held_out and not source.is_test:
            ids = tokenizer.encode(source.text[: 16 * num_tokens]).ids
            if len(ids) >= num_tokens:
                found.append(ids[:num_tokens])
        if len(found) == texts:
            return found
    raise SystemExit(f"only {len(found)} held-out files have {num_tokens} tokens; lower the number of texts")


def speeds(codec: Codec, kv: Blocks) -> tuple[float, float, float]:
    """(size against raw, encode GB/s, decode GB/s) of plain bytes, one thread."""
    encoded = [codec.encode(block) for block in kv]
    out = np.empty_like(kv[0])

    def seconds(work: Callable[[], None]) -> float:
        taken = []
        for _ in range(SPEED_ROUNDS):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
        return median(taken)

    def encode() -> None:
        for block in kv:
            codec.encode(block)

    def decode() -> None:
        for data in encoded:
            codec.decode(data, out)

    ratio = sum(data.nbytes for data in encoded) / kv.nbytes
    return ratio, kv.nbytes / seconds(encode) / 1e9, kv.nbytes / seconds(decode) / 1e9


def measure(dtype: str, texts: int, judged_tokens: int) -> list[Row]:
    continuations = Continuations(dtype, texts, judged_tokens)
    exact = continuations.judge(make_codec("raw", continuations.layout))
    how = f"demo model, {dtype}, {texts} held-out files, {PROMPT_TOKENS} + {judged_tokens} tokens"
    rows = [Row(f"ppl_raw_{dtype}", f"perplexity, raw, {dtype}", exact.perplexity, "", how=how)]
    for name in FACTORIES:
        codec = make_codec(name, continuations.layout)
        ratio, encode, decode = speeds(codec, continuations.prompt_kv[:128])
        if name != "raw":
            seen = continuations.judge(codec)
            change = 100 * (seen.perplexity / exact.perplexity - 1)
            same = 100 * float(np.mean([a == b for a, b in zip(seen.best, exact.best, strict=True)]))
            bar = 1.0 if codec.lossy else 0.0
            rows += [
                Row(f"ppl_{name}_{dtype}", f"change of perplexity, {name}, {dtype}", abs(change), "%", bar, "<=", "raw", how),
                Row(f"ppl_signed_{name}_{dtype}", f"the same with its sign, {name}, {dtype}", change, "%", peer="raw", how=how),
                Row(
                    f"same_{name}_{dtype}",
                    f"positions with the same likeliest token, {name}, {dtype}",
                    same,
                    "%",
                    peer="raw",
                    how=how,
                ),
            ]
        rows += [
            Row(f"ratio_{name}_{dtype}", f"size of its KV, {name}, {dtype}", ratio, "x", None, "<=", "raw", how),
            Row(f"encode_{name}_{dtype}", f"encode, {name}, {dtype}", encode, "GB/s", how="plain bytes, one thread"),
            Row(f"decode_{name}_{dtype}", f"decode, {name}, {dtype}", decode, "GB/s", how="plain bytes, one thread"),
        ]
        if name != "raw":
            pays_below = 1e3 * (1 - ratio) / (1 / encode + 1 / decode)
            what = f"link rate below which {name} is quicker than raw, {dtype}"
            rows.append(
                Row(f"pays_below_{name}_{dtype}", what, pays_below, "MB/s", how="one thread on each end, nothing overlapped")
            )
    return rows


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    texts, judged_tokens = (8, 128) if options.quick else (24, 256)
    report([row for dtype in ("float32", "bfloat16") for row in measure(dtype, texts, judged_tokens)], options.json)


if __name__ == "__main__":
    main()
