"""Links that are shared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.events import Events
from sim.network import Network


def network(bytes_per_s: float = 100.0, latency_s: float = 0.0, **more: float) -> tuple[Events, Network]:
    events = Events()
    return events, Network(events, bytes_per_s, latency_s, **more)


def arrivals(events: Events, net: Network, flows: list[tuple[float, str, str, float]]) -> list[float]:
    """When each of the flows (start, source, destination, bytes) is there."""
    at = [-1.0] * len(flows)
    for n, (start, source, dest, size) in enumerate(flows):

        def arrived(n: int = n) -> None:
            at[n] = events.now()

        events.at(start, lambda s=source, d=dest, b=size, a=arrived: net.move(s, d, b, a))
    events.run()
    return at


@pytest.mark.parametrize(
    ("flows", "expected"),
    [
        ([(0, "a", "b", 100)], [1.0]),
        ([(0, "a", "b", 100), (0, "c", "d", 100)], [1.0, 1.0]),
        ([(0, "a", "b", 100), (0, "a", "c", 100)], [2.0, 2.0]),  # one port out
        ([(0, "a", "c", 100), (0, "b", "c", 100)], [2.0, 2.0]),  # one port in
        ([(0, "a", "b", 100), (0.5, "a", "c", 100)], [1.5, 2.0]),  # joined halfway: 50 alone, 50 + 50 together, 50 alone
        ([(0, "a", "b", 100), (0, "b", "a", 100)], [1.0, 1.0]),  # there and back
    ],
)
def test_flows_share_the_ports_they_pass(flows, expected):
    assert arrivals(*network(), flows) == pytest.approx(expected)


def test_a_flow_pays_the_latency_once_and_never_beats_its_own_limit():
    assert arrivals(*network(latency_s=0.25), [(0, "a", "b", 100)]) == pytest.approx([1.25])
    assert arrivals(*network(flow_bytes_per_s=20.0), [(0, "a", "b", 100)]) == pytest.approx([5.0])


def test_a_slow_node_slows_what_passes_it_and_recovers():
    events, net = network()
    events.at(0.5, net.set_speed, "b", 0.1)
    events.at(1.5, net.set_speed, "b", 1.0)
    assert arrivals(events, net, [(0, "a", "b", 100)]) == pytest.approx([1.9])  # 50, then 10 in a second, then 40


def test_a_cancelled_flow_makes_room_and_never_arrives():
    events, net = network()
    done: list[str] = []
    flow = net.move("a", "b", 100, lambda: done.append("first"))
    net.move("a", "c", 100, lambda: done.append("second"))
    events.at(1.0, lambda: net.cancel(flow))
    events.at(1.0, lambda: net.cancel(flow))
    events.run()
    assert done == ["second"]
    assert events.now() == pytest.approx(1.5)


_NODES = st.sampled_from("abcd")


@given(st.lists(st.tuples(st.floats(0, 5), _NODES, _NODES, st.floats(1, 500)), min_size=1, max_size=25))
def test_no_port_ever_passes_more_than_it_can_and_every_byte_arrives(flows):
    events, net = network()
    worst: list[float] = []
    events.after = lambda: worst.extend(rate - most for rate, most in net.rates())
    at = arrivals(events, net, flows)
    assert min(at) >= 0
    assert max(worst, default=0.0) < 1e-6
    assert net.moved_bytes == pytest.approx(sum(size for *_, size in flows))
    for arrived, (start, _, _, size) in zip(at, flows, strict=True):
        assert arrived - start >= size / 100.0 - 1e-9
