"""Virtual time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sim.events import Events
from sim.rng import Streams


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=60))
def test_events_happen_in_order_of_time_then_of_asking_and_cancelled_ones_never(asked):
    events, seen = Events(), []
    made = [events.at(when, lambda n=n: seen.append((events.now(), n))) for n, (when, _) in enumerate(asked)]
    for event, (_, cancelled) in zip(made, asked, strict=True):
        if cancelled:
            event.cancel()
    events.run()
    kept = [(when, n) for n, (when, cancelled) in enumerate(asked) if not cancelled]
    assert seen == sorted(kept)
    assert events.count == len(kept)


def test_the_past_is_now_and_soon_is_after_what_is_due():
    events, seen = Events(), []

    def first() -> None:
        events.at(0.5, lambda: seen.append(("past", events.now())))
        events.soon(lambda: seen.append(("soon", events.now())))

    events.at(1.0, first)
    events.at(1.0, lambda: seen.append(("due", events.now())))
    assert not events.run()
    assert seen == [("due", 1.0), ("past", 1.0), ("soon", 1.0)]


def test_a_run_stops_at_its_time_and_after_its_number():
    events, seen = Events(), []
    for n in range(5):
        events.at(float(n), seen.append, n)
    assert events.run(most=2)
    assert seen == [0, 1]
    events.run(until=3.0)
    assert seen == [0, 1, 2, 3]


def test_streams_are_the_same_by_name_and_independent_of_each_other():
    one, two = Streams(7), Streams(7)
    one.stream("arrivals").random()
    assert one.stream("faults").random() == two.stream("faults").random()
    drawn = {Streams(7).stream("a").random(), Streams(8).stream("a").random(), Streams(7).below("a").stream("a").random()}
    assert len(drawn | {Streams(7).stream("b").random()}) == 4
