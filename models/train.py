"""Train the demo model on the standard library and write it as a Hugging Face folder.

    python -m models.train --out models/demo --minutes 80

Interrupt it and run the same command again to resume from the last checkpoint.
``--export-only`` writes the model as of that checkpoint without training. ``--start models/demo`` trains a written model
further: its weights and its tokenizer, a schedule of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from models import optim
from models.bpe import BOS, END, EOS, PAD, Encoder, save_tokenizer, token_id, train_tokenizer
from models.corpus import exchanges, fragments, standard_library
from models.llama import Llama, LlamaConfig

TOKENS_PER_STEP = 4096
TOKENS_PER_PASS = 2048  # of a step; sets the memory needed, not the result
SHORT, LONG = 512, 2048
LONG_FROM = 0.88  # share of the run after which rows have the full context length
WARMUP_STEPS = 50
DECAY_FROM = 0.6  # warm up, stay, then decay linearly to zero from here
CHECKPOINT_SECONDS = 300.0
SEED = 20


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epoch: int = 0
    used: int = 0  # steps of this epoch
    length: int = SHORT  # a new one starts a new epoch
    log: list[dict[str, float]] = field(default_factory=list)


def prepare(work: Path, config: LlamaConfig, start: Path | None = None) -> tuple[Tokenizer, dict[str, np.ndarray]]:
    """Tokenizer and encoded documents, made once and kept in the work folder."""
    tokenizer_path, data_path = work / "tokenizer.json", work / "data.npz"
    if not data_path.exists():
        work.mkdir(parents=True, exist_ok=True)
        sources = standard_library()
        training = [s for s in sources if not s.held_out]
        tokenizer = (
            Tokenizer.from_file(str(start / "tokenizer.json"))
            if start
            else train_tokenizer((s.text for s in training), config.vocab_size)
        )
        encoder = Encoder(tokenizer)
        held = [s for s in sources if s.held_out]
        code = [s for s in training if not s.is_test]
        documents = [encoder.document(s.text) for s in training]
        documents += [encoder.document(text) for s in code for text in fragments(s)]
        documents += [encoder.chat(chat) for s in code for chat in exchanges(s)]
        held_files = [encoder.document(s.text) for s in held]
        held_chats = [encoder.chat(c) for s in held if not s.is_test for c in exchanges(s)]
        data = {
            "train": np.concatenate(documents).astype(np.uint16),
            "starts": np.cumsum([0, *map(len, documents)]),
            "held_files": np.concatenate(held_files).astype(np.uint16),
            "held_chats": np.concatenate(held_chats).astype(np.uint16),
            "held_bytes": np.array(sum(len(s.text.encode()) for s in held)),
        }
        tokenizer.save(str(tokenizer_path))
        np.savez(data_path, allow_pickle=False, **data)
        print(
            f"{len(training)} files to train on, {len(held)} held out; {len(documents)} documents, {len(data['train'])} tokens"
        )
    with np.load(data_path) as loaded:
        return Tokenizer.from_file(str(tokenizer_path)), dict(loaded)


def epoch_batches(data: dict[str, np.ndarray], epoch: int, used: int, length: int) -> Iterator[torch.Tensor]:
    """What is left of an epoch after ``used`` batches of ``[rows, length + 1]``.

    Documents are shuffled, joined and cut into rows, and rows are shuffled again, so that
    one step does not see one long file only.
    """
    starts, rng = data["starts"], np.random.default_rng([SEED, epoch])
    documents = rng.permutation(len(starts) - 1)
    stream = np.concatenate([data["train"][starts[i] : starts[i + 1]] for i in documents])
    begins = rng.permutation((len(stream) - 1) // length) * length
    rows = TOKENS_PER_STEP // length
    for first in range(used * rows, len(begins) - rows + 1, rows):
        index = begins[first : first + rows, None] + np.arange(length + 1)
        yield torch.from_numpy(stream[index].astype(np.int64))


@torch.no_grad()
def evaluate(model: Llama, tokens: np.ndarray, limit: int | None = None) -> float:
    """Mean loss in nats per token over rows of the full context length."""
    total, count = 0.0, 0
    for begin in range(0, len(tokens) - 1, LONG)[:limit]:
        row = torch.from_numpy(tokens[begin : begin + LONG + 1].astype(np.int64))[None]
        total += model(row).item() * (row.shape[1] - 1)
        count += row.shape[1] - 1
    return total / count


def export(model: Llama, tokenizer: Tokenizer, out: Path) -> dict[str, torch.Tensor]:
    """Write config, tokenizer and bf16 weights; return the weights as written."""
    out.mkdir(parents=True, exist_ok=True)
    config = model.config
    pad, bos, eos, end = (token_id(tokenizer, token) for token in (PAD, BOS, EOS, END))
    generation = {
        "bos_token_id": bos,
        "eos_token_id": [eos, end],
        "pad_token_id": pad,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    config_json = config.to_hf(bos=bos, eos=[eos, end], pad=pad)
    for name, content in (("config", config_json), ("generation_config", generation)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    save_tokenizer(tokenizer, out, config.max_position_embeddings)
    weights = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return weights


def report(model: Llama, data: dict[str, np.ndarray]) -> dict[str, float]:
    """Held-out figures of the model as it stands."""
    files = evaluate(model, data["held_files"])
    bits = files * (len(data["held_files"]) - 1) / math.log(2)
    return {
        "held_out_nats_per_token": files,
        "held_out_perplexity": math.exp(files),
        "held_out_bits_per_byte": bits / float(data["held_bytes"]),
        "held_out_chat_nats_per_token": evaluate(model, data["held_chats"], limit=40),
        "held_out_tokens": len(data["held_files"]),
        "held_out_bytes": int(data["held_bytes"]),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def schedule(share: float, step: int) -> float:
    """Learning rate as a factor of its peak: warm up, stay, decay."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (1.0 - share) / (1.0 - DECAY_FROM))


