"""The one configuration tree: frozen, typed, loaded once. The only file that reads the environment.

Each room receives its own branch (`EngineConfig`, never `Config`). Unknown keys are refused with their path.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from core.errors import ConfigError
from core.sim_config import SimConfig

DEMO_MODEL = str(Path(__file__).resolve().parent.parent / "models" / "demo")


class _Branch(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Branch):
    path: str = DEMO_MODEL
    """A Hugging Face directory or a Hub id."""
    name: str = ""
    """Name shown to clients; empty: the last part of `path`."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    max_model_len: int | None = Field(None, ge=16)
    """Context in tokens; None: what the model advertises."""


class EngineConfig(_Branch):
    block_size: int = Field(16, ge=4, le=256)
    """Tokens per KV block."""
    kv_bytes: ByteSize = Field(ByteSize(128 * 2**20), ge=2**16)
    """Memory for KV blocks of one worker."""
    max_running: int = Field(64, ge=1, le=4096)
    """Sequences in one step."""
    max_step_tokens: int = Field(256, ge=16)
    """Tokens computed in one step: the chunk size of chunked prefill."""
    max_waiting: int = Field(1024, ge=1)
    prefix_cache: bool = True
    eviction: Literal["lru", "lfu", "cost"] = "lru"
    """Which cached blocks of a worker go first when memory is wanted; the store's is `store.policy`."""
    tenant_share: float = Field(1.0, gt=0, le=1)
    """Part of a worker's KV memory that one tenant's blocks may fill once others want it."""
    threads: int = Field(1, ge=1)
    """Torch threads of one worker. Token sequences are the same for the same number of threads."""


class TcpConfig(_Branch):
    bind: str = ""
    """Where blocks are served over raw sockets, HOST:PORT; empty: any free port of the address the worker listens on."""
    connections: int = Field(2, ge=1, le=8)
    """Of one transfer; small ones take one."""
    secret_file: str = ""
    """Known to all workers, 16 bytes or more; whoever does not hold it is turned away."""
    cert: str = ""
    """TLS with certificates on both ends, PEM files: this worker's certificate."""
    key: str = ""
    ca: str = ""
    """The authority that signed all workers' certificates, and nothing else."""


class TransferConfig(_Branch):
    transport: Literal["auto", "loopback", "shm", "grpc", "tcp", "collective"] = "auto"
    lease_s: float = Field(10.0, gt=0)
    lease_margin_s: float = Field(1.0, ge=0)
    """The puller counts its lease shorter by this much."""
    digest: bool = True
    pull_timeout_s: float = Field(30.0, gt=0)
    codec: Literal["auto", "raw", "planes", "int8"] = "raw"
    """How blocks are encoded on network links (tcp, grpc). `auto` picks the quickest that keeps every bit; `int8` does not."""
    shm_dir: str = "/dev/shm"
    tcp: TcpConfig = TcpConfig()
    collective: Literal["auto", "gloo", "nccl"] = "auto"
    """What the collective transport's groups are made of. `auto`: nccl where there is a GPU, gloo elsewhere."""


class StoreConfig(_Branch):
    """The store of the KV plane and how workers use it."""

    nodes: int = Field(1, ge=0)
    """Store nodes of the cluster; 0: workers still find each other's blocks, nothing outlives them."""
    dram_bytes: ByteSize = Field(ByteSize(256 * 2**20), ge=2**20)
    """Memory that one store node lends."""
    disk_dir: str = ""
    """Where a store node keeps blocks that memory cannot hold; empty: nowhere."""
    disk_bytes: ByteSize = Field(ByteSize(4 * 2**30), ge=2**24)
    policy: Literal["lru", "lfu", "cost"] = "lru"
    """What is evicted first."""
    tenant_share: float = Field(1.0, gt=0, le=1)
    """Part of a store node's memory, and of its disk, that one tenant's blocks may fill once others want the room.
    Workers have `engine.tenant_share`."""
    pinned_share: float = Field(0.5, ge=0, le=1)
    """Part of a node's blocks that operators may pin (`tandem kv pin`); workers keep room for the longest request besides."""
    offer: bool = True
    """Workers offer finished blocks to the store node of their host."""
    fetch: bool = True
    """Workers look for blocks elsewhere before they compute them."""
    fetch_always: bool = False
    """Fetch what can be had also where computing it is predicted to be quicker: spares compute, not time."""
    fetch_timeout_s: float = Field(1.0, gt=0)
    """How long a prompt waits for blocks from elsewhere before it is computed."""
    directory_ttl_s: float = Field(20.0, gt=0)
    """How long the directory believes in a node that does not renew its word; the controller tells it of deaths sooner."""
    directory_timeout_s: float = Field(0.25, gt=0)
    replicate_hits: int = Field(0, ge=0)
    """A block fetched so often from another host within `replicate_window_s` gets a copy in this host's store; 0: never.
    A copy that is used less often than that in five windows is given up, where somebody else has the block."""
    replicate_window_s: float = Field(60.0, gt=0)


