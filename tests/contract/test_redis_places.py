"""Redis wherever it may be: behind TLS, passwords and Sentinels, as a cluster, as a replica, or not at all."""

from __future__ import annotations

import asyncio
import ssl
import subprocess

import pytest
from directory_rig import (
    DEADLINE_S,
    TTL_S,
    Proxy,
    directories,
    dram,
    fresh,
    keys,
    record,
    redis_cluster,
    sentinel,
    shown,
    until,
)
from redis import Redis

from cli.redis_server import redis_server
from core.errors import ConfigError, StaleEpochError
from kvtransfer.directory import DirectoryError, Tier
from kvtransfer.redis_check import check_redis
from kvtransfer.redis_directory import RedisDirectory

SHORT_S = 0.5
HELD = {("a", 1, Tier.DRAM)}


@pytest.fixture
def server():
    with redis_server() as server:
        yield server


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Files of an authority, and of a server at 127.0.0.1 and a stranger that vouch for themselves."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("server", "stranger"):
        new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
        files = ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")]
        subprocess.run([*new, *subject, *files], check=True, capture_output=True)
    return folder


@pytest.fixture
async def opened():
    """Makes directories that are closed whatever happens."""
    made = []

    def make(url: str, timeout_s: float = DEADLINE_S, **others) -> RedisDirectory:
        made.append(RedisDirectory(url, timeout_s=timeout_s, **others))
        return made[-1]

    yield make
    for directory in made:
        await directory.close()


async def answers(directory: RedisDirectory) -> bool:
    try:
        return shown(await directory.locate(keys(3))) == [HELD] * 3
    except DirectoryError:
        return False


async def test_nobody_listens_there(opened):
    with pytest.raises(ConfigError, match="begins with"):
        opened("localhost:6379", SHORT_S)
    directory = opened("redis://127.0.0.1:1", SHORT_S)
    with pytest.raises(DirectoryError):
        await directory.locate(keys(3))
    assert "127.0.0.1:1 does not answer" in await check_redis("redis://127.0.0.1:1", SHORT_S)
    assert "does not answer" in await check_redis("redis://no.such.host.invalid", SHORT_S)
    assert "does not answer" in await check_redis("redis+sentinel://127.0.0.1:1/main", SHORT_S)
    assert "does not answer" in await check_redis("redis+cluster://127.0.0.1:1", SHORT_S)


async def test_what_listens_there_is_no_redis(opened):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await reader.read()
        writer.close()

    stranger = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with stranger:
        url = f"redis://127.0.0.1:{stranger.sockets[0].getsockname()[1]}"
        directory = opened(url, SHORT_S)
        for call in (directory.locate(keys(3)), directory.join(record(), TTL_S), directory.nodes()):
            with pytest.raises(DirectoryError):
                await call
        assert "does not answer" in await check_redis(url, SHORT_S)


async def test_passwords(opened):
    with redis_server(options=("--requirepass", "se cr/et")) as server:
        good, bad, none = (f"redis://{login}127.0.0.1:{server.port}" for login in (":se%20cr%2Fet@", ":guess@", ""))
        assert await check_redis(good, DEADLINE_S) == ""
        for url in (bad, none):
            with pytest.raises(ConfigError, match="check the name and password") as caught:
                await check_redis(url, DEADLINE_S)
            assert "guess" not in str(caught.value)
            directory = opened(url)
            with pytest.raises(DirectoryError):
                await directory.locate(keys(3))
        with Redis(port=server.port, password="se cr/et") as operator:
            operator.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@read", "+ping")
        with pytest.raises(ConfigError, match="rights of that user"):
            await check_redis(f"redis://reader:pw@127.0.0.1:{server.port}", DEADLINE_S)


async def test_tls(server, certificates, opened):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    async with Proxy(server.port, context) as proxy:
        place = f"127.0.0.1:{proxy.port}"
        trusted = f"rediss://{place}?ca={certificates / 'server.pem'}"
        assert await check_redis(trusted, DEADLINE_S) == ""
        directory = opened(trusted)
        await directory.join(record(), TTL_S)
        await directory.announce("a", 1, dram(keys(3)), [])
        assert await answers(directory)
        assert await check_redis(f"rediss://{place}?verify=none", DEADLINE_S) == ""
        for distrusted in (f"rediss://{place}", f"rediss://{place}?ca={certificates / 'stranger.pem'}"):
            with pytest.raises(ConfigError, match="`ca` and `verify`"):
                await check_redis(distrusted, DEADLINE_S)
            directory = opened(distrusted)
            with pytest.raises(DirectoryError):
                await directory.locate(keys(3))
        assert "does not answer" in await check_redis(f"redis://{place}", DEADLINE_S)  # plain bytes to a TLS port
    assert "check that it speaks TLS there" in await check_redis(f"rediss://127.0.0.1:{server.port}?verify=none", SHORT_S)


async def test_a_replica_takes_no_writes(server, opened):
    with redis_server(options=("--replicaof", "127.0.0.1", str(server.port))) as replica:
        with Redis(port=replica.port) as operator:

            async def linked():
                return operator.info("replication")["master_link_status"] == "up"

            await until(linked)
        with pytest.raises(ConfigError, match="this is a replica"):
            await check_redis(replica.url, DEADLINE_S)
        directory = opened(replica.url)
        with pytest.raises(DirectoryError):
            await directory.join(record(), TTL_S)


async def test_by_sentinel(server, tmp_path):
    with sentinel(server, "main", tmp_path) as url:
        assert await check_redis(url, DEADLINE_S) == ""
        assert "does not answer" in await check_redis(url.replace("/main", "/other"), DEADLINE_S)
        async with directories("redis", url) as make:
            one, other = make(), make()
            await one.join(record(), TTL_S)
            await one.announce("a", 1, dram(keys(3)), [])
            assert shown(await other.locate(keys(3))) == [HELD] * 3


async def test_one_shard_of_a_cluster_restarts_empty(opened):
    """What it held is missed; the others still serve, and the join asks for everything again."""
    with redis_cluster() as url:
        assert await check_redis(url, DEADLINE_S) == ""
        directory = opened(fresh(url))
        await directory.join(record(), TTL_S)
        await directory.announce("a", 1, dram(keys(200)), [])
        assert len((await directory.locate(keys(200))).holders) == 200
        with Redis(port=int(url.rpartition(":")[2])) as operator:
            operator.flushall()
        assert len((await directory.locate(keys(200))).holders) < 200
        assert await directory.join(record(), TTL_S) is False
        assert await directory.announce("a", 1, dram(keys(200)), [])
        assert len((await directory.locate(keys(200))).holders) == 200
        with pytest.raises(ConfigError, match=r"redis\+cluster://"):
            await check_redis(url.partition(",")[0].replace("+cluster", ""), DEADLINE_S)


async def test_two_clusters_on_one_redis_do_not_meet(server, opened):
    one, other = (opened(f"{server.url}?prefix={name}") for name in ("blue", "green"))
    await one.join(record(epoch=5), TTL_S)
    await one.announce("a", 5, dram(keys(3)), [])
    assert await other.join(record(epoch=4), TTL_S) is False
    assert shown(await other.locate(keys(3))) == []
    with pytest.raises(StaleEpochError):
        await one.join(record(epoch=4), TTL_S)
