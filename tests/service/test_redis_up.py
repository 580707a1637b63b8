"""`tandem up` with a Redis that will never do ends at once and says what to change."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cli.redis_server import redis_server

pytestmark = pytest.mark.service


def up(url: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "cli.main", "up", "--launcher", "local", "--redis", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert not done.stdout
    return done.returncode, done.stderr


@pytest.mark.parametrize("url", ["localhost:6379", "redis://h/one", "redis+sentinel://h"])
def test_a_url_that_is_none(url):
    status, words = up(url)
    assert status == 2
    assert words.startswith("tandem: redis: the URL cannot be used")


def test_a_wrong_password():
    with redis_server(options=("--requirepass", "right")) as server:
        status, words = up(f"redis://:wrong@127.0.0.1:{server.port}")
    assert status == 2
    assert "check the name and password" in words
    assert "wrong" not in words.replace("WRONGPASS", "")
