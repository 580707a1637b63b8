"""The file of `tandem plan --gpus`: which GPUs can be had, at what price, and how long a model takes on them. docs/planning.md
describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from cluster.planner_model import Layout
from cluster.planner_offers import Offer, Terms
from core.cost_file import read_cost_model
from core.cost_model import CostModel, LinkCost
from core.errors import ConfigError
from core.gpu_profile import read_gpu_profile
from core.gpus import gpu_named
from core.roofline import MEMORY_SHARE
from core.roofline_file import read_roofline, read_shape

GIB = 2**30
LATENCY_S = 1e-4
BANDWIDTH = ByteSize(12_500_000_000)
PARALLEL = ("tensor_parallel", "tp")


class _Branch(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelEntry(_Branch):
    """`config`: a Hugging Face config.json. Without it, `weights_bytes` and `kv_token_bytes` say what a replica holds."""

    config: str = ""
    weights_bytes: ByteSize | None = Field(None, gt=0)
    kv_token_bytes: int | None = Field(None, gt=0)


class SpotEntry(_Branch):
    usd_per_hour: float = Field(ge=0)
    count: int | None = Field(None, ge=0)
    interruptions_per_hour: float = Field(0.0, ge=0)
    notice_s: float = Field(30.0, ge=0)
    away_s: float = Field(180.0, ge=0)


class LinkEntry(_Branch):
    bandwidth: ByteSize = BANDWIDTH
    latency: float = Field(LATENCY_S, ge=0)


class ProfileEntry(_Branch):
    file: str
    select: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, given: Any) -> Any:
        return {"file": given} if isinstance(given, str) else given


class GpuEntry(_Branch):
    name: str = Field(min_length=1)
    memory_gib: float | None = Field(None, gt=0)
    count: int | None = Field(None, ge=0)
    tp: tuple[int, ...] = Field((1, 2, 4, 8), min_length=1)
    pp: tuple[int, ...] = Field((1,), min_length=1)
    usd_per_hour: float = Field(0.0, ge=0)
    spot: SpotEntry | None = None
    link: LinkEntry | None = None
    profile: ProfileEntry | None = None
    step_tokens: int = Field(2048, ge=16)

    @model_validator(mode="after")
    def _layouts_are_counts(self) -> Self:
        if min(*self.tp, *self.pp, 1) < 1:
            raise ValueError(f"tp and pp are 1 or more, got {self.tp} and {self.pp}")
        return self


class GpusFile(_Branch):
    model: ModelEntry = ModelEntry()
    gpus: tuple[GpuEntry, ...] = Field(min_length=1)


def read_offers(path: str) -> tuple[list[Offer], list[str]]:
    """What can be had, and why the rest cannot: one line per layout that does not fit or is not in its profile.

    Paths in the file are relative to it. Raises ConfigError for a file that cannot be used, and when nothing is left.
    """
    place = Path(path)
    try:
        tree = yaml.safe_load(place.read_text(encoding="utf-8"))
        found = GpusFile.model_validate(tree if isinstance(tree, dict) else {"gpus": tree})
    except OSError as error:
        raise ConfigError(f"cannot read the GPUs {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is neither YAML nor JSON: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{path} does not describe GPUs:\n" + "\n".join(_faults(error))) from None
    for gpu in found.gpus:
        if gpu.profile is None and found.model.config:
            gpu_named(gpu.name)  # a misspelt one is no layout that does not fit
    offers: list[Offer] = []
    refused: list[str] = []
    for gpu in found.gpus:
        for layout in (Layout(tp, pp) for tp in gpu.tp for pp in gpu.pp):
            try:
                offers.append(_offer(gpu, layout, found.model, place.parent))
            except ConfigError as error:
                refused.append(f"{gpu.name} tp {layout.tp} pp {layout.pp}: {error}")
    if not offers:
        raise ConfigError(f"nothing in {path} can serve the model:\n" + "\n".join(f"  {line}" for line in refused))
    return offers, refused


def _faults(error: ValidationError) -> list[str]:
    """A line each. Of a list with faulty entries pydantic also says that it is too short: that is not the user's fault."""
    found = error.errors()
    deepest = [e for e in found if not any(other["loc"][: len(e["loc"])] == e["loc"] != other["loc"] for other in found)]
    unknown = "unknown key; remove it or check its spelling"
    what = [unknown if e["type"] == "extra_forbidden" else f"{e['msg']} (got {e['input']!r})" for e in deepest]
    return [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {text}" for e, text in zip(deepest, what, strict=True)]


def _offer(gpu: GpuEntry, layout: Layout, model: ModelEntry, beside: Path) -> Offer:
    config = str(beside / model.config) if model.config else ""
    if gpu.profile is not None:
        cost = _profiled(gpu.profile, layout, beside)
    elif config:
        cost = read_roofline(config, gpu.name, layout.tp, layout.pp).cost_model()
    else:
        raise ConfigError("nothing says how fast it is: give `profile:`, or `model: {config: CONFIG_JSON}` for a roofline")
    token_bytes = model.kv_token_bytes or cost.kv_token_bytes
    if not token_bytes:
        raise ConfigError("nothing says how large KV is: give `model: {kv_token_bytes: …}`")
    link = gpu.link or LinkEntry(bandwidth=ByteSize(int(_network(gpu.name) or BANDWIDTH)))
    return Offer(
        gpu=gpu.name,
        layout=layout,
        cost=CostModel(cost.steps, token_bytes, cost.links, cost.fingerprint, cost.machine),
        kv_tokens=_kv_tokens(gpu, layout, model, config, token_bytes),
        link=LinkCost(link.latency, float(link.bandwidth) * layout.gpus),
        on_demand=Terms(gpu.usd_per_hour, gpu.count),
        spot=Terms(gpu.spot.usd_per_hour, gpu.spot.count, gpu.spot.interruptions_per_hour, gpu.spot.notice_s, gpu.spot.away_s)
        if gpu.spot is not None
        else None,
        step_tokens=gpu.step_tokens,
    )


def _profiled(profile: ProfileEntry, layout: Layout, beside: Path) -> CostModel:
    """Public profiles are selected by tensor parallelism, whatever they call it; a file of `tandem profile` is one layout's."""
    path = str(beside / profile.file)
    if layout.pp > 1:
        raise ConfigError("profiles are of one stage; give a roofline for pp above 1")
    try:
        return read_cost_model(path)
    except ConfigError as ours:
        first: ConfigError | None = None
        for name in PARALLEL:
            try:
                return read_gpu_profile(path, {name: str(layout.tp)} | profile.select)
            except ConfigError as error:
                first = first or error
        raise (first or ours) if Path(path).exists() else ours from None


def _kv_tokens(gpu: GpuEntry, layout: Layout, model: ModelEntry, config: str, token_bytes: int) -> int:
    """Raises ConfigError that says by how much the weights are too large."""
    if config and gpu.memory_gib is None:
        return read_roofline(config, gpu.name, layout.tp, layout.pp).kv_capacity_tokens
    memory = gpu.memory_gib * GIB if gpu.memory_gib is not None else gpu_named(gpu.name).memory_bytes
    weights = model.weights_bytes if model.weights_bytes is not None else read_shape(config).weights_bytes if config else None
    if weights is None:
        raise ConfigError("nothing says how large the weights are: give `model: {weights_bytes: …}` or `model: {config: …}`")
    room = MEMORY_SHARE * memory * layout.gpus - weights
    if room < token_bytes:
        there = f"{MEMORY_SHARE:.0%} of {layout.gpus} x {memory / 1e9:.1f} GB"
        raise ConfigError(
            f"the model does not fit: {weights / 1e9:.1f} GB of weights are {-room / 1e9:.1f} GB more than {there}; "
            "use more GPUs (tp, pp), larger ones or quantised weights"
        )
    return int(room / token_bytes)


def _network(name: str) -> float:
    """Of a GPU's adapter, where it is one of those we know; 0 otherwise."""
    try:
        return gpu_named(name).network_bytes_per_s
    except ConfigError:
        return 0.0