def train(args: argparse.Namespace, model: Llama, data: dict[str, np.ndarray]) -> Progress:
    """Train until the budget is spent, checkpointing on the way."""
    checkpoint: Path = args.work / "checkpoint.pt"
    optimizers = optim.build(model)
    progress = Progress()
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        progress = Progress(**saved["progress"])
        print(f"resumed at step {progress.step}, {progress.tokens} tokens")
    if args.export_only:
        return progress

    def save() -> None:
        progress.log.append(
            {
                "tokens": progress.tokens,
                "seconds": progress.seconds,
                "held_out": evaluate(model, data["held_files"], limit=8),
            }
        )
        print("held out", json.dumps(progress.log[-1]), flush=True)
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "progress": asdict(progress),
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    step_loss = torch.compile(model, dynamic=False) if args.compile else model
    stream, loss = epoch_batches(data, progress.epoch, progress.used, progress.length), 0.0
    last, saved_at = time.monotonic(), progress.seconds
    while True:
        share = progress.tokens / args.tokens if args.tokens else progress.seconds / (60 * args.minutes)
        if share >= 1:
            break
        length = LONG if share >= LONG_FROM else SHORT
        batch = next(stream, None) if length == progress.length else None
        if batch is None:
            progress.epoch, progress.used, progress.length = progress.epoch + 1, 0, length
            stream = epoch_batches(data, progress.epoch, 0, length)
            batch = next(stream)
        optim.set_rate(optimizers, schedule(share, progress.step))
        passes = torch.split(batch, TOKENS_PER_PASS // length)
        step = 0.0
        for rows in passes:
            part = step_loss(rows) / len(passes)
            part.backward()
            step += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        now = time.monotonic()
        progress.step += 1
        progress.used += 1
        progress.tokens += TOKENS_PER_STEP
        progress.seconds += now - last
        last = now
        loss = step if not loss else 0.95 * loss + 0.05 * step
        if progress.step % 10 == 0:
            rate = progress.tokens / progress.seconds
            print(f"{progress.step} {share:.3f} loss {loss:.3f} {rate:.0f} tokens/s", flush=True)
        if progress.seconds - saved_at >= CHECKPOINT_SECONDS:
            save()
            saved_at = progress.seconds
    save()
    return progress


def main() -> None:
    """Parse the command line, train, export, report."""
    parser = argparse.ArgumentParser(description="Train Tandem's demo model.")
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    work = Path(tempfile.gettempdir()) / "tandem-demo-model"
    parser.add_argument("--work", type=Path, default=work, help="folder for checkpoints")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=80.0)
    budget.add_argument("--tokens", type=int, help="budget in tokens, instead of minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--start", type=Path, help="folder of a written model to train further")
    parser.add_argument("--export-only", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    config = LlamaConfig()
    tokenizer, data = prepare(args.work, config, args.start)
    model = Llama(config)
    if args.start:
        model.load_state_dict({name: t.float() for name, t in load_file(args.start / "model.safetensors").items()})
    progress = train(args, model, data)
    weights = export(model, tokenizer, args.out)
    model.load_state_dict(weights)  # report on what was written, rounded to bf16
    figures = {**report(model, data), "steps": progress.step, "tokens": progress.tokens}
    figures["seconds"] = round(progress.seconds)
    text = json.dumps(figures, indent=2)
    (args.work / "figures.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
