"""The native kernels against torch in double precision, their independence of company and threads, and no compiler."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine import native
from engine.linear import NativeLinear, choose_path
from engine.native import Kernels, load_kernels


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    built = load_kernels()
    if built is None:
        pytest.skip("no C++ compiler on this machine")
    return built


@pytest.fixture
def fresh() -> Iterator[None]:
    """The loader forgets what it knows, before and after."""
    native.load_kernels.cache_clear()
    yield
    native.load_kernels.cache_clear()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "inside", "outside"), [(1, 64, 64), (7, 33, 100), (40, 96, 61), (2, 1, 1), (17, 384, 640)])
def test_products(kernels: Kernels, stored: str, rows: int, inside: int, outside: int) -> None:
    weight, x, bias = random(outside, inside).to(getattr(torch, stored)), random(rows, inside, seed=1), random(outside, seed=2)
    other = random(rows, outside, seed=3)
    linear = NativeLinear(kernels, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    for mine, expected in (
        (linear(x), exact),
        (linear.silu(x), F.silu(exact)),
        (linear.add(x, other), exact + other),
        (linear.mul(x, other), exact * other),
    ):
        torch.testing.assert_close(mine.double(), expected, atol=1e-4, rtol=1e-4)


def test_weights_that_are_bfloat16_numbers_lose_nothing(kernels: Kernels) -> None:
    weight, x = random(70, 48).bfloat16().float(), random(5, 48, seed=1)
    narrow, wide = NativeLinear(kernels, weight, None), NativeLinear(kernels, weight + 2**-20, None)
    assert narrow._weight.dtype is torch.bfloat16
    assert wide._weight.dtype is torch.float32
    torch.testing.assert_close(narrow(x).double(), F.linear(x.double(), weight.double()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_row_is_the_same_bits_in_any_company(kernels: Kernels, stored: str) -> None:
    linear, x = NativeLinear(kernels, random(150, 200).to(getattr(torch, stored)), None), random(64, 200, seed=1)
    whole = linear.silu(x)
    for rows in (*range(1, 20), 33, 63):
        assert torch.equal(linear.silu(x[64 - rows :].contiguous()), whole[64 - rows :]), rows


def test_threads_change_no_bit(kernels: Kernels) -> None:
    x, weight = random(30, 200), random(150, 200, seed=1)
    one = NativeLinear(kernels, weight, None)(x)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = NativeLinear(kernels, weight, None)(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


@pytest.mark.parametrize("width", [16, 31, 96, 200])
def test_norm(kernels: Kernels, width: int) -> None:
    x, weight = random(6, width) * 3, random(width, seed=1)
    expected = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    torch.testing.assert_close(kernels.norm(x, weight, 1e-5).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_torch_takes_over(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert load_kernels() is None
    assert "no C++ compiler found; install one of g++" in caplog.text
    monkeypatch.setattr("engine.linear.load_kernels", lambda: None)
    assert choose_path([(48, 16)], torch.float32).kernels is None


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("failure", ["broken", "slow"])
def test_a_failing_build_is_told_and_survived(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, failure: str
) -> None:
    def run(command: list[str]) -> None:
        if failure == "slow":
            raise subprocess.TimeoutExpired(command, 120.0)
        raise subprocess.CalledProcessError(1, command, stderr="kernels.cpp:1: error: this compiler is too old\n")

    monkeypatch.setattr(native, "_cache_folder", lambda: tmp_path)
    monkeypatch.setattr(native, "_run", run)
    assert load_kernels() is None
    assert "running without native kernels" in caplog.text
    assert ("too old" if failure == "broken" else "timed out") in caplog.text
    assert list(tmp_path.glob("*.so")) == []


@pytest.mark.usefixtures("fresh")
def test_a_build_is_kept_for_the_next_worker(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_cache_folder", lambda: tmp_path)
    assert load_kernels() is not None
    assert len(list(tmp_path.glob("*.so"))) == 1
    monkeypatch.setattr(native, "_run", lambda command: pytest.fail("built twice"))
    native.load_kernels.cache_clear()
    assert load_kernels() is not None
