"""Finding clusters that run on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cli import running
from tandem.errors import InvalidRequestError, UnavailableError


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(running, "state_dir", lambda: tmp_path)
    return tmp_path


def test_a_cluster_is_found_while_it_runs_and_not_after(state: Path) -> None:
    with running.announced("127.0.0.1:5", "127.0.0.1:6", "127.0.0.1:7", "demo"):
        assert running.find().admin == "127.0.0.1:7"
        assert running.find(grpc="localhost:5").pid == os.getpid()
        assert running.admin_address("127.0.0.1:5", None) == "127.0.0.1:7"
    assert list(state.iterdir()) == []
    with pytest.raises(UnavailableError, match="tandem up"):
        running.find()


def test_what_a_killed_cluster_left_is_not_believed(state: Path) -> None:
    with running.announced("127.0.0.1:5", "127.0.0.1:6", "127.0.0.1:7", "demo"):
        (file,) = state.iterdir()
        record = json.loads(file.read_text())
    reused = state / "reused.json"
    reused.write_text(json.dumps({**record, "started": record["started"] - 1}))
    (state / "torn.json").write_text("{")
    assert running.listed() == []
    assert not reused.exists()


def test_several_clusters_must_be_told_apart(state: Path) -> None:
    with running.announced("127.0.0.1:5", "127.0.0.1:6", "127.0.0.1:7", "demo"):
        (file,) = state.iterdir()
        (state / "other.json").write_text(json.dumps({**json.loads(file.read_text()), "grpc": "127.0.0.1:50", "admin": "h:1"}))
        with pytest.raises(InvalidRequestError, match="--grpc"):
            running.find()
        assert running.find(admin="h:1").grpc == "127.0.0.1:50"


def test_an_address_nobody_announced_is_asked_itself() -> None:
    assert running.admin_address("10.0.0.1:5", None) == "10.0.0.1:5"
    assert running.admin_address(None, "10.0.0.1:9") == "10.0.0.1:9"
