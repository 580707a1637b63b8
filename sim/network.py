"""Moving bytes between nodes: every node has one port out and one in, shared fairly by what passes at the moment.

A flow moves at the smaller of its equal shares of the two ports that it passes, and at most at `flow_bytes_per_s`. That is
max-min fairness where all flows of a port are held back by it, and a little less where some are held back elsewhere: what
those leave unused is not given to the others. So a transfer here is never faster than on a fair network.
"""

from __future__ import annotations

from collections.abc import Callable

from sim.events import Event, Events


class Flow:
    __slots__ = ("arrived", "dest", "end", "left_bytes", "rate", "since", "source")

    def __init__(self, source: _Port, dest: _Port, size: float, arrived: Callable[[], None], now: float) -> None:
        self.source = source
        self.dest = dest
        self.left_bytes = size
        self.arrived = arrived
        self.rate = 0.0
        self.since = now
        self.end: Event | None = None


class _Port:
    __slots__ = ("bytes_per_s", "flows")

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.flows: dict[Flow, None] = {}  # in order of their start: the same every time


class Network:
    """`latency_s`: of every message and of the first byte of a flow. Nodes are known by name, and come as they are used."""

    def __init__(self, events: Events, bytes_per_s: float, latency_s: float, flow_bytes_per_s: float = float("inf")) -> None:
        assert bytes_per_s > 0, "a link must move bytes"
        self.latency_s = latency_s
        self.moved_bytes = 0.0
        self._events = events
        self._bytes_per_s = bytes_per_s
        self._flow_bytes_per_s = flow_bytes_per_s
        self._out: dict[str, _Port] = {}
        self._in: dict[str, _Port] = {}

    def move(self, source: str, dest: str, num_bytes: float, arrived: Callable[[], None]) -> Flow:
        """Calls `arrived` once the bytes are there, unless the flow is cancelled before."""
        flow = Flow(self._port(self._out, source), self._port(self._in, dest), num_bytes, arrived, self._events.now())
        flow.end = self._events.at(self._events.now() + self.latency_s, self._begin, flow)
        return flow

    def cancel(self, flow: Flow) -> None:
        """Nothing more of it arrives. Idempotent."""
        if flow.end is not None:
            flow.end.cancel()
            flow.end = None
            self._leave(flow)

    def set_speed(self, node: str, share: float) -> None:
        """The node's ports pass this share of what the others do, from now on."""
        assert share > 0, "a link that moves nothing is a partition, not a slow one"
        for ports in (self._out, self._in):
            port = self._port(ports, node)
            port.bytes_per_s = self._bytes_per_s * share
            self._share(port, port)

    def rates(self) -> list[tuple[float, float]]:
        """Of every port that flows pass: what passes, and what can."""
        ports = [port for ports in (self._out, self._in) for port in ports.values() if port.flows]
        return [(sum(flow.rate for flow in port.flows), port.bytes_per_s) for port in ports]

    def _port(self, ports: dict[str, _Port], node: str) -> _Port:
        port = ports.get(node)
        if port is None:
            port = ports[node] = _Port(self._bytes_per_s)
        return port

    def _begin(self, flow: Flow) -> None:
        flow.since = self._events.now()
        flow.source.flows[flow] = flow.dest.flows[flow] = None
        self._share(flow.source, flow.dest)

    def _share(self, out: _Port, into: _Port) -> None:
        """Every flow of these ports goes on at its new rate."""
        now = self._events.now()
        for flow in out.flows | into.flows:
            source, dest = flow.source, flow.dest
            rate = min(source.bytes_per_s / len(source.flows), dest.bytes_per_s / len(dest.flows), self._flow_bytes_per_s)
            if rate == flow.rate:
                continue
            self._settle(flow, now)
            flow.rate = rate
            if flow.end is not None:
                flow.end.cancel()
            flow.end = self._events.at(now + flow.left_bytes / rate, self._arrive, flow)

    def _settle(self, flow: Flow, now: float) -> None:
        moved = min(flow.rate * (now - flow.since), flow.left_bytes)
        self.moved_bytes += moved
        flow.left_bytes -= moved
        flow.since = now

    def _arrive(self, flow: Flow) -> None:
        flow.end = None
        self._leave(flow)
        flow.arrived()

    def _leave(self, flow: Flow) -> None:
        if flow in flow.source.flows:
            self._settle(flow, self._events.now())
            del flow.source.flows[flow], flow.dest.flows[flow]
            self._share(flow.source, flow.dest)
