"""Weights from safetensors files, single or sharded. Nothing is unpickled: `.bin` and `.pt` are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.errors import ConfigError
from engine.spec import ModelSpec

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all)."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NAMED_AT_MOST = 8


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of `spec` must hold, by its Hugging Face name."""
    hidden, inter = spec.hidden_size, spec.intermediate_size
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not spec.tied_head:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    for layer in range(spec.num_layers):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
            if spec.qkv_bias:
                shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        shapes[at + "self_attn.o_proj.weight"] = (hidden, q_rows)
        if spec.out_bias:
            shapes[at + "self_attn.o_proj.bias"] = (hidden,)
        if spec.qk_norm:
            shapes[at + "self_attn.q_norm.weight"] = shapes[at + "self_attn.k_norm.weight"] = (spec.head_dim,)
        for name, rows, cols in (("gate", inter, hidden), ("up", inter, hidden), ("down", hidden, inter)):
            shapes[f"{at}mlp.{name}_proj.weight"] = (rows, cols)
            if spec.mlp_bias:
                shapes[f"{at}mlp.{name}_proj.bias"] = (rows,)
    return shapes


def read_weights(directory: Path, shapes: Mapping[str, tuple[int, ...]], progress: Progress | None = None) -> dict[str, Tensor]:
    """The tensors named in `shapes`, mapped from the directory's safetensors files in the dtype they are stored in.

    Raises ConfigError that names the missing, truncated or misshapen file or tensor.
    """
    tensors: dict[str, Tensor] = {}
    files = _files(directory)
    total, done = sum(file.stat().st_size for file in files), 0
    with ExitStack() as stack:
        for file in files:
            for name, tensor in _open(stack, file):
                if name in shapes:
                    tensors[name] = _checked(name, tensor, shapes[name], file)
            done += file.stat().st_size
            if progress is not None:
                progress(done, total)
    missing = sorted(set(shapes) - set(tensors))
    if missing:
        raise ConfigError(f"{directory}: the weights lack {_listing(missing)}; download the model again")
    return tensors


def weights_digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Identity of the weights: SHA-256 over each tensor's name, dtype, shape and xxh3-128; the split into files is not part."""
    digest = sha256(b"tandem-weights")
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        content = xxhash.xxh3_128_digest(tensor.view(torch.uint8).numpy().data)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + content)
    return digest.digest()


def _files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = [directory / name for name in _shard_names(index)]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ConfigError(
                f"{directory}: {index.name} names files that are missing: {_listing(absent)}; download them again"
            )
        return files
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if pickles:
        raise ConfigError(
            f"{directory}: weights are read from safetensors only, found {_listing(pickles)}; "
            "pickled files can run code when opened, convert them with save_pretrained(safe_serialization=True)"
        )
    raise ConfigError(f"{directory}: no weights found; expected model.safetensors or model.safetensors.index.json")


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is not a safetensors index ({error!r}); download it again") from None
    outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if outside:
        raise ConfigError(f"{index} may only name safetensors files beside it, found {_listing(outside)}")
    return names


def _open(stack: ExitStack, file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        handle: Any = stack.enter_context(safe_open(file, framework="pt"))
        for name in handle.keys():  # noqa: SIM118 - not a mapping
            yield name, handle.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{file} is truncated or not a safetensors file ({error}); download it again") from None


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...], file: Path) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"{file}: {name} has shape {tuple(tensor.shape)}, the configuration asks for {shape}")
    if tensor.dtype not in _FLOATS:
        raise ConfigError(f"{file}: {name} is stored as {tensor.dtype}; float32, float16 and bfloat16 can be read")
    return tensor


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more
