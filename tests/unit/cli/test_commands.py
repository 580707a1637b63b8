"""The command as users meet it: one line for every mistake, the documented exit status, no stack trace, a quick start."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli import admin
from cli.main import app
from cluster.main import check_model
from core.errors import ConfigError

TANDEM = str(Path(sys.executable).with_name("tandem"))

TRACE = str(Path(__file__).parents[2] / "sim" / "data" / "mooncake_conversation_300.jsonl.gz")


def tandem(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TANDEM, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


UP_MISTAKES = [
    (["up", "--model", "/nowhere"], 2, ["there is no model at /nowhere", "--model"]),
    (["up", "--config", "/nowhere.yaml"], 2, ["cannot read the configuration /nowhere.yaml"]),
    (["up", "--prefill", "1", "--decode", "0"], 2, ["split pools need both"]),
    (["up", "--http", "TAKEN"], 2, ["router.http cannot listen on", "choose another port"]),
]
MISTAKES = [
    (["up", "--prefill", "-1"], 2, ["cluster.prefill", "-1"]),
    (["up", "--launcher", "slurm"], 2, ["cluster.launcher", "slurm"]),
    (["status", "--admin", "127.0.0.1:1"], 3, ["nobody answers at 127.0.0.1:1"]),
    (["generate", "x", "--grpc", "127.0.0.1:1", "--timeout", "2"], 3, ["127.0.0.1:1"]),
    (["generate", "x", "--grpc", "127.0.0.1:1", "--temperature", "-1"], 2, ["temperature must be between"]),
    (["bench", "--url", "http://127.0.0.1:1"], 3, ["nobody answers at 127.0.0.1:1"]),
    (["bench", "--url", "ftp://x"], 2, ["--url must look like http://HOST:PORT"]),
    (["bench", "--url", "http://x", "--grpc", "x:1"], 2, ["not both"]),
    (["bench", "--grpc", "x:1", "--rate", "1", "--trace", TRACE], 2, ["--speed"]),
    (["bench", "--grpc", "x:1", "--rate", "1", "--trace", "/nowhere"], 2, ["cannot read the trace /nowhere"]),
    (["bench", "--grpc", "x:1", "--rate", "1", "--ttft-slo", "-1"], 2, ["ttft_slo_s must be a positive number"]),
    (["bench", "--grpc", "x:1", "--rate", "1", "--tpot-slo", "nan"], 2, ["tpot_slo_s must be a positive number"]),
    (["bench", "--grpc", "x:1", "--rate", "1", "--json", "/nowhere/x.json"], 2, ["there is no folder /nowhere"]),
    (["profile", "--json", "/nowhere/x.json"], 2, ["there is no folder /nowhere"]),
    (["explain", "abc", "--grpc", "127.0.0.1:1"], 3, ["127.0.0.1:1"]),
    (["drain", "decode-0", "--admin", "127.0.0.1:1"], 3, ["nobody answers"]),
    (["down", "--admin", "127.0.0.1:1"], 3, ["nobody answers"]),
    (["kv", "stat", "--admin", "127.0.0.1:1"], 3, ["nobody answers"]),
    (["kv", "get", "abc", "--admin", "127.0.0.1:1"], 2, ["32 hexadecimal digits"]),
    (["kv", "evict", "--admin", "127.0.0.1:1"], 2, ["--all"]),
    (["kv", "evict", "0" * 32, "--all", "--admin", "127.0.0.1:1"], 2, ["--all"]),
    (["kv", "warm", "/nowhere.txt", "--admin", "127.0.0.1:1"], 2, ["cannot read /nowhere.txt"]),
]


def check(status: int, stdout: str, stderr: str, expected: int, parts: list[str]) -> None:
    assert status == expected, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert stderr.startswith("tandem: ")
    for part in parts:
        assert part in stderr


@pytest.mark.parametrize(("arguments", "status", "parts"), UP_MISTAKES)
def test_a_cluster_that_cannot_be_is_refused(arguments: list[str], status: int, parts: list[str], taken: str) -> None:
    done = tandem(*(argument.replace("TAKEN", taken) for argument in arguments))
    check(done.returncode, done.stdout, done.stderr, status, parts)


@pytest.mark.parametrize(("arguments", "status", "parts"), MISTAKES)
def test_a_mistake_is_one_line_and_a_status(arguments: list[str], status: int, parts: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)
    check(done.exit_code, done.stdout, done.stderr, status, parts)


def test_a_mistake_of_ours_is_told_apart_and_shows_its_origin_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "status", lambda address: 1 / 0)
    done = CliRunner().invoke(app, ["status", "--admin", "x:1"])
    assert done.exit_code == 1
    assert done.stderr.startswith("tandem: a mistake of ours: ZeroDivisionError")
    assert isinstance(CliRunner().invoke(app, ["--traceback", "status", "--admin", "x:1"]).exception, ZeroDivisionError)


def model_files(folder: Path, config: str = "{}") -> None:
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text("")


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_directory_that_is_no_model_is_refused_before_anything_starts(tmp_path: Path, missing: str) -> None:
    model_files(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ConfigError, match=missing.replace("model.", r"\*.")):
        check_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ('{"architectures": ["GPT2LMHeadModel"]}', "GPT2LMHeadModel is not supported.*LlamaForCausalLM"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_before_anything_starts(tmp_path: Path, config: str, why: str) -> None:
    model_files(tmp_path, config)
    with pytest.raises(ConfigError, match=why):
        check_model(str(tmp_path))


def test_a_hub_id_is_left_to_the_workers() -> None:
    check_model("nobody/nothing-here")


def test_asking_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, cli.main, cli.admin, cli.running, cli.targets, tandem; tandem.Client; "
        "print([m for m in ('torch', 'ray', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_help_names_every_verb() -> None:
    shown = tandem("--help").stdout
    for verb in ("up", "down", "status", "generate", "bench", "drain", "kv"):
        assert f" {verb} " in shown
