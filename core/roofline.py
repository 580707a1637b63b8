"""How long a step takes on a GPU nobody has measured: the roofline of a model's shape and a GPU's data sheet. Deciding code.

Each matrix product takes what its operations or its bytes take, whichever is longer (Williams et al., CACM 2009; LLM-Viewer,
arXiv:2402.16363, does the same for transformers); attention of prompts counts operations, of decodes the bytes of KV; tensor
parallelism adds two ring all-reduces a layer, pipeline parallelism a hand-over per stage. How much of a peak is reached in
practice is in `Efficiency`, with its source; `benchmarks/simulator_roofline.py` says how far that is from measured engines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from core.cost_fit import fit_steps
from core.cost_model import CostModel, LinkCost, StepShape, pairs
from core.errors import ConfigError
from core.gpus import Gpu
from core.model_shape import ModelShape

MEMORY_SHARE = 0.9
"""Of a GPU's memory that an engine takes, as vLLM's default."""
ACTIVATION_TOKENS = 8192
"""Tokens of a step whose activations must have room beside weights and KV."""
NETWORK_LATENCY_S = 20e-6
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of peaks that are reached, and times that no peak explains. `source` says how they were found.

    `gemm_…`: of operations per second in matrix products with 16- and 8-bit weights; `weights_…`: of memory bandwidth while
    weights are read; `kv`: while KV is; `attention`: of operations in a prompt's attention; `link`: of a link's bandwidth.
    `layer_s`, `step_s`, `row_s`: launches, small kernels and the host's work per layer, step and decoding row.
    """

    name: str
    gemm_16: float
    gemm_8: float
    weights_16: float
    weights_8: float
    attention: float
    kv: float
    link: float
    allreduce_s: float
    layer_s: float
    step_s: float
    row_s: float
    source: str


ENGINES: Mapping[str, Efficiency] = MappingProxyType(
    {
        each.name: each
        for each in (
            Efficiency(
                name="graphs",
                gemm_16=0.80,
                gemm_8=0.40,
                weights_16=0.75,
                weights_8=0.94,
                attention=0.55,
                kv=0.85,
                link=0.75,
                allreduce_s=7e-6,
                layer_s=100e-6,
                step_s=0.1e-3,
                row_s=15e-6,
                source="engines that replay CUDA graphs. 16-bit shares, attention, links, all-reduce: medians of NVIDIA's "
                "kernel timings for vLLM on A100, H100 and H200 (aiconfigurator: products of at least 2 x 10^7 weights, "
                "attention from 2,048 tokens on). 8-bit shares and times per layer and row: fitted to Dynamo's sweeps of vLLM "
                "0.10 with Llama-3.3-70B-FP8 on eight H100 and Llama-3.1-8B-FP8 on one H200",
            ),
            Efficiency(
                name="eager",
                gemm_16=0.65,
                gemm_8=0.45,
                weights_16=0.93,
                weights_8=0.93,
                attention=0.12,
                kv=0.40,
                link=0.23,
                allreduce_s=15e-6,
                layer_s=183e-6,
                step_s=1e-3,
                row_s=287e-6,
                source="engines of 2023 that launch every kernel from Python: fitted to Splitwise's Llama-2-70B on "
                "two, four and eight H100",
            ),
        )
    }
)


