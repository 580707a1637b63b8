"""Matrix products whose rows come out bit-equal whatever the number of rows beside them.

A library picks its kernel by shape, and another kernel sums in another order: a row of a product over 1 row and the same
row of a product over 64 may differ in the last bit, and about once in 10^5 tokens that is another token. Which products are
invariant depends on processor, library and threads, so it is measured at start, on the model's own shapes: the
first of `PATHS` that holds with the fewest padding rows is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.native import ADD, MUL, PLAIN, SILU, Kernels, load_kernels

_log = logging.getLogger(__name__)
_ROW_MULTIPLES = (2, 4, 8, 16)
_CHECKED_TILES = (1, 2, 3, 4, 5, 8)
_CHECKED_ROWS = (64, 128, 256)


class Linear(Protocol):
    """`x @ weight.T + bias` for x `[rows, in]`; rows a multiple of the path's `row_multiple`."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def silu(self, x: Tensor) -> Tensor: ...

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """`self(x) + other`, in one pass where the library can."""
        ...

    def mul(self, x: Tensor, other: Tensor) -> Tensor:
        """`self(x) * other`, likewise."""
        ...


class NativeLinear:
    """Our own kernel: sums in the order of `in`, whatever the rows. Weights that are bf16 numbers are kept in bf16."""

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None) -> None:
        self._out, self._in = weight.shape
        half = weight if weight.dtype is torch.bfloat16 else weight.bfloat16()
        exact = weight.dtype is torch.bfloat16 or bool(torch.equal(half.to(weight.dtype), weight))
        self._weight = _panels(half if exact else weight.float(), kernels.panel)
        self._bias = None if bias is None else bias.float().contiguous()
        self._bias_data = None if self._bias is None else self._bias.data_ptr()
        self._half, self._threads, self._run = int(exact), torch.get_num_threads(), kernels.linear

    def __call__(self, x: Tensor) -> Tensor:
        return self._call(x, PLAIN, None)

    def silu(self, x: Tensor) -> Tensor:
        return self._call(x, SILU, None)

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        return self._call(x, ADD, other)

    def mul(self, x: Tensor, other: Tensor) -> Tensor:
        return self._call(x, MUL, other)

    def _call(self, x: Tensor, mode: int, other: Tensor | None) -> Tensor:
        rows = x.shape[0]
        out = torch.empty(rows, self._out)
        beside = None if other is None else other.data_ptr()
        failed = self._run(
            x.data_ptr(), self._weight.data_ptr(), self._half, self._bias_data, beside, out.data_ptr(), mode, rows,
            self._in, self._out, self._threads,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory to multiply {rows} rows")
        return out


def _panels(weight: Tensor, panel: int) -> Tensor:
    """[out, in] as [panels, in, panel], the last panel filled up with zeros: a panel's weights are read front to back."""
    count = -(-weight.shape[0] // panel)
    padded = weight.new_zeros(count * panel, weight.shape[1])
    padded[: weight.shape[0]] = weight
    return padded.view(count, panel, -1).transpose(1, 2).contiguous()


class PackedLinear:
    """oneDNN with the weight reordered once: its kernel follows from the weight, hardly from the rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        ops: Any = torch.ops.mkldnn
        self._weight: Tensor = ops._reorder_linear_weight(weight.contiguous(), None)
        self._bias = bias
        self._unary = ops._linear_pointwise.default
        self._binary = ops._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self._unary(x, self._weight, self._bias, "none", [], "")
        return result

    def silu(self, x: Tensor) -> Tensor:
        result: Tensor = self._unary(x, self._weight, self._bias, "swish", [], "")
        return result

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        result: Tensor = self._binary(x, other, self._weight, self._bias, "add")
        return result

    def mul(self, x: Tensor, other: Tensor) -> Tensor:
        result: Tensor = self._binary(x, other, self._weight, self._bias, "mul")
        return result


class PlainLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight.contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(F.linear(x, self._weight, self._bias), inplace=True)

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias).add_(other)

    def mul(self, x: Tensor, other: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias).mul_(other)


@dataclass(frozen=True, slots=True)
class LinearPath:
    """How products are made, on tensors of `dtype`, with rows padded to a multiple of `row_multiple`.

    `invariant` is False when no way was found whose rows are independent; `kernels` are set where ours are used.
    """

    name: str
    make: Callable[[Tensor, Tensor | None], Linear]
    dtype: torch.dtype
    row_multiple: int
    invariant: bool
    kernels: Kernels | None = None

    def padded(self, rows: int) -> int:
        """Rows to compute for `rows` wanted. Coarser for many rows, since each new count costs the library a new kernel."""
        step = self.row_multiple if rows <= 32 else max(16, self.row_multiple)
        return -(-rows // step) * step


PATHS: tuple[tuple[str, Callable[[Tensor, Tensor | None], Linear]], ...] = (
    ("onednn-packed", PackedLinear),
    ("plain", PlainLinear),
)


def choose_path(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> LinearPath:
    """Our kernels where they can be built, except for bf16 on processors that multiply bf16 themselves; else the first
    path of `PATHS` that is invariant for all `(out, in)` shapes; as a last resort the first one that runs at all.
    """
    kernels = None if dtype is torch.bfloat16 and _multiplies_bfloat16() else load_kernels()
    if kernels is not None:
        _log.info("products and attention run on our own kernels, batch-invariant by construction")
        return LinearPath("native", partial(NativeLinear, kernels), torch.float32, 1, True, kernels)
    return _measured_path(tuple(dict.fromkeys(shapes)), dtype, torch.get_num_threads())


@cache
def _measured_path(shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, threads: int) -> LinearPath:
    usable: list[tuple[str, Callable[[Tensor, Tensor | None], Linear]]] = []
    for name, make in PATHS:
        try:
            found = _fewest_rows(make, shapes, dtype)
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            _log.info("linear path %s is not available here: %s", name, error)
            continue
        usable.append((name, make))
        if found is not None:
            _log.info("linear path %s is batch-invariant with rows padded to a multiple of %d", name, found)
            return LinearPath(name, make, dtype, found, True)
    _log.warning(
        "no batch-invariant matrix product was found for %s with %d threads on this processor: "
        "the same request may get another token when the batch beside it differs",
        dtype,
        threads,
    )
    name, make = usable[0] if usable else PATHS[-1]
    return LinearPath(name, make, dtype, 4, False)


def _multiplies_bfloat16() -> bool:
    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def _fewest_rows(
    make: Callable[[Tensor, Tensor | None], Linear], shapes: Sequence[tuple[int, int]], dtype: torch.dtype
) -> int | None:
    generator = torch.Generator().manual_seed(0)
    candidates = list(_ROW_MULTIPLES)
    for out_features, in_features in shapes:
        weight = torch.randn(out_features, in_features, generator=generator).mul_(in_features**-0.5).to(dtype)
        x = torch.randn(max(_CHECKED_ROWS), in_features, generator=generator).to(dtype)
        equal = _equal_rows(make(weight, None), x, {m * t for m in candidates for t in _CHECKED_TILES} | set(_CHECKED_ROWS))
        candidates = [m for m in candidates if all(equal[r] for r in (*(m * t for t in _CHECKED_TILES), *_CHECKED_ROWS))]
        if not candidates:
            return None
    return candidates[0]


def _equal_rows(linear: Linear, x: Tensor, counts: set[int]) -> dict[int, bool]:
    """For each count: are the first `count` rows the same bits as when all of `x` is computed?"""
    plain, silu = linear(x), linear.silu(x)
    added, multiplied = linear.add(x, silu), linear.mul(x, silu)
    equal = {}
    for rows in sorted(counts):
        part, beside = x[:rows].clone(), silu[:rows].clone()
        equal[rows] = (
            torch.equal(linear(part), plain[:rows])
            and torch.equal(linear.silu(part), silu[:rows])
            and torch.equal(linear.add(part, beside), added[:rows])
            and torch.equal(linear.mul(part, beside), multiplied[:rows])
        )
    return equal
