"""Files of cost models: written whole, read back equal, refused by name when they are not what is wanted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.cost_file import check_fingerprint, read_cost_model, write_cost_model
from core.cost_model import CostModel, LinkCost, StepCost
from core.errors import ConfigError

STEPS = StepCost(0.004, 2e-4, 3e-8, 5e-4, 1e-6)
MODEL = CostModel(STEPS, 8192, {"shm": LinkCost(1e-4, 8e9)}, "ab" * 16, "here", 120, 0.02, 0.1, 0.03, 0.2)


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    write_cost_model(MODEL, str(path))
    write_cost_model(MODEL, str(path))
    assert read_cost_model(str(path)) == MODEL
    assert [p.name for p in tmp_path.iterdir()] == ["cost.json"]


def test_a_model_without_links_has_a_file_too(tmp_path: Path) -> None:
    write_cost_model(CostModel(STEPS, 0), str(tmp_path / "gpu.json"))
    assert read_cost_model(str(tmp_path / "gpu.json")) == CostModel(STEPS, 0)


def test_a_file_of_before_heldout_errors_is_read(tmp_path: Path) -> None:
    tree = {key: value for key, value in MODEL.to_json().items() if not key.startswith("heldout")}
    (tmp_path / "old.json").write_text(json.dumps(tree))
    assert read_cost_model(str(tmp_path / "old.json")).heldout_p90_error == 0.0


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[]", "its format is not"),
        (json.dumps({**MODEL.to_json(), "samples": -1}), "samples must be a whole number"),
        (json.dumps({**MODEL.to_json(), "samples": "many"}), "samples must be a whole number"),
        (json.dumps({**MODEL.to_json(), "fingerprint": 7}), "fingerprint must be a text"),
        (json.dumps({**MODEL.to_json(), "p90_error": "small"}), "p90_error must be a number"),
        (json.dumps({**MODEL.to_json(), "kv_token_bytes": 1.5}), "kv_token_bytes must be a whole number"),
        (b"\xff\xfe\x00", "no JSON"),
    ],
)
def test_what_cannot_be_used_is_named_with_what_to_do(tmp_path: Path, content: str | bytes | None, why: str) -> None:
    path = tmp_path / "cost.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=why) as caught:
        read_cost_model(str(path))
    assert str(path) in caught.value.message
    assert "tandem profile" in caught.value.message


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write the cost model .*nowhere"):
        write_cost_model(MODEL, str(tmp_path / "nowhere" / "cost.json"))
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="cannot write the cost model"):
        write_cost_model(MODEL, str(tmp_path / "taken"))
    assert not (tmp_path / "taken.new").exists()


def test_a_file_of_another_model_is_refused_by_both_names() -> None:
    check_fingerprint(MODEL, "cost.json", "ab" * 16, "demo")
    check_fingerprint(CostModel(STEPS, 0), "gpu.json", "ab" * 16, "demo")
    with pytest.raises(ConfigError, match=r"cost\.json was measured on the model abab.*demo \(cdcd.*tandem profile"):
        check_fingerprint(MODEL, "cost.json", "cd" * 16, "demo")