@dataclass(frozen=True, slots=True)
class Roofline:
    """One replica over `tp` × `pp` GPUs. Times in seconds. Raises ConfigError when the model cannot be split like that."""

    shape: ModelShape
    gpu: Gpu
    tp: int = 1
    pp: int = 1
    efficiency: Efficiency = ENGINES["graphs"]
    _rates: _Rates = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tp < 1 or self.shape.heads % self.tp:
            raise ConfigError(f"tp {self.tp} does not divide the {self.shape.heads} attention heads of {self.shape.name}")
        if not 1 <= self.pp <= self.shape.layers:
            raise ConfigError(f"pp {self.pp} is not between 1 and the {self.shape.layers} layers of {self.shape.name}")
        object.__setattr__(self, "_rates", _rates(self))

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def prefill_s(self, new_tokens: int, context: int = 0, chunk_tokens: int = 0) -> float:
        """A prompt alone: `new_tokens` behind `context` cached ones, in chunks of `chunk_tokens` (0: in one)."""
        size = chunk_tokens or new_tokens
        starts = range(0, new_tokens, size) if new_tokens > 0 else ()
        chunks = [(min(size, new_tokens - start), context + start) for start in starts]
        return math.fsum(self.step_s(StepShape(count, pairs(count, before))) for count, before in chunks)

    def decode_s(self, rows: int, context: int) -> float:
        """One step of `rows` sequences that hold `context` tokens together."""
        return self.step_s(StepShape(decode_rows=rows, decode_context=context))

    def step_s(self, shape: StepShape) -> float:
        """From entering the first stage to leaving the last."""
        tokens = shape.prefill_tokens + shape.decode_rows
        if not tokens:
            return 0.0
        between = (self.pp - 1) * (self.efficiency.allreduce_s + tokens * self._rates.stage_s)
        return self.shape.layers * self._layer_s(shape) + between + self._head_s(shape)

    def stage_s(self, shape: StepShape) -> float:
        """Between two batches that leave a pipeline kept full: the busiest stage's time."""
        layers = math.ceil(self.shape.layers / self.pp)
        return layers * self._layer_s(shape) + self._head_s(shape)

    def allreduce_s(self, num_bytes: float) -> float:
        """A ring over `tp` GPUs: each byte crosses a link 2 (tp − 1) / tp times (Patarasuk and Yuan, 2009)."""
        if self.tp == 1:
            return 0.0
        inside = self.tp <= self.gpu.gpus_per_node
        link = self.efficiency.link * (self.gpu.link_bytes_per_s if inside else self.gpu.network_bytes_per_s)
        return self.efficiency.allreduce_s + 2 * (self.tp - 1) / self.tp * num_bytes / link

    @property
    def weights_gpu_bytes(self) -> int:
        return math.ceil(self.shape.weights_bytes / self.gpus)

    @property
    def kv_gpu_token_bytes(self) -> float:
        """KV that one GPU holds of one token: its stage's layers, and its heads, at least one; of MLA all."""
        whole = self.shape.kv_token_bytes * math.ceil(self.shape.layers / self.pp) / self.shape.layers
        if self.shape.latent is not None:
            return whole
        return whole * math.ceil(self.shape.kv_heads / self.tp) / self.shape.kv_heads

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens whose KV has room beside weights and activations. Raises ConfigError that says how much is missing."""
        activations = ACTIVATION_TOKENS * (4 * self.shape.hidden + 2 * self.shape.ffn / self.tp) * self.shape.value_bytes
        room = MEMORY_SHARE * self.gpu.memory_bytes - self.weights_gpu_bytes - activations
        if room < self.kv_gpu_token_bytes:
            raise ConfigError(
                f"{self.shape.name} does not fit on {self.gpus} x {self.gpu.name} (tp {self.tp}, pp {self.pp}): "
                f"{self.weights_gpu_bytes / _GB:.1f} GB of weights and {activations / _GB:.1f} GB of activations per GPU are "
                f"{-room / _GB:.1f} GB more than {MEMORY_SHARE:.0%} of its {self.gpu.memory_bytes / _GB:.1f} GB; "
                "use more GPUs (tp, pp), larger ones or quantised weights"
            )
        return int(room / self.kv_gpu_token_bytes)

    def check_fits(self, tokens: int) -> None:
        """Raises ConfigError unless KV of so many tokens has room; says how many have."""
        if (capacity := self.kv_capacity_tokens) < tokens:
            missing = (tokens - capacity) * self.kv_gpu_token_bytes / _GB
            raise ConfigError(
                f"{self.gpus} x {self.gpu.name} hold KV of {capacity} tokens of {self.shape.name}, not of {tokens}: "
                f"{missing:.1f} GB per GPU are missing; use more GPUs or a shorter context"
            )

    def cost_model(self) -> CostModel:
        """The linear model nearest to this roofline, for whatever takes one; `median_error` and `p90_error` are against it."""
        samples = [(shape, self.step_s(shape)) for shape in _shapes(min(self.kv_capacity_tokens, 2**20))]
        fit = fit_steps(samples)
        network = LinkCost(NETWORK_LATENCY_S, self.efficiency.link * self.gpu.network_bytes_per_s * self.gpus)
        local = LinkCost(NETWORK_LATENCY_S, self.efficiency.link * self.gpu.link_bytes_per_s * self.gpus)
        links = {name: network for name in ("tcp", "grpc", "collective") if self.gpu.network_bytes_per_s}
        return CostModel(
            steps=fit.cost,
            kv_token_bytes=self.shape.kv_token_bytes,
            links=MappingProxyType(links | {"shm": local}),
            machine=f"roofline: {self.shape.name} on {self.gpu.name}, tp {self.tp}, pp {self.pp}",
            samples=fit.samples,
            median_error=fit.median_error,
            p90_error=fit.p90_error,
        )

    def _layer_s(self, shape: StepShape) -> float:
        """The mean layer's time on one GPU of its stage."""
        tokens, rate = shape.prefill_tokens + shape.decode_rows, self._rates
        attention = max(tokens * rate.attention_compute_s, rate.attention_read_s)
        attention += shape.prefill_pairs * rate.pair_s + shape.decode_context * rate.context_s
        return attention + self._ffn_s(tokens) + tokens * rate.reduce_s + rate.fixed_s

    def _ffn_s(self, tokens: int) -> float:
        """Of a mixture, each token computes `per_token` experts; weights are read of those that any token takes."""
        rate, experts = self._rates, self.shape.experts
        dense = max(tokens * rate.ffn_compute_s, rate.ffn_read_s)
        if experts is None:
            return dense
        touched = experts.count * (1 - (1 - experts.per_token / experts.count) ** tokens)
        mixed = max(tokens * rate.mixed_compute_s, touched * rate.expert_read_s + rate.shared_read_s)
        return rate.mixed_share * mixed + (1 - rate.mixed_share) * dense

    def _head_s(self, shape: StepShape) -> float:
        """Logits of each decoding row and of one prompt's last token; and what the host does."""
        rows, rate = shape.decode_rows + (1 if shape.prefill_tokens else 0), self._rates
        host = self.efficiency.step_s + self.efficiency.row_s * shape.decode_rows
        return max(rows * rate.head_compute_s, rate.head_read_s) + host