class SloClassConfig(_Branch):
    """What requests of a class are held to, in seconds; None: no limit."""

    ttft_s: float | None = Field(None, gt=0)
    tbt_s: float | None = Field(None, gt=0)
    """For the mean of the slowest tenth of a request's token gaps."""
    tpot_s: float | None = Field(None, gt=0)
    priority: int = Field(0, ge=-(2**20), le=2**20)
    """Higher goes first; a call adds its own."""
    queue_share: float = Field(1.0, gt=0, le=1)
    """Part of the router's queue that waiting requests of this class may fill."""


class TenantConfig(_Branch):
    weight: float = Field(1.0, gt=0, le=1e6)
    """Service that is due to it, relative to others, when both wait."""
    tokens_per_s: float | None = Field(None, gt=0)
    """Quota in tokens of prompts and answers; None: none."""
    burst_tokens: float | None = Field(None, gt=0)
    """What may be used at once after a pause; None: a minute's worth of tokens_per_s."""
    slo_class: str = ""
    """Of requests that name no class; empty: router.default_class."""


_CLASSES: dict[str, dict[str, Any]] = {
    "interactive": {"ttft_s": 1.0, "tbt_s": 0.1, "priority": 10},
    "standard": {"ttft_s": 5.0, "tbt_s": 0.25},
    "batch": {"priority": -10, "queue_share": 0.5},
}


