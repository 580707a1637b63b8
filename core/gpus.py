"""What GPUs can do on paper, for `core.roofline`. Deciding code.

Peaks are the vendors' data sheets: dense tensor-core rates (no sparsity), memory bandwidth, one direction of the link to the
GPUs of the same node, the network adapter per GPU of the usual server (0: none). For A100, H100 and H200 they agree with
`system_specs.json` of NVIDIA's aiconfigurator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from core.errors import ConfigError

_T = 1e12
_G = 1e9
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """`flops`: operations per second by dtype ("bfloat16" stands for float16 too). Bandwidths in bytes per second, one way.
    `tdp_w`: of one GPU, its share of the server left out. `sustained`: what the board's power limit leaves of the peak under a
    steady load; half on the 70 W boards, by Helix's measurements of Llama prompts on L4 and T4."""

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    flops: Mapping[str, float]
    link_bytes_per_s: float
    network_bytes_per_s: float
    gpus_per_node: int
    tdp_w: float
    sustained: float = 1.0

    def flops_of(self, dtype: str) -> float:
        """A GPU without 8-bit units multiplies in 16 bits; its weights are still read in 8."""
        return self.sustained * self.flops.get(dtype, self.flops["bfloat16"])


def _gpu(
    name: str,
    gib: int,
    gb_per_s: float,
    tflops: Mapping[str, float],
    link: float,
    network: float,
    node: int,
    tdp_w: float,
    sustained: float = 1.0,
) -> Gpu:
    rates = MappingProxyType({dtype: rate * _T for dtype, rate in tflops.items()})
    return Gpu(name, gib * _GIB, gb_per_s * _G, rates, link * _G, network * _G, node, tdp_w, sustained)


_A100 = {"bfloat16": 312, "float32": 19.5, "int8": 624}
_H100 = {"bfloat16": 989, "float32": 67, "int8": 1979, "fp8": 1979}
_BLACKWELL = {"bfloat16": 2250, "float32": 80, "int8": 4500, "fp8": 4500}
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            _gpu("a100-80g", 80, 2039, _A100, 300, 25, 8, 400),
            _gpu("a100-40g", 40, 1555, _A100, 300, 25, 8, 400),
            _gpu("a800-80g", 80, 2039, _A100, 200, 25, 8, 400),
            _gpu("h100-80g", 80, 3350, _H100, 450, 50, 8, 700),
            _gpu("h800-80g", 80, 3350, _H100, 200, 50, 8, 700),
            _gpu("h200-141g", 141, 4800, _H100, 450, 50, 8, 700),
            _gpu("b200-180g", 180, 7700, _BLACKWELL, 900, 50, 8, 1000),
            _gpu("l4-24g", 24, 300, {"bfloat16": 121, "float32": 30, "int8": 242, "fp8": 242}, 32, 12.5, 8, 72, 0.5),
            _gpu("l40s-48g", 48, 864, {"bfloat16": 362, "float32": 91, "int8": 733, "fp8": 733}, 32, 12.5, 8, 350),
            _gpu("a10g-24g", 24, 600, {"bfloat16": 70, "float32": 35, "int8": 140}, 32, 12.5, 4, 300),
            _gpu("v100-16g", 16, 900, {"bfloat16": 125, "float32": 15.7}, 150, 3.125, 8, 300),
            _gpu("v100-32g", 32, 900, {"bfloat16": 125, "float32": 15.7}, 150, 3.125, 8, 300),
            _gpu("t4-16g", 16, 300, {"bfloat16": 65, "float32": 8.1, "int8": 130}, 16, 6.25, 4, 70, 0.5),
        )
    }
)
_ALIASES = {
    "a100": "a100-80g",
    "a100-sxm": "a100-80g",
    "a100-80gb": "a100-80g",
    "a100-40gb": "a100-40g",
    "a800": "a800-80g",
    "h100": "h100-80g",
    "h100-sxm": "h100-80g",
    "h100-80gb": "h100-80g",
    "h800": "h800-80g",
    "h200": "h200-141g",
    "h200-sxm": "h200-141g",
    "b200": "b200-180g",
    "b200-sxm": "b200-180g",
    "l4": "l4-24g",
    "l40s": "l40s-48g",
    "a10g": "a10g-24g",
    "v100": "v100-16g",
    "t4": "t4-16g",
}


def gpu_named(name: str) -> Gpu:
    """Case and underscores do not matter ("H100_SXM", "a100-80gb"). Raises ConfigError that names all there are."""
    plain = name.strip().lower().replace("_", "-").removeprefix("nvidia-")
    plain = _ALIASES.get(plain, plain)
    if plain not in GPUS:
        raise ConfigError(f"no GPU named {name!r} is known; choose one of {', '.join(sorted(GPUS))}")
    return GPUS[plain]