@dataclass(frozen=True, slots=True)
class _Rates:
    """Seconds per token, per query–key pair or per read of all weights, of one layer (of all for the head) on one GPU."""

    attention_compute_s: float
    attention_read_s: float
    ffn_compute_s: float
    ffn_read_s: float
    mixed_compute_s: float
    expert_read_s: float
    shared_read_s: float
    mixed_share: float
    head_compute_s: float
    head_read_s: float
    pair_s: float
    context_s: float
    reduce_s: float
    fixed_s: float
    stage_s: float


def _rates(roofline: Roofline) -> _Rates:
    shape, gpu, engine, tp = roofline.shape, roofline.gpu, roofline.efficiency, roofline.tp
    stored = shape.weight_dtype if shape.weight_dtype in gpu.flops else shape.dtype
    narrow = gpu.flops_of(stored) > gpu.flops_of("bfloat16")
    product = 2 / tp / (gpu.flops_of(stored) * (engine.gemm_8 if narrow else engine.gemm_16))
    stream = gpu.memory_bytes_per_s * (engine.weights_8 if shape.weight_bytes_each < 2 else engine.weights_16)
    read = shape.weight_bytes_each / tp / stream
    wide = gpu.flops_of(shape.dtype)
    pair = 4 * shape.attention_dim / tp / (wide * engine.attention)
    kv_bytes = roofline.kv_gpu_token_bytes / math.ceil(shape.layers / roofline.pp)
    experts, ffn = shape.experts, shape.ffn_params(shape.ffn)
    one, shared = (shape.ffn_params(experts.ffn), shape.ffn_params(experts.shared_ffn)) if experts else (0, 0)
    head = shape.vocab * shape.hidden / tp
    hidden_bytes = shape.hidden * shape.value_bytes
    first_byte_s = roofline.allreduce_s(0)
    inside = roofline.gpus <= gpu.gpus_per_node or not gpu.network_bytes_per_s
    return _Rates(
        attention_compute_s=shape.attention_params * product,
        attention_read_s=shape.attention_params * read,
        ffn_compute_s=ffn * product,
        ffn_read_s=ffn * read,
        mixed_compute_s=(one * experts.per_token + shared) * product if experts else 0.0,
        expert_read_s=one * read,
        shared_read_s=shared * read,
        mixed_share=shape.moe_layers / shape.layers,
        head_compute_s=2 * head / (wide * engine.gemm_16),
        head_read_s=head * shape.value_bytes / (gpu.memory_bytes_per_s * engine.weights_16),
        pair_s=pair,
        context_s=max(pair, kv_bytes / (gpu.memory_bytes_per_s * engine.kv)),
        reduce_s=2 * (roofline.allreduce_s(hidden_bytes) - first_byte_s),
        fixed_s=2 * first_byte_s + engine.layer_s,
        stage_s=hidden_bytes / (engine.link * (gpu.link_bytes_per_s if inside else gpu.network_bytes_per_s)),
    )


def _shapes(capacity_tokens: int) -> list[StepShape]:
    """Steps as serving has them: prompts, decodes, both together."""
    prompts = [StepShape(n, pairs(n, before)) for n in (128, 256, 512, 1024, 2048, 4096, 8192) for before in (0, 4096)]
    decodes = [
        StepShape(0, 0, rows, rows * length)
        for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256)
        for length in (128, 512, 2048, 8192)
        if rows * length <= capacity_tokens
    ]
    mixed = [prompt + decode for prompt in prompts[2:8] for decode in decodes[::5]]
    return prompts + decodes + mixed