class RouterConfig(_Branch):
    grpc: str = "127.0.0.1:0"
    http: str = "127.0.0.1:0"
    share_address: bool = True
    """Of several routers (`cluster.routers`): all listen at `grpc` and `http`, and the kernel spreads connections over those of
    one host. false: each has ports of its own, counted up from these."""
    policy: str = "goodput"
    cost_model: str = ""
    """A file of `tandem profile`: what steps are believed to cost until workers have learned it."""
    hold_first_token: bool = True
    """The first token of a request that was handed over waits for the second, where the gap between them is predicted to use up
    half of the limit of gaps and there is time left until the limit of the first token."""
    stale_after_s: float = Field(3.0, gt=0)
    """A report older than this counts as one of a worker no less loaded than the others."""
    max_queue: int = Field(1024, ge=0)
    """Requests waiting for a place, beyond which new ones are refused."""
    queue: Literal["slack", "fcfs", "mlfq"] = "slack"
    """Order among the waiting requests of one class and tenant."""
    aging_s: float = Field(15.0, gt=0)
    """Who has waited longer than this gets one place in four, whatever its class and tenant."""
    admission: Literal["off", "reject"] = "off"
    """`reject`: requests that are predicted to miss their limits are refused early, with the time after which to retry."""
    classes: dict[str, SloClassConfig] = Field(default_factory=lambda: _classes({}))
    """By name; what is given is laid over the defaults `interactive`, `standard` and `batch`."""
    default_class: str = "standard"
    """Of requests that name none."""
    tenants: dict[str, TenantConfig] = Field(default_factory=dict)
    """By name; `default` takes requests that name none. Empty: requests may name any tenant, all of the same weight."""
    index_blocks_max: int = Field(1_000_000, ge=0)
    """Blocks of which the router remembers who has them, for policies that look at it; those learned first are forgotten
    beyond it. About 50 MB per million; 0: none."""
    max_attempts: int = Field(8, ge=1)
    """Placements of one request before it fails."""
    queue_timeout_s: float = Field(60.0, gt=0)
    request_timeout_s: float = Field(600.0, gt=0)
    session_lease_s: float = Field(5.0, gt=0)
    """How long a worker keeps attempts of a router it lost."""
    slow_client_s: float = Field(30.0, gt=0)
    """A client that reads nothing for this long is cancelled."""
    traces: str = ""  # where spans of requests go: http://HOST:4318/v1/traces of an OpenTelemetry collector; empty: nowhere
    max_body_bytes: ByteSize = Field(ByteSize(8 * 2**20), ge=1024)

    @field_validator("classes", mode="before")
    @classmethod
    def _over_the_defaults(cls, given: object) -> object:
        return _classes(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _classes_exist(self) -> Self:
        named = {"default_class": self.default_class}
        named |= {f"tenants.{name}.slo_class": tenant.slo_class for name, tenant in self.tenants.items() if tenant.slo_class}
        for key, name in named.items():
            if name not in self.classes:
                raise ValueError(f"{key} is {name!r}, which is not among router.classes ({', '.join(sorted(self.classes))})")
        return self


def _classes(given: dict[str, Any]) -> dict[str, Any]:
    """What is not a group of keys is left for the validation to name."""
    laid = {name: {**_CLASSES.get(name, {}), **new} if isinstance(new, dict) else new for name, new in given.items()}
    return {**{name: SloClassConfig(**fields) for name, fields in _CLASSES.items()}, **laid}


class ClusterConfig(_Branch):
    launcher: Literal["ray", "local"] = "ray"
    prefill: int = Field(1, ge=0)
    decode: int = Field(1, ge=0)
    colocated: int = Field(0, ge=0)
    routers: int = Field(1, ge=1, le=64)
    role_changes: Literal["off", "auto"] = "off"
    """`auto`: workers change sides when a router proposes it; `off`: proposals are shown, `tandem role` does it by hand."""
    autoscale: Literal["off", "auto"] = "off"
    """`auto`: workers are started and drained as their load is forecast; `prefill`, `decode`, `colocated` are the fewest."""
    autoscale_max: int = Field(8, ge=1)
    """Workers of one pool, at most."""
    autoscale_quiet_s: float = Field(60.0, gt=0)
    """How long fewer workers must have been enough before one is drained. It ends when its requests are done and nobody reads
    its blocks any more; at the latest `router.request_timeout_s` and a lease of `transfer.lease_s` later."""
    admin: str = "127.0.0.1:0"
    grace_s: float = Field(10.0, ge=0)
    heartbeat_s: float = Field(2.0, gt=0)
    """The longest silence of a process that lives; changes are reported sooner. Left out, it follows a short dead_after_s."""
    dead_after_s: float = Field(5.0, gt=0)
    start_timeout_s: float = Field(120.0, gt=0)
    ray_address: str = ""
    """Empty: start a local Ray; otherwise join this cluster."""
    object_store_bytes: ByteSize = Field(ByteSize(80 * 2**20), ge=75 * 2**20)
    """Object store of a local Ray. Nothing of ours travels through it; Ray refuses less than 75 MiB."""

    @model_validator(mode="before")
    @classmethod
    def _heartbeats_fit(cls, given: object) -> object:
        if not isinstance(given, dict) or "heartbeat_s" in given or not isinstance(given.get("dead_after_s"), int | float):
            return given
        return {**given, "heartbeat_s": min(2.0, 0.4 * given["dead_after_s"])}

    @model_validator(mode="after")
    def _silence_is_longer_than_a_heartbeat(self) -> Self:
        if self.dead_after_s < 2 * self.heartbeat_s:
            raise ValueError(f"dead_after_s ({self.dead_after_s:g}) must be at least twice heartbeat_s ({self.heartbeat_s:g})")
        return self


class Config(_Branch):
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    transfer: TransferConfig = TransferConfig()
    store: StoreConfig = StoreConfig()
    router: RouterConfig = RouterConfig()
    cluster: ClusterConfig = ClusterConfig()
    sim: SimConfig = SimConfig()
    redis: str = ""
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def load(path: str | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads a YAML file and lays `overrides` ("engine.threads": 2) over it.

    Raises ConfigError naming every unknown key and bad value with its path and, for malformed YAML, the line.
    """
    tree = _read(path) if path else {}
    for dotted, value in (overrides or {}).items():
        _set(tree, dotted.split("."), value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {_explain(e)}" for e in error.errors()]
        where = f" in {path}" if path else ""
        raise ConfigError(f"the configuration{where} cannot be used:\n" + "\n".join(lines)) from None


def prepare_grpc() -> None:
    """Tells gRPC not to prepare for forks that continue without exec, which we never do. Call before `import grpc`."""
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"


def prepare_ray(token: str) -> None:
    """Sets what Ray reads from the environment; call before `import ray`.

    Usage statistics stay off, every log line reaches the driver, and a Ray of our own listens on loopback alone and
    serves nobody without `token`, because whoever may submit a task runs code as us. An empty token (joining a
    cluster) leaves its own settings as they are.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_DEDUP_LOGS"] = "0"
    os.environ["RAY_DISABLE_WORKER_LOG_PREFIX"] = "1"  # our lines carry the worker's name
    os.environ["RAY_COLOR_PREFIX"] = "0"
    os.environ["RAY_SCHEDULER_EVENTS"] = "0"
    if token:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # without it Ray binds every interface
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = token
        os.environ.pop("RAY_ADDRESS", None)  # an address left over from another cluster must not be joined


def pin_threads(threads: int) -> None:
    """Threads of OpenMP pools made later in this process, the same whatever launched it."""
    os.environ["OMP_NUM_THREADS"] = str(threads)


def state_dir() -> Path:
    """Where running clusters of this user leave their addresses; made for its owner alone when missing."""
    path = Path(tempfile.gettempdir()) / f"tandem-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to somebody else; remove it or set TMPDIR to a directory of yours")
    return path


def hub_token() -> str | None:
    """Credential for private models on the Hub."""
    return os.environ.get("HF_TOKEN") or None


def _read(path: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values at the top, found {type(tree).__name__}")
    return tree


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        branch = tree.setdefault(key, {})
        if not isinstance(branch, dict):
            raise ConfigError(f"{key} must be a group of keys, found {branch!r}")
        tree = branch
    tree[keys[-1]] = value


def _explain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key; remove it or check its spelling"
    return f"{error['msg']} (got {error['input']!r})"
