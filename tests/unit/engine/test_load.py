"""Loading: both spellings of the configuration, single and sharded weights, and what bad input gets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy as copy_of
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import ConfigError
from engine.load import load_model
from engine.spec import parse_spec

Get = Callable[..., Any]


@pytest.fixture
def copy(checkpoint: Get, tmp_path: Path) -> Callable[..., Path]:
    def make(variant: str = "llama", **changes: Any) -> Path:
        target = tmp_path / "model"
        shutil.copytree(checkpoint(variant), target)
        config = json.loads((target / "config.json").read_text())
        config.update(changes)
        (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
        return target

    return make


def test_the_layout_follows_the_configuration(loaded: Get) -> None:
    model = loaded("mistral")
    assert model.layout.shape == (2, 2, 2, 4, 32)
    assert len(model.layout.fingerprint) == 16
    assert model.eos_token_ids == (2,)
    assert model.max_model_len == 1024
    assert model.spec.windows == (24, 24)
    assert model.batch_invariant


@pytest.mark.parametrize("variant", ["llama", "llama3", "linear", "mistral", "qwen2-window", "qwen3"])
def test_old_and_new_spelling_say_the_same(checkpoint: Get, variant: str) -> None:
    new = json.loads((checkpoint(variant) / "config.json").read_text())
    old = copy_of(new)
    rope = old.pop("rope_parameters")
    old["torch_dtype"] = old.pop("dtype")
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else {**rope, "type": rope.pop("rope_type")}
    old.pop("layer_types", None)
    assert parse_spec(old, "config.json") == parse_spec(new, "config.json")


def test_sharded_weights_are_the_same_model(checkpoint: Get, loaded: Get) -> None:
    directory = checkpoint("llama", max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    seen: list[tuple[int, int]] = []
    sharded = load_model(str(directory), block_size=4, progress=lambda done, total: seen.append((done, total)))
    assert sharded.layout == loaded("llama").layout
    assert seen[-1][0] == seen[-1][1] == sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    assert seen == sorted(seen)


def test_the_fingerprint_tells_weights_dtype_and_rope_apart(copy: Get, loaded: Get) -> None:
    directory = copy("llama")
    before = loaded("llama").layout.fingerprint
    assert load_model(str(directory), block_size=8).layout.fingerprint == before
    assert load_model(str(directory), "bfloat16").layout.fingerprint != before
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, directory / "model.safetensors")
    assert load_model(str(directory)).layout.fingerprint != before


def test_auto_takes_the_stored_dtype(copy: Get) -> None:
    assert load_model(str(copy("llama", dtype="bfloat16")), "auto").layout.dtype == "bfloat16"


def test_a_shorter_context_can_be_asked_for(checkpoint: Get) -> None:
    assert load_model(str(checkpoint("llama")), max_model_len=64).max_model_len == 64


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; choose a model of LlamaForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "unquantised"),
        ({"intermediate_size": 97}, "layers.0.mlp.*has shape"),
        ({"num_hidden_layers": 3}, "lack model.layers.2"),
        ({"vocab_size": 321}, "has shape"),
    ],
)
def test_configurations_that_cannot_run(copy: Get, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_model(str(copy("llama", **changes)))


@pytest.mark.parametrize(("dtype", "told"), [("float16", "float32, bfloat16"), ("int8", "got 'int8'")])
def test_dtypes_that_are_not_supported(checkpoint: Get, dtype: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_model(str(checkpoint("llama")), dtype)


def test_a_context_beyond_the_models_is_refused(checkpoint: Get) -> None:
    with pytest.raises(ConfigError, match="max_model_len is 4096"):
        load_model(str(checkpoint("llama")), max_model_len=4096)


@pytest.mark.parametrize("name", ["/no/such/model", "./nowhere", "no/such/model/at/all"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match="no model directory"):
        load_model(name)


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="neither a directory here nor to be had from the Hub"):
        load_model("someone/something-that-is-not-cached")


def test_truncated_weights(copy: Get) -> None:
    file = copy("llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors is truncated"):
        load_model(str(file.parent))


def test_weights_that_are_not_safetensors(copy: Get) -> None:
    file = copy("llama") / "model.safetensors"
    file.write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        load_model(str(file.parent))


def test_missing_tensors_are_named(copy: Get) -> None:
    file = copy("llama") / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(file.parent))


def test_integer_weights_are_refused(copy: Get) -> None:
    file = copy("llama") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"stored as torch\.int8"):
        load_model(str(file.parent))


def test_a_missing_shard_is_named(checkpoint: Get, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(checkpoint("llama", max_shard_size="60KB"), directory)
    gone = sorted(directory.glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(ConfigError, match=gone.name):
        load_model(str(directory))


def test_an_index_cannot_name_files_elsewhere(copy: Get) -> None:
    directory = copy("llama")
    index = {"weight_map": {"model.norm.weight": "../model/model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="beside it"):
        load_model(str(directory))


def test_pickled_weights_are_refused_by_name(copy: Get) -> None:
    directory = copy("llama")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"safetensors only, found pytorch_model\.bin"):
        load_model(str(directory))


def test_no_weights_at_all(copy: Get) -> None:
    directory = copy("llama")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no weights found"):
        load_model(str(directory))


def test_a_broken_configuration_file(copy: Get) -> None:
    directory = copy("llama")
    (directory / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_model(str(directory))
    (directory / "config.json").unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        load_model(str(directory))


def test_end_of_text_ids_come_from_the_generation_config(copy: Get) -> None:
    directory = copy("llama", eos_token_id=5)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_model(str(directory)).eos_token_ids == (7, 9)
    (directory / "generation_config.json").unlink()
    assert load_model(str(directory)).eos_token_ids == (5,)
