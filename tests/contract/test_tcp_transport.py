"""tcp through the suite that every transport owes, and what is its own: handshakes, secrets, TLS, peers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import threading
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest
from transport_suite import EPOCH, KEY, UNTOUCHED, Pair, TransportSuite, new_exports, source_of, until

from core.config import TcpConfig
from core.errors import ConfigError, DigestMismatchError, LayoutMismatchError, LeaseExpiredError, TransferError
from core.inventory import Inventory
from core.request import AttemptKey
from kvtransfer import tcp_frames as frames
from kvtransfer.arena import HostArena
from kvtransfer.tcp import LANES_MAX, TcpTransport
from kvtransfer.tcp_server import TcpServer
from kvtransfer.tcp_wire import Security, Wire, greet, introduce, load_security


class TestTcp(TransportSuite):
    @asynccontextmanager
    async def pair(
        self, num_blocks=64, block_bytes=4096, *, timeout_s=20.0, digest=True, security=None, theirs=None, connections=2
    ):
        arena = HostArena(num_blocks, block_bytes)
        inventory, dest = Inventory(num_blocks, arena.generation_words()), np.zeros((num_blocks, block_bytes), np.uint8)
        exports = new_exports(arena, inventory)
        exports.open(KEY, 60.0)
        self.server = TcpServer(exports, "127.0.0.1:0", security=security)
        transport = TcpTransport(dest, digest=digest, timeout_s=timeout_s, connections=connections, security=theirs or security)
        yield Pair(arena, inventory, exports, source_of(arena, tcp_address=self.server.address), dest, transport)
        await transport.close()
        await asyncio.to_thread(self.server.close)
        await exports.close()
        await until(lambda: not [t for t in threading.enumerate() if t.name.startswith("kv-tcp 127")])

    async def vanish(self, pair):
        await asyncio.to_thread(self.server.close)

    @asynccontextmanager
    async def stalled(self, pair):
        """A peer that accepts connections and never says a word."""
        with quiet_listener() as address:
            pair.source = replace(pair.source, tcp_address=address)
            yield

    async def other_size(self, pair, block_bytes):
        return TcpTransport(np.zeros((8, block_bytes), np.uint8), digest=True, timeout_s=2.0)

    # -- connections -----------------------------------------------------------------------------------------------

    async def test_connections_are_kept_and_dropped(self):
        async with self.pair(16, 2**21) as pair:
            records = pair.offer(16)
            for _ in range(3):
                await pair.pull(records, list(range(16)))
            assert len(self.server._connections) == 2
            await asyncio.gather(*(pair.pull(records[i : i + 1], [i]) for i in range(16)))
            assert len(self.server._connections) <= LANES_MAX
            pair.transport.forget(pair.source)
            await until(lambda: not self.server._connections)
            await pair.pull(records[:1], [0])

    async def test_a_connection_that_died_while_idle_is_dialled_again(self):
        async with self.pair() as pair:
            records = pair.offer(2)
            await pair.pull(records, [0, 1])
            for wire in list(self.server._connections):
                wire.abort()
            await until(lambda: not self.server._connections)
            await pair.pull(records, [2, 3])

    async def test_pulls_survive_one_that_was_cancelled_beside_them(self):
        async with self.pair(64, 400_000) as pair:
            records = pair.offer(64)
            one = asyncio.create_task(pair.pull(records[:32], list(range(32))))
            other = asyncio.create_task(pair.pull(records[32:], list(range(32, 64))))
            await until(lambda: bool(pair.dest.any()))
            one.cancel()
            assert await other == 32 * 400_000
            assert np.array_equal(pair.dest[32:], pair.source_bytes(records[32:]))

    async def test_a_closed_transport_says_so(self):
        async with self.pair() as pair:
            records = pair.offer(2)
            await pair.transport.close()
            with pytest.raises(TransferError, match="closed"):
                await pair.pull(records, [0, 1])

    async def test_nothing_of_the_pull_is_allocated(self):
        """The kernel fills the destination itself: no Python buffer of the size of a block is made on the way."""
        import tracemalloc

        async with self.pair(32, 2**20) as pair:
            records = pair.offer(32)
            await pair.pull(records, list(range(32)))
            tracemalloc.start()
            try:
                await pair.pull(records, list(range(32)))
                _, peak_bytes = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert peak_bytes < 2**18, "of 32 MiB"

    # -- what is served, and to whom -------------------------------------------------------------------------------

    async def test_only_announced_blocks_of_a_live_export_are_served(self):
        async with self.pair() as pair:
            records = pair.offer(2)
            (secret,) = pair.inventory.allocate(1)
            hidden = replace(records[0], block_id=secret, generation=pair.inventory.generation(secret))
            with pytest.raises(TransferError, match="not announced"):
                await pair.pull([hidden], [0])
            with pytest.raises(LeaseExpiredError):
                await pair.transport.pull(pair.source, AttemptKey("another", 1), records, [0, 1])
            pair.exports.done(KEY)
            with pytest.raises(LeaseExpiredError):
                await pair.pull(records, [0, 1])

    async def test_blocks_of_another_size_are_named(self):
        async with self.pair() as pair:
            other = await self.other_size(pair, 1024)
            with pytest.raises(LayoutMismatchError, match="4096 here, 1024 there"):
                await other.pull(pair.source, KEY, pair.offer(2), [0, 1])
            await other.close()

    async def test_a_request_id_beyond_all_bounds(self):
        async with self.pair() as pair:
            with pytest.raises(TransferError, match="5000 bytes"):
                await pair.transport.pull(pair.source, AttemptKey("x" * 5000, 1), pair.offer(1), [0])

    @pytest.mark.parametrize("theirs", [Security(), Security(b"b" * 16)])
    async def test_another_secret_is_turned_away(self, theirs):
        async with self.pair(security=Security(b"a" * 16), theirs=theirs) as pair:
            with pytest.raises(TransferError, match="secret_file"):
                await pair.pull(pair.offer(1), [0])

    async def test_the_same_secret_lets_in(self):
        async with self.pair(security=Security(b"a" * 16)) as pair:
            await pair.pull(pair.offer(3), [0, 1, 2])

    async def test_over_tls(self, authority):
        async with self.pair(40, 100_000, security=load_security(authority("one"))) as pair:
            records = pair.offer(40, scattered=True)
            pulls = (pair.pull(records[i : i + 10], range(i, i + 10)) for i in range(0, 40, 10))
            await asyncio.gather(*pulls)
            assert np.array_equal(pair.dest, pair.source_bytes(records))
            await pair.pull(records, list(range(40)))

    async def test_tls_with_a_stranger_or_without_on_one_side(self, authority):
        ours, strange = load_security(authority("one")), load_security(authority("two"))
        for server, client in ((ours, strange), (ours, Security()), (Security(), ours)):
            async with self.pair(timeout_s=1.0, security=server, theirs=client) as pair:
                with pytest.raises(TransferError):
                    await pair.pull(pair.offer(1), [0])
                assert not pair.dest.any()

    # -- peers that misbehave --------------------------------------------------------------------------------------

    @pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(200), b"\xff" * 4096])
    async def test_noise_at_the_door_harms_nobody(self, noise):
        async with self.pair() as pair:
            host, port = self.server.address.split(":")
            with socket.create_connection((host, int(port)), 5.0) as stranger:
                with suppress(OSError):  # turned away already
                    stranger.sendall(noise)
                    stranger.shutdown(socket.SHUT_WR)
                await until(lambda: not self.server._connections)
            await pair.pull(pair.offer(2), [0, 1])

    async def test_a_request_beyond_all_bounds_ends_the_connection(self):
        async with self.pair() as pair:
            host, port = self.server.address.split(":")

            def ask():
                with socket.create_connection((host, int(port)), 5.0) as sock:
                    wire = Wire(sock)
                    introduce(wire, EPOCH, Security())
                    head = bytearray(frames.request(1, 1.0, EPOCH, 4096, KEY, []))[: frames.REQUEST_HEAD_BYTES]
                    head[-4:] = (2**31).to_bytes(4, "little")
                    wire.send([head])
                    return sock.recv(100)

            assert await asyncio.to_thread(ask) == b""
            await pair.pull(pair.offer(2), [0, 1])

    async def test_a_peer_that_reads_nothing_is_dropped_at_its_own_deadline(self, monkeypatch):
        monkeypatch.setattr("kvtransfer.tcp_server.STALL_S", 0.2)
        async with self.pair(64, 2**20) as pair:
            records = pair.offer(64)
            host, port = self.server.address.split(":")

            def ask():
                wire = Wire(socket.create_connection((host, int(port)), 5.0))
                introduce(wire, EPOCH, Security())
                places = [(r.index, r.block_id, r.generation) for r in records]
                wire.send([frames.request(1, 0.2, EPOCH, 2**20, KEY, places)])
                return wire

            wire = await asyncio.to_thread(ask)
            beside = asyncio.create_task(pair.pull(records[:8], list(range(8))))
            assert await beside == 8 * 2**20, "others are served meanwhile"
            await until(lambda: len(self.server._connections) <= 2)
            wire.close()

    @pytest.mark.parametrize(
        "answer",
        [
            lambda seq: frames.reply(seq + 1, 2) + bytes(8192),  # of another request
            lambda seq: frames.reply(seq, 1) + bytes(8192),  # not as many
            lambda seq: b"TKVX" + frames.reply(seq, 2)[4:] + bytes(8192),
            lambda seq: frames.reply(seq, 2) + bytes(8192) + frames.reply(seq, 2),  # no trailer
            lambda seq: frames.reply(seq, 2) + bytes(8000),  # cut short
            lambda seq: frames.reply(seq, 2)[:7],
            lambda seq: frames.reply(seq, 2)[:-4] + b"\xff" * 4 + bytes(8192),
            lambda seq: frames.reply(seq, 2)[:8] + b"\x63" + frames.reply(seq, 2)[9:],
        ],
    )
    async def test_a_source_that_answers_nonsense(self, answer):
        async with self.pair(timeout_s=5.0) as pair:
            records = pair.offer(2)
            with fake_source(answer) as address:
                pair.source = replace(pair.source, tcp_address=address)
                with pytest.raises(TransferError):
                    await pair.pull(records, [0, 1])

    async def test_right_frames_around_wrong_bytes(self):
        async with self.pair(timeout_s=5.0) as pair:
            records = pair.offer(2)
            with fake_source(lambda seq: frames.reply(seq, 2) + bytes(8192) + frames.trailer(seq, [])) as address:
                pair.source = replace(pair.source, tcp_address=address)
                with pytest.raises(DigestMismatchError, match="block 0 "):
                    await pair.pull(records, [0, 1])

    async def test_a_slow_source_meets_the_deadline_and_writes_nothing_later(self):
        """One that begins, and never ends."""
        async with self.pair(timeout_s=0.4) as pair:
            records = pair.offer(2)
            with fake_source(lambda seq: frames.reply(seq, 2) + bytes(100), hang=True) as address:
                pair.source = replace(pair.source, tcp_address=address)
                with pytest.raises(TransferError, match="pull_timeout_s"):
                    await pair.pull(records, [0, 1])
            pair.dest[:] = UNTOUCHED
            await asyncio.sleep(0)
            assert (pair.dest == UNTOUCHED).all()


@pytest.mark.parametrize("bind", ["nonsense", "127.0.0.1:99999", "192.0.2.1:0", ":x"])
def test_where_one_cannot_listen(bind):
    arena = HostArena(1, 64)
    with pytest.raises(ConfigError, match=r"transfer\.tcp\.bind"):
        TcpServer(new_exports(arena, Inventory(1, arena.generation_words())), bind)


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:x", "127.0.0.1:70000", "no.such.host.invalid:1"])
async def test_addresses_that_lead_nowhere(address):
    arena = HostArena(1, 64)
    transport = TcpTransport(np.zeros((1, 64), np.uint8), digest=True, timeout_s=5.0)
    with pytest.raises(TransferError):
        await transport.pull(source_of(arena, tcp_address=address), KEY, [], [])
    await transport.close()


def test_security_files(tmp_path):
    with pytest.raises(ConfigError, match="secret_file: cannot read"):
        load_security(TcpConfig(secret_file=str(tmp_path / "none")))
    (tmp_path / "short").write_text("short\n")
    with pytest.raises(ConfigError, match="5 bytes; put at least 16"):
        load_security(TcpConfig(secret_file=str(tmp_path / "short")))
    with pytest.raises(ConfigError, match="belong together"):
        load_security(TcpConfig(cert="a"))
    with pytest.raises(ConfigError, match="cannot be used"):
        load_security(TcpConfig(cert=str(tmp_path / "a"), key="b", ca="c"))
    (tmp_path / "long").write_text("0123456789abcdef\n")
    assert load_security(TcpConfig(secret_file=str(tmp_path / "long"))).secret == b"0123456789abcdef"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """Makes an authority and a certificate that it signed, by name."""
    folder = tmp_path_factory.mktemp("certificates")

    def make(name: str) -> TcpConfig:
        ca, ca_key, cert, key = (str(folder / f"{name}.{part}") for part in ("ca", "ca_key", "cert", "key"))
        new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        run = {"check": True, "capture_output": True}
        subprocess.run([*new, "-subj", f"/CN=authority {name}", "-keyout", ca_key, "-out", ca], **run)
        signed = ["-CA", ca, "-CAkey", ca_key, "-subj", "/CN=worker", "-keyout", key, "-out", cert]
        subprocess.run([*new, *signed], **run)
        return TcpConfig(cert=cert, key=key, ca=ca)

    return make


@contextmanager
def quiet_listener():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def fake_source(answer, *, hang=False):
    """Shakes hands as it should and then says `answer(seq)` to the first request."""
    release = threading.Event()

    def serve(listener):
        sock, _ = listener.accept()
        with sock:
            wire = Wire(sock)
            greet(wire, EPOCH, Security())
            head = frames.parse_request_head(wire.read(frames.REQUEST_HEAD_BYTES))
            wire.read(head.body_bytes)
            sock.sendall(answer(head.seq))
            if hang:
                release.wait(10)
            with contextlib.suppress(OSError):  # whoever heard nonsense may have hung up already
                sock.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            release.set()
            thread.join(10)
            assert not thread.is_alive()
