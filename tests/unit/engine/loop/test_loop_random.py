"""Random arrivals, cancels, hand-overs, role changes, shortages and failing steps: tokens are those of the solo run, and
nothing is held at the end."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import OutOfBlocksError
from core.request import AttemptKey
from decode_worker.role import DecodeRole
from prefill_worker.role import PrefillRole
from worker.colocated import ColocatedRole

ROLES = {"prefill": PrefillRole(lease_s=4.0), "decode": DecodeRole(chunk_tokens=5), "colocated": ColocatedRole()}

arrival = st.tuples(
    st.just("submit"),
    st.integers(0, 3),  # which shared prefix
    st.integers(0, 24),  # how much of it
    st.integers(1, 12),  # own tokens
    st.integers(1, 14),  # max_tokens
    st.booleans(),  # KV handed in
)
event = st.one_of(
    arrival,
    arrival,
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("role"), st.sampled_from(sorted(ROLES))),
    st.tuples(st.just("hold"), st.integers(1, 6)),
    st.tuples(st.just("let go"), st.just(0)),
    st.tuples(st.just("fail"), st.just(0)),
)


class Story:
    """Plays events against one loop and remembers what each attempt must come to."""

    def __init__(self, bench, item, expected, blocks: int, max_running: int) -> None:
        self.b = bench(blocks=blocks, max_running=max_running)
        self.item, self.expected = item, expected
        self.items = {}
        self.cancelled: set[AttemptKey] = set()
        self.handed_over: set[AttemptKey] = set()
        self.elsewhere: list[int] = []

    def submit(self, prefix: int, shared: int, own: int, max_tokens: int, resident: bool) -> None:
        name = f"r{len(self.items)}"
        prompt = [prefix * 24 + n for n in range(shared)] + [n * 7 % 96 for n in range(own)]
        whole = self.item(name, prompt, max_tokens=max_tokens, choice=len(self.items) % 2)
        if len(prompt) + max_tokens > self.b.inventory.counts().total * 4:
            return
        is_prefill = isinstance(self.b.loop.role, PrefillRole)
        if resident and not is_prefill and max_tokens > 1:
            self.submit_resident(name, prompt, max_tokens, whole)
            return
        self.items[whole.key] = whole
        if is_prefill:
            self.handed_over.add(whole.key)
        self.b.loop.submit(whole, self.b.now)

    def submit_resident(self, name, prompt, max_tokens, whole) -> None:
        try:
            blocks = self.b.pulled(tuple(prompt))
        except OutOfBlocksError:
            return
        first = self.expected(whole)[:1]
        arrived = self.item(name, prompt, max_tokens=max_tokens, choice=whole.choice, generated=first)
        self.items[arrived.key] = arrived
        self.b.loop.submit(arrived, self.b.now, blocks=blocks, computed_len=len(prompt))

    def play(self, what: str, *args) -> None:
        match what:
            case "submit":
                self.submit(*args)
            case "step":
                for _ in range(args[0]):
                    if self.b.loop.has_work():
                        self.b.step()
            case "cancel":
                key = AttemptKey(f"r{args[0]}", 0)
                self.cancelled.add(key)
                self.b.loop.cancel(key)
            case "role":
                self.b.loop.role = ROLES[args[0]]
            case "hold":
                self.elsewhere += self.b.inventory.allocate(min(args[0], self.b.inventory.counts().free))
            case "let go":
                self.let_go()
            case "fail":
                self.b.executor.failures = 1
        self.b.loop.check()

    def let_go(self) -> None:
        """What other threads do sooner or later."""
        self.b.inventory.release(self.elsewhere)
        self.elsewhere = []
        self.b.inventory.expire(self.b.now)

    def finish(self) -> None:
        for _ in range(60):
            self.b.drain(steps_max=3000)
            self.let_go()
            self.b.now += 5.0
            if not self.b.loop.load().waiting and not self.b.loop.has_work():
                break
        self.b.inventory.expire(self.b.now + 10.0)
        self.b.drain(steps_max=3000)
        self.b.assert_nothing_held()

    def verify(self) -> None:
        seen = self.b.seen
        assert sorted(seen.left) == sorted(self.items), "each attempt leaves once"
        for key, item in self.items.items():
            got, want = seen.tokens[key], self.expected(item)
            if key in self.cancelled or key in seen.given_back or key in seen.failed:
                assert got == want[: len(got)]
            elif key in self.handed_over:
                assert got == want[:1]
            else:
                assert got == want
                assert key in seen.finish


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(event, max_size=40), blocks=st.integers(6, 40), max_running=st.integers(1, 8))
def test_any_story_ends_well(bench, item, expected, events, blocks, max_running) -> None:
    story = Story(bench, item, expected, blocks, max_running)
    for what, *args in events:
        story.play(what, *args)
    story.finish()
    story.verify()
