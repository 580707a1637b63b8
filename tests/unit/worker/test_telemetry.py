"""Metrics as a scraper reads them, and log lines that say whom they are about."""

import asyncio
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from core.errors import ConfigError
from core.telemetry import Histogram, MetricsServer, configure_logging, histogram_family, log_context
from worker.collectors import counters, gauge


class Source:
    def __init__(self) -> None:
        self.steps = Histogram((0.01, 0.1, 1.0))
        self.waiting = 0

    def collect(self):
        yield gauge("tandem_waiting", "Waiting.", self.waiting)
        yield counters("tandem_ended_total", "Ended.", ("outcome",), [(("finished",), 2), (("failed",), 1)])
        yield histogram_family("tandem_step_seconds", "Steps.", [(self.steps, {})])


async def get(address: str, request: bytes) -> tuple[bytes, bytes]:
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    async with asyncio.timeout(5):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return head.splitlines()[0], body


@pytest.fixture
def source():
    return Source()


async def test_a_scrape_reads_the_state_of_its_moment(source):
    for value in (0.001, 0.01, 0.5, 7.0):
        source.steps.observe(value)
    async with MetricsServer("127.0.0.1:0", [source]) as server:
        source.waiting = 3
        status, body = await get(server.address, b"GET /metrics HTTP/1.1\r\n\r\n")
    assert status == b"HTTP/1.1 200 OK"
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert families["tandem_waiting"].samples[0].value == 3
    assert {s.labels["outcome"]: s.value for s in families["tandem_ended"].samples} == {"finished": 2, "failed": 1}
    steps = {(s.name, s.labels.get("le")): s.value for s in families["tandem_step_seconds"].samples}
    assert steps["tandem_step_seconds_bucket", "0.01"] == 2
    assert steps["tandem_step_seconds_bucket", "1.0"] == 3
    assert steps["tandem_step_seconds_bucket", "+Inf"] == steps["tandem_step_seconds_count", None] == 4
    assert steps["tandem_step_seconds_sum", None] == pytest.approx(7.511)


async def test_only_scrapes_are_served(source):
    async with MetricsServer("127.0.0.1:0", [source]) as server:
        assert (await get(server.address, b"GET / HTTP/1.1\r\n\r\n"))[0] == b"HTTP/1.1 404 Not Found"
        assert (await get(server.address, b"POST /metrics HTTP/1.1\r\n\r\n"))[0] == b"HTTP/1.1 405 Method Not Allowed"
        with pytest.raises((ConnectionError, IndexError)):
            await get(server.address, b"x" * 100_000)


async def test_a_port_in_use_is_the_operators_business(source):
    async with MetricsServer("127.0.0.1:0", [source]) as server:
        with pytest.raises(ConfigError, match="another address"):
            async with MetricsServer(server.address, [source]):
                pass


def test_log_lines_carry_who_and_about_whom(capsys):
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure_logging("info", "decode-0")
        with log_context(attempt="req@1"), log_context(peer="router-1"):
            logging.getLogger("a.room").info("hello")
        logging.getLogger("a.room").warning("plain")
        logging.getLogger("a.room").debug("not shown")
    finally:
        root.handlers[:], root.level = handlers, level
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("I decode-0 a.room [attempt=req@1 peer=router-1] hello")
    assert second.endswith("W decode-0 a.room plain")
