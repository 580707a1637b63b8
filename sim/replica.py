"""What one worker of a pool is: how long its steps take, and how much KV it holds."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from math import ceil
from pathlib import Path

from core.blocks import KvLayout
from core.config import Config
from core.cost_file import read_cost_model
from core.cost_model import CostModel, StepCost
from core.errors import ConfigError
from core.gpu_profile import read_gpu_profile
from core.gpus import gpu_named
from core.roofline import MEMORY_SHARE
from core.roofline_file import read_roofline
from core.sim_config import PoolConfig, ProfileConfig
from sim.counted import StepTime

PARALLEL = ("tp", "tensor_parallel")
GPU = ("gpu", "hardware", "system")
KV_TOKEN_BYTES = 4
BILLIONS = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)b(?![a-z0-9])", re.IGNORECASE)
"""Of a model's parameters, in its name."""


@dataclass(frozen=True, slots=True)
class Replica:
    """`cost` is what routers hear of it: the linear model of its steps, or the one nearest to `step_s`."""

    step_s: StepTime
    cost: StepCost
    layout: KvLayout
    num_blocks: int
    gpus: int
    usd_per_hour: float


def replica_of(config: Config, pool: PoolConfig, given: CostModel | None = None) -> Replica:
    """`given`: in place of a profile. Raises ConfigError for a profile that is missing or unknown, and for a worker that cannot
    hold two blocks."""
    profile = pool.profile or config.sim.profile
    if profile is None and given is None:
        raise ConfigError("sim.profile is missing: name a file of `tandem profile`, a GPU profile, or a roofline")
    tp = pool.tp
    if given is not None:
        model, step_s, capacity = given, given.steps.step_s, None
    elif profile is not None and profile.roofline is not None:
        gpu_named(profile.roofline.gpu)  # that nobody knows is a mistake also where pools name theirs
        roofline = read_roofline(profile.roofline.model, pool.gpu or profile.roofline.gpu, pool.tp, pool.pp)
        model, step_s, capacity = roofline.cost_model(), roofline.step_s, roofline.kv_capacity_tokens
    else:
        assert profile is not None
        model = _from_file(profile, pool, config.model.name)
        tp = next((int(profile.select[name]) for name in PARALLEL if profile.select.get(name, "").isdigit()), pool.tp)
        step_s, capacity = model.steps.step_s, _capacity(model, profile, pool, tp * pool.pp)
    layout, gpus = layout_of(model, config.engine.block_size), tp * pool.pp
    said = pool.kv_bytes is not None or "kv_bytes" in config.engine.model_fields_set
    kv_bytes = pool.kv_bytes if pool.kv_bytes is not None else config.engine.kv_bytes
    tokens = capacity if capacity is not None and not said else kv_bytes // layout.token_bytes
    blocks = tokens // config.engine.block_size
    if blocks < 2:
        missing = 2 * layout.block_bytes - kv_bytes
        raise ConfigError(
            f"a {pool.role} worker has {kv_bytes} bytes for KV, of which a block of {config.engine.block_size} tokens takes"
            f" {layout.block_bytes}: {missing} bytes are missing for two; set kv_bytes of the pool or engine.kv_bytes"
        )
    return Replica(step_s, model.steps, layout, blocks, gpus, pool.usd_per_gpu_hour * gpus)


def _capacity(model: CostModel, profile: ProfileConfig, pool: PoolConfig, gpus: int) -> int | None:
    """Tokens of KV beside the weights of a public profile's model, by its name and the GPUs' memory; None where one of the two
    is not said. Raises ConfigError when the weights alone do not fit."""
    gpu = pool.gpu or next((profile.select[name] for name in GPU if name in profile.select), "")
    named = BILLIONS.search(model.machine)
    if not gpu or named is None or not model.kv_token_bytes or _is_ours(profile.file):
        return None
    weights = float(named[1]) * 1e9 * (1 if "fp8" in model.machine.lower() else 2)
    room = MEMORY_SHARE * gpu_named(gpu).memory_bytes * gpus - weights
    if room < model.kv_token_bytes:
        raise ConfigError(
            f"{model.machine} does not fit on {gpus} x {gpu}: {weights / 1e9:.0f} GB of weights are {-room / 1e9:.1f} GB more"
            f" than {MEMORY_SHARE:.0%} of their memory; use more GPUs (tp, pp), larger ones, or set kv_bytes if that is wrong"
        )
    return int(room / model.kv_token_bytes)


def layout_of(model: CostModel, block_size: int) -> KvLayout:
    """Nobody looks into blocks here: one head as wide as it takes for the bytes of a token."""
    token_bytes = model.kv_token_bytes or KV_TOKEN_BYTES
    fingerprint = sha256(model.machine.encode()).digest()[:16] if not model.fingerprint else bytes.fromhex(model.fingerprint)
    return KvLayout(fingerprint, "bfloat16", 1, 1, ceil(token_bytes / KV_TOKEN_BYTES), block_size)


def _from_file(profile: ProfileConfig, pool: PoolConfig, name: str) -> CostModel:
    select = dict(profile.select)
    if name and not _is_ours(profile.file):
        select.setdefault("model", name)
    return _read(profile.file, tuple(sorted(select.items())), pool.gpu, pool.tp)


@lru_cache(maxsize=64)
def _read(path: str, select: tuple[tuple[str, str], ...], gpu: str, tp: int) -> CostModel:
    if _is_ours(path):
        return read_cost_model(path)
    wanted = dict(select)
    for names, value in ((GPU, gpu), (PARALLEL, str(tp))):
        known = _keys_of(path) & set(names)
        if value and len(known) == 1 and not known & wanted.keys():
            wanted[known.pop()] = value
    return read_gpu_profile(path, wanted)


def _is_ours(path: str) -> bool:
    try:
        tree = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return not Path(path).exists()  # the reader of ours says what is wrong, and how to make one
    return isinstance(tree, Mapping) and "format" in tree


def _keys_of(path: str) -> set[str]:
    """The columns of a table, of which some choose a configuration; a JSON profile has models and `tp`."""
    data = Path(path).read_bytes()
    text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode(errors="replace")
    return {"tp"} if text.lstrip().startswith("{") else set(next(csv.reader(io.StringIO(text)), []))
