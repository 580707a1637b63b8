"""From a Hugging Face directory or Hub id to a model that can run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.blocks import KvLayout
from core.config import hub_token
from core.errors import ConfigError
from engine.attention_check import choose_limits
from engine.attention_plan import Limits
from engine.linear import choose_path
from engine.model import DecoderModel, product_shapes
from engine.spec import DTYPES, ModelSpec, parse_spec
from engine.weights import Progress, expected_shapes, read_weights, weights_digest

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for an executor. `directory` also holds the tokenizer; `eos_token_ids` end a text unless ignored.

    `batch_invariant` is False when this machine offers no products whose rows are independent of the batch.
    """

    spec: ModelSpec
    layout: KvLayout
    model: DecoderModel
    limits: Limits
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    directory: Path
    batch_invariant: bool

    def kv_tensor(self, memory: Tensor) -> Tensor:
        """Whole blocks of bytes (uint8, flat) seen as the executor's `[blocks, layers, 2, kv_heads, block_size, head_dim]`."""
        return memory.view(_TORCH_DTYPES[self.layout.dtype]).view(-1, *self.layout.shape)


def load_model(
    path_or_hub_id: str,
    dtype: str = "float32",
    max_model_len: int | None = None,
    progress: Progress | None = None,
    *,
    block_size: int = 16,
) -> LoadedModel:
    """Loads `path_or_hub_id` in `dtype` (float32, bfloat16, or auto: as stored).

    Set the number of torch threads before: which products are batch-invariant is measured here and depends on it.
    Raises ConfigError that names what to change.
    """
    directory = resolve(path_or_hub_id)
    spec = read_spec(directory)
    context = _context(spec, max_model_len, directory)
    chosen = _dtype(dtype, spec)
    weights = read_weights(directory, expected_shapes(spec), progress)
    fingerprint = _fingerprint(weights_digest(weights), spec, chosen)
    with torch.inference_mode():
        path = choose_path(product_shapes(spec), _TORCH_DTYPES[chosen])
        model = DecoderModel(spec, _TORCH_DTYPES[chosen], weights, path, context)
        limits = Limits() if model.native_attention else choose_limits(spec.head_dim, block_size)
    return LoadedModel(
        spec=spec,
        layout=KvLayout(fingerprint, chosen, spec.num_layers, spec.kv_heads, spec.head_dim, block_size),
        model=model,
        limits=limits,
        eos_token_ids=eos_token_ids(directory),
        max_model_len=context,
        directory=directory,
        batch_invariant=path.invariant,
    )


def resolve(path_or_hub_id: str) -> Path:
    """The local directory of a model; a Hub id is downloaded into the Hub's cache, or found there when offline."""
    local = Path(path_or_hub_id).expanduser()
    if local.is_dir():
        return local
    if local.is_absolute() or path_or_hub_id.startswith(("./", "../", "~")) or path_or_hub_id.count("/") > 1:
        raise ConfigError(f"no model directory at {path_or_hub_id}; give a Hugging Face directory or a Hub id such as org/name")
    from huggingface_hub import snapshot_download  # only a Hub id needs it, and it costs every start a third of a second
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=_HUB_FILES, token=hub_token()))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {path_or_hub_id!r} is neither a directory here nor to be had from the Hub ({first}); "
            "check the spelling, the network, or HF_TOKEN for a private model"
        ) from None


def read_spec(directory: Path) -> ModelSpec:
    return parse_spec(_json(directory / "config.json", required=True), str(directory / "config.json"))


def eos_token_ids(directory: Path) -> tuple[int, ...]:
    """End-of-text ids: of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        value = _json(directory / name, required=False).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
                raise ConfigError(f"{directory / name}: eos_token_id must be token ids, found {value!r}")
            return tuple(ids)
    return ()


def _json(file: Path, required: bool) -> dict[str, Any]:
    if not required and not file.is_file():
        return {}
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file} ({error.strerror}); a model directory needs it") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold an object")
    return tree


def _context(spec: ModelSpec, wanted: int | None, directory: Path) -> int:
    if wanted is not None and wanted > spec.max_model_len:
        raise ConfigError(
            f"model.max_model_len is {wanted}, but {directory} was made for {spec.max_model_len}; lower it or leave it out"
        )
    return wanted or spec.max_model_len


def _dtype(wanted: str, spec: ModelSpec) -> str:
    chosen = spec.stored_dtype if wanted == "auto" else wanted
    if chosen not in DTYPES:
        told = f"the model is stored as {chosen}" if wanted == "auto" else f"got {wanted!r}"
        raise ConfigError(f"model.dtype must be one of {', '.join(DTYPES)} ({told})")
    return chosen


def _fingerprint(weights: bytes, spec: ModelSpec, dtype: str) -> bytes:
    """Names what KV bytes mean: weights, dtype, rope and the constants that enter the arithmetic; not layout or sharding."""
    facts = {
        "dtype": dtype,
        "rope": asdict(spec.rope),
        "norm_eps": spec.norm_eps,
        "windows": spec.windows,
    }
    return sha256(weights + json.dumps(facts, sort_keys=True).encode()).digest()[:16]
