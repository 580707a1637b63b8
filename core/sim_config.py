"""The `sim:` branch of the configuration: what stands in for machines when the product runs on a virtual clock."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, model_validator


class _Branch(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RooflineConfig(_Branch):
    """Steps of a model on a GPU by arithmetic alone."""

    model: str
    """Its config.json, as on the Hugging Face Hub."""
    gpu: str


class ProfileConfig(_Branch):
    """What steps cost. One of the two is given; a plain path is a `file`."""

    file: str = ""
    """Written by `tandem profile`, or a public GPU profile (`core.gpu_profile`)."""
    select: dict[str, str] = Field(default_factory=dict)
    """Which configuration of a public profile."""
    roofline: RooflineConfig | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if bool(self.file) == bool(self.roofline):
            raise ValueError("give the path of a profile or `roofline: {model: CONFIG_JSON, gpu: NAME}`, one of the two")
        return self


def _from_path(given: Any) -> Any:
    return {"file": given} if isinstance(given, str) else given


Profile = Annotated[ProfileConfig, BeforeValidator(_from_path)]


class PoolConfig(_Branch):
    role: Literal["prefill", "decode", "colocated"]
    count: int = Field(1, ge=0, le=100_000)
    gpu: str = ""
    tp: int = Field(1, ge=1, le=64)
    """GPUs that compute one layer together."""
    pp: int = Field(1, ge=1, le=64)
    """GPUs that hold the layers one after another."""
    profile: Profile | None = None
    """Of this pool; left out: `sim.profile`."""
    kv_bytes: ByteSize | None = Field(None, ge=2**16)
    """For KV on one worker; left out: `engine.kv_bytes`."""
    max_step_tokens: int | None = Field(None, ge=16)
    """Left out: `engine.max_step_tokens`."""
    usd_per_gpu_hour: float = Field(0.0, ge=0)
    market: Literal["spot", "on_demand"] = "on_demand"

    @property
    def gpus(self) -> int:
        """Of one worker."""
        return self.tp * self.pp


class LinksConfig(_Branch):
    bandwidth: ByteSize = Field(ByteSize(12_500_000_000), ge=1)
    """Bytes per second that one worker sends, and as many that it receives, shared by what passes."""
    latency: float = Field(0.0005, ge=0)
    """Seconds of a message, and of the first byte of a transfer."""


class SimSloConfig(_Branch):
    ttft_s: float | None = Field(None, gt=0)
    tbt_s: float | None = Field(None, gt=0)
    tpot_s: float | None = Field(None, gt=0)


class SimConfig(_Branch):
    profile: Profile | None = None
    pools: tuple[PoolConfig, ...] = ()
    """Left out: `cluster.prefill`, `cluster.decode` and `cluster.colocated` workers."""
    links: LinksConfig = LinksConfig()
    slo: SimSloConfig = SimSloConfig()
    """Of requests whose class says nothing else; told to the router with each of them."""
    duration_s: float | None = Field(None, gt=0)
    """Arrivals after it are left out; None: all of the trace."""
    engine: Literal["counted", "exact"] = "counted"
    """`exact`: real tokens through the shipped step loop, one step at a time: for small workloads and for finding mistakes."""
    directory: bool = False
    """Workers find each other's blocks by a directory whose word lags behind, and `store.nodes` stores of `store.dram_bytes`
    take what they offer. false: who has the longest part of a prompt is known at once, and there are no stores."""
    routers: int = Field(1, ge=1, le=64)
    start_s: float = Field(30.0, ge=0)
    """From launching a worker that takes another one's place until it is ready."""
    report_delay_s: float = Field(0.0, ge=0)
    """By which reports of workers reach the controller later than links make them."""
    notice_s: float = Field(120.0, ge=0)
    """Between the notice that a worker will be taken away and its end, for faults that do not say."""
    answer_tokens_max: int | None = Field(4096, ge=1)
    """What requests name as max_tokens, where their answers are shorter: routers must guess. None: exactly their answers'."""
    rate_rps: float = Field(0.0, ge=0)
    """Without a trace: requests per second, of `input_tokens` and `output_tokens` each; also of a trace that has lengths and no
    times."""
    arrival_cv: float = Field(1.0, ge=0)
    """Of the gaps between those, their deviation over their mean: 1 is a Poisson process, any other gamma."""
    input_tokens: int = Field(512, ge=1)
    output_tokens: int = Field(128, ge=1)
    """Also of a trace that says nothing of answers."""

    @model_validator(mode="before")
    @classmethod
    def _roofline_beside(cls, given: Any) -> Any:
        """`roofline:` may stand beside `pools:` as well as inside `profile:`."""
        if not isinstance(given, dict) or "roofline" not in given:
            return given
        if "profile" in given:
            raise ValueError("give `profile` or `roofline`, one of the two")
        return {**{key: value for key, value in given.items() if key != "roofline"}, "profile": {"roofline": given["roofline"]}}
