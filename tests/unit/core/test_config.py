"""What a configuration may be, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.config import Config, load
from core.errors import ConfigError


def write(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "tandem.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_nothing_given_is_the_default(tmp_path: Path) -> None:
    assert load() == Config() == load(write(tmp_path, ""))


def test_a_file_and_what_lies_over_it(tmp_path: Path) -> None:
    path = write(tmp_path, "engine:\n  threads: 2\n  kv_bytes: 1GiB\ncluster: {decode: 3}\n")
    config = load(path, {"cluster.decode": 4, "router.grpc": "127.0.0.1:7000"})
    assert config.engine.threads == 2
    assert config.engine.kv_bytes == 2**30
    assert config.cluster.decode == 4
    assert config.router.grpc == "127.0.0.1:7000"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("engine:\n  thread: 2\n", ["engine.thread", "unknown key", "tandem.yaml"]),
        ("router: {policy: x, typo_a: 1}\nnonsense: 2\n", ["router.typo_a", "nonsense"]),
        ("engine:\n  threads: many\n", ["engine.threads", "many"]),
        ("cluster: {prefill: -1}\n", ["cluster.prefill", "-1"]),
        ("cluster: {heartbeat_s: 0.5, dead_after_s: 0.5}\n", ["cluster", "twice heartbeat_s"]),
        ("cluster: {grace_s: .inf}\n", ["cluster.grace_s", "finite"]),  # an end that never comes
        ("model: {dtype: float8}\n", ["model.dtype", "float8"]),
        ("engine: [1, 2]\n", ["engine"]),
        ("- a\n- b\n", ["keys and values at the top"]),
        ("a: b: c\n", ["not valid YAML", "line 1"]),
        ("engine:\n\tthreads: 2\n", ["not valid YAML", "line 2"]),
        (b"\xff\xfe\x00", ["not valid YAML"]),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load(write(tmp_path, text))
    for part in parts:
        assert part in refused.value.message


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(str(tmp_path / "missing.yaml"))


def test_an_override_cannot_go_through_a_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="redis must be a group"):
        load(write(tmp_path, "redis: somewhere\n"), {"redis.url": "x"})


def test_an_override_of_an_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.decoders: unknown key"):
        load(overrides={"cluster.decoders": 1})


def test_a_configuration_survives_the_way_to_a_worker() -> None:
    config = load(overrides={"engine.kv_bytes": "64MiB", "model.max_model_len": 512})
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_a_branch_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().engine.threads = 4  # type: ignore[misc]
