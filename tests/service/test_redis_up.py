"""`tandem up` with a Redis that will never do, or more shared memory than there is, ends at once and says what to change."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from directory_rig import Proxy

from cli.redis_server import redis_server

pytestmark = pytest.mark.service


def up(*flags: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "cli.main", "up", "--launcher", "local", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert not done.stdout
    return done.returncode, done.stderr


@pytest.mark.parametrize("url", ["localhost:6379", "redis://h/one", "redis+sentinel://h"])
def test_a_url_that_is_none(url):
    status, words = up("--redis", url)
    assert status == 2
    assert words.startswith("tandem: redis: the URL cannot be used")


def test_a_wrong_password():
    with redis_server(options=("--requirepass", "right")) as server:
        status, words = up("--redis", f"redis://:wrong@127.0.0.1:{server.port}")
    assert status == 2
    assert "check the name and password" in words
    assert "wrong" not in words.replace("WRONGPASS", "")


async def test_a_certificate_nobody_vouches_for(tmp_path: Path):
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    files = ["-subj", "/CN=redis", "-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, [*new, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with redis_server() as server:
        async with Proxy(server.port, context) as proxy:
            status, words = await asyncio.to_thread(up, "--redis", f"rediss://127.0.0.1:{proxy.port}")
    assert status == 2
    assert "check that it speaks TLS there, and `ca` and `verify` in its URL" in words


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("engine: {kv_bytes: 1TiB}", "lower engine.kv_bytes, enlarge that file system (docker: --shm-size)"),
        ("store: {dram_bytes: 1TiB}", "store.dram_bytes asks for 1099511627776 bytes and /dev/shm has"),
    ],
)
def test_more_shared_memory_than_there_is(config: str, words: str, tmp_path: Path):
    file = tmp_path / "tandem.yaml"
    file.write_text(config)
    status, said = up("--config", str(file))
    assert status == 2
    assert words in said
