"""Measured tables as step times: between the points, beyond them, and what a damaged file says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.cost_model import StepShape, pairs
from core.errors import ConfigError
from core.gpu_profile import read_profile_table
from core.profile_table import Curve, Lookup, ProfileTable

BLOOM = str(Path(__file__).parents[2] / "data/splitwise/perf_model_bloom.csv")
WANTED = {"model": "bloom-176b", "hardware": "h100-80gb", "tensor_parallel": "8"}
TABLE = ProfileTable(Curve((100, 200), (1.0, 3.0)), Curve((10, 20), (0.5, 0.7)), 100)


def test_lines_between_and_beyond_points() -> None:
    curve = Curve.of([(10, 1.0), (20, 2.0), (10, 3.0), (10, 2.5), (40, 4.0)])
    assert (curve.xs, curve.ys) == ((10, 20, 40), (2.5, 2.0, 4.0))
    assert [curve(x) for x in (0, 10, 15, 30, 40, 50)] == pytest.approx([3.0, 2.5, 2.25, 3.0, 4.0, 5.0])


@pytest.mark.parametrize("points", [[], [(1.0, 1.0)], [(1.0, 1.0), (1.0, 2.0)]])
def test_one_point_makes_no_curve(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="two or more points"):
        Curve.of(points)


@given(points=st.dictionaries(st.integers(0, 10_000), st.floats(0.001, 10), min_size=2, max_size=20), share=st.floats(0, 1))
def test_a_curve_passes_through_its_points_and_between_them(points: dict[int, float], share: float) -> None:
    curve = Curve.of(points.items())
    for x, y in points.items():
        assert curve(x) == pytest.approx(y)
    (x0, x1), (y0, y1) = curve.xs[:2], curve.ys[:2]
    assert min(y0, y1) - 1e-9 <= curve(x0 + share * (x1 - x0)) <= max(y0, y1) + 1e-9


@pytest.mark.parametrize(
    ("step", "seconds"),
    [
        (StepShape(), 0.0),
        (StepShape(150, pairs(150, 0)), 2.0),
        (StepShape(decode_rows=15, decode_context=9000), 0.6),
        (StepShape(140, pairs(140, 0), 10, 9000), 1.1 * 2.0),
    ],
)
def test_steps_as_splitwise_charges_them(step: StepShape, seconds: float) -> None:
    assert TABLE.step_s(step) == pytest.approx(seconds)


def test_by_context_a_decode_costs_what_it_holds() -> None:
    by_context = ProfileTable(TABLE.prompt, TABLE.token, 100, Lookup.CONTEXT)
    assert by_context.decode_s(1, 20) == pytest.approx(0.7)
    assert TABLE.decode_s(1, 20) == pytest.approx(0.32)


def test_a_prompt_in_chunks() -> None:
    assert TABLE.prefill_s(250, chunk_tokens=100) == pytest.approx(1.0 + 1.0 + 0.0)
    assert TABLE.prefill_s(0) == 0.0


def test_a_published_file() -> None:
    """Medians, in ms, over all runs of so many prompt tokens, one long prompt or a batch of short ones."""
    table = read_profile_table(BLOOM, WANTED, Lookup.CONTEXT)
    assert [round(1e3 * table.prefill_s(n), 1) for n in (512, 8192)] == [76.1, 1411.6]
    assert table.kv_token_bytes == 4_014_080


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"other\.csv has no points to interpolate between"):
        read_profile_table(str(tmp_path / "other.csv"), {})
    with pytest.raises(ConfigError, match=r"2 configurations that fit .*hardware=a100-80gb"):
        read_profile_table(BLOOM, {"model": "bloom-176b"})
    damaged = Path(BLOOM).read_text().replace("bloom-176b,h100-80gb,512,", "bloom-176b,h100-80gb,many,")
    (tmp_path / "damaged.csv").write_text(damaged)
    with pytest.raises(ConfigError, match=r"damaged\.csv cannot be used as a GPU profile: ValueError .*'many'"):
        read_profile_table(str(tmp_path / "damaged.csv"), WANTED)
