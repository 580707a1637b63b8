"""What surrounds a local Ray, without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import ray_session
from core.errors import ConfigError


def test_what_killed_launchers_left_is_removed_and_what_lives_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path("/tmp") / f"tandem-test-{os.getpid()}"
    base.mkdir(mode=0o700)
    monkeypatch.setattr(ray_session, "state_dir", lambda: base)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, alive, other = (base / name for name in (f"ray-{gone.pid}-x", f"ray-{os.getpid()}-x", "ray-notes"))
    for path in (dead, alive, other):
        path.mkdir()
    fresh = ray_session.new_session()
    try:
        assert not dead.exists()
        assert alive.exists()
        assert other.exists()
        assert fresh.parent == base
        assert fresh.stat().st_mode & 0o077 == 0
    finally:
        for path in (alive, other, fresh, base):
            path.rmdir()


def test_a_long_base_is_not_used_because_socket_paths_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "state_dir", lambda: tmp_path / ("x" * 60))
    fresh = ray_session.new_session()
    try:
        assert fresh.parent == Path("/tmp")
    finally:
        fresh.rmdir()


def test_children_started_inside_leave_our_process_group_and_others_do_not() -> None:
    """In a process of its own: with a `preexec_fn`, as Ray starts its processes, gRPC's threads do not outlive the fork."""
    script = """
import os, subprocess, sys
from cluster.ray_session import own_process_groups

def group():
    ask = [sys.executable, "-c", "import os; print(os.getpgrp())"]
    return int(subprocess.run(ask, stdout=subprocess.PIPE, check=True, preexec_fn=lambda: None).stdout)

with own_process_groups():
    inside = group()
print(inside != os.getpgrp(), group() == os.getpgrp())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_a_ray_that_does_not_answer_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at cluster.ray_address 127.0.0.1:1"):
        ray_session.probe("127.0.0.1:1")
