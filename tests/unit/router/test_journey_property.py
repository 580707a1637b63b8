"""Any interleaving of workers, losses, duplicates, late messages and cancels: a machine plays the workers and the clock.

Checked after every step: positions are delivered once and in order with the tokens of the undisturbed run, commands never
name a lost worker, the end comes once. At the end: every attempt begun on a worker that still lives was ended there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from hashlib import blake2b

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.blocks import KvLayout, KvSource, KvTicket
from core.errors import InvalidRequestError, OutOfBlocksError, TransferError
from core.request import AttemptKey, AttemptTiming, FinishReason, TokenEvent, WorkItem
from router import events as ev
from router.attempt import JourneySpec, Limits
from router.journey import Journey, State
from router.view import NO_CLAIM
from tandem.sampling import SamplingParams

PROMPT = (1, 2, 3)
PREFILLS = ("p0", "p1")
DECODES = ("d0", "d1")
WHOLE = ("c0",)
WORKERS = (*PREFILLS, *DECODES, *WHOLE)
LAYOUT = KvLayout(b"f" * 16, "float32", 1, 1, 8, 16)
ERRORS = (OutOfBlocksError("full"), TransferError("broken"), InvalidRequestError("strange"))


def token_after(history: tuple[int, ...]) -> int:
    return 10 + blake2b(bytes(history), digest_size=1).digest()[0] % 200


@dataclass
class Fake:
    """One worker: what it holds, and what it has said that has not arrived yet."""

    held: dict[AttemptKey, WorkItem] = field(default_factory=dict)
    said: deque[ev.WorkerEvent] = field(default_factory=deque)
    stage: dict[AttemptKey, str] = field(default_factory=dict)
    tokens: dict[AttemptKey, list[int]] = field(default_factory=dict)


class Machine(RuleBasedStateMachine):
    @initialize(max_tokens=st.integers(1, 6), attempts=st.integers(1, 6))
    def begin(self, max_tokens: int, attempts: int) -> None:
        self.now = 0.0
        self.max_tokens = max_tokens
        spec = JourneySpec("r", PROMPT, SamplingParams(max_tokens=max_tokens, seed=1))
        self.journey = Journey(spec, Limits(20, 60, attempts, 2, 5), 0.0)
        self.fakes = {name: Fake() for name in WORKERS}
        self.alive = set(WORKERS)
        self.arrived: list[ev.WorkerEvent] = []
        self.granted: set[AttemptKey] = set()
        self.closed: dict[AttemptKey, list[int]] = {}  # what prefill handed over
        self.delivered: list[int] = []
        self.finishes: list[ev.Finish] = []
        self.asked: frozenset[str] | None = None
        self.feed(ev.Woken())

    # ---- the driver

    def feed(self, event: ev.Event) -> None:
        was_done = self.journey.state is State.DONE
        commands = self.journey.handle(self.now, event)
        assert not (was_done and commands), "nothing happens after the end"
        for command in commands:
            assert not self.finishes, "the end is the last command"
            self.carry_out(command)

    def carry_out(self, command: ev.Command) -> None:
        worker = getattr(command, "worker", None)
        assert worker is None or worker in self.alive, "commands never name a lost worker"
        match command:
            case ev.Place(avoid):
                self.asked = avoid
            case ev.SendReserve(name, item) | ev.SendStartPrefill(name, item) | ev.SendGenerateLocal(name, item):
                assert item.key not in self.fakes[name].held
                assert item.token_ids == (*PROMPT, *self.delivered), "an attempt starts from the tokens delivered so far"
                if isinstance(command, ev.SendStartPrefill):
                    assert item.key in self.granted, "decode memory is reserved before prefill starts"
                self.fakes[name].held[item.key] = item
                self.fakes[name].stage[item.key] = type(command).__name__
            case ev.SendOpenHandoff(name, key, ticket):
                assert ticket.key == key
                if key in self.fakes[name].held:
                    self.fakes[name].stage[key] = "open"
            case ev.SendCancel(name, key):
                self.fakes[name].held.pop(key, None)
            case ev.Deliver(tokens):
                for token in tokens:
                    assert token.position == len(self.delivered)
                    self.delivered.append(token.token_id)
            case ev.Finish():
                self.finishes.append(command)

    # ---- placing

    @precondition(lambda self: self.asked is not None)
    @rule(choice=st.integers(0, 5), whole=st.booleans(), held_s=st.none() | st.floats(0, 10))
    def answer_place(self, choice: int, whole: bool, held_s: float | None) -> None:
        avoid, self.asked = self.asked, None
        assert avoid is not None
        prefills = [w for w in PREFILLS if w in self.alive - avoid]
        decodes = [w for w in DECODES if w in self.alive - avoid]
        wholes = [w for w in WHOLE if w in self.alive - avoid]
        if whole and wholes:
            self.feed(ev.Placed(None, wholes[0]))
        elif prefills and decodes:
            hold_until = None if held_s is None else self.now + held_s
            self.held_until = self.now if hold_until is None else hold_until
            self.feed(ev.Placed(prefills[choice % len(prefills)], decodes[choice % len(decodes)], hold_until))
        else:
            self.feed(ev.NoPlace("nobody"))

    @rule()
    def wake(self) -> None:
        self.feed(ev.Woken())

    # ---- workers

    @rule(name=st.sampled_from(WORKERS), index=st.integers(0, 3), whim=st.integers(0, 9))
    def work(self, name: str, index: int, whim: int) -> None:
        """A worker takes the next step of one attempt it holds, or, rarely, fails it."""
        fake = self.fakes[name]
        if not fake.held:
            return
        key = list(fake.held)[index % len(fake.held)]
        if whim == 0:
            del fake.held[key]
            fake.said.append(ev.AttemptFailed(name, key.attempt, ERRORS[index % 3], retryable=index < 3))
        else:
            self.step(name, fake, key, whim)

    def step(self, name: str, fake: Fake, key: AttemptKey, whim: int) -> None:
        item, say = fake.held[key], fake.said.append
        match fake.stage[key]:
            case "SendReserve":
                granted = whim > 2
                self.granted |= {key} if granted else set()
                say(ev.Reserved(name, key.attempt, granted, "full"))
                fake.stage[key] = "reserved"
                if not granted:
                    del fake.held[key]
            case "SendStartPrefill":
                say(ev.Opened(name, key.attempt, KvTicket(key, LAYOUT, KvSource(name, 1, "x"), 1.0)))
                fake.stage[key] = "opened"
            case "opened":
                self.closed[key] = self.generate(fake, key, item)
                say(ev.PrefillDone(name, key.attempt, AttemptTiming()))
                fake.stage[key] = "exported"
            case "open" if key in self.closed:
                for prefill in PREFILLS:
                    self.fakes[prefill].held.pop(key, None)  # FollowDone
                fake.tokens[key] = list(self.closed[key])
                say(ev.Joined(name, key.attempt, AttemptTiming()))
                fake.stage[key] = "running"
            case "running" | "SendGenerateLocal":
                fake.tokens.setdefault(key, list(item.token_ids[3:]))
                if len(fake.tokens[key]) < self.max_tokens:
                    self.generate(fake, key, item)

    def generate(self, fake: Fake, key: AttemptKey, item: WorkItem) -> list[int]:
        """One token, said at once; the attempt ends here with the last one (a prefill worker keeps its export)."""
        name = next(n for n, f in self.fakes.items() if f is fake)
        tokens = fake.tokens.setdefault(key, list(item.token_ids[3:]))
        token = token_after((*PROMPT, *tokens))
        tokens.append(token)
        last = len(tokens) == self.max_tokens
        event = TokenEvent(key, len(tokens) - 1, token, finish_reason=FinishReason.LENGTH if last else None)
        fake.said.append(ev.Tokens(name, key.attempt, (event,)))
        if last and name not in PREFILLS:
            del fake.held[key]
        return tokens

    @rule(name=st.sampled_from(WORKERS), count=st.integers(1, 4))
    def arrive(self, name: str, count: int) -> None:
        """What a worker said arrives: in its order, but in any order beside what the others said."""
        for _ in range(min(count, len(self.fakes[name].said))):
            event = self.fakes[name].said.popleft()
            self.arrived.append(event)
            self.feed(event)

    @precondition(lambda self: bool(self.arrived))
    @rule(index=st.integers(0, 1000))
    def arrive_again(self, index: int) -> None:
        """A duplicate; of an answer only while its worker still stands for it."""
        event = self.arrived[index % len(self.arrived)]
        if isinstance(event, ev.Tokens) and event.worker in self.alive:
            self.feed(event)

    @rule(name=st.sampled_from(WORKERS))
    def lose(self, name: str) -> None:
        self.fakes[name] = Fake()
        self.alive.discard(name)
        self.feed(ev.WorkerLost(name))

    @rule(name=st.sampled_from(WORKERS))
    def replace(self, name: str) -> None:
        self.alive.add(name)

    # ---- the user, and time

    @precondition(lambda self: len(self.arrived) > 8)
    @rule(stop=st.booleans())
    def end_early(self, stop: bool) -> None:
        self.feed(ev.StopMatched() if stop else ev.ClientCancelled())

    @rule(seconds=st.sampled_from((0.01, 0.3, 2.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        if self.journey.state is not State.DONE and self.now >= self.journey.wake_at:
            self.feed(ev.Tick())

    # ---- what must hold

    @invariant()
    def delivered_is_the_undisturbed_run(self) -> None:
        tokens: list[int] = []
        for _ in range(len(getattr(self, "delivered", ()))):
            tokens.append(token_after((*PROMPT, *tokens)))
        assert tokens == getattr(self, "delivered", [])

    @invariant()
    def what_was_sampled_is_delivered_but_for_a_first_token_that_is_kept(self) -> None:
        if hasattr(self, "journey"):
            kept = len(self.journey.log) - len(self.delivered)
            assert kept == 0 or (kept == 1 and not self.delivered and self.journey.wake_at <= self.held_until)

    @invariant()
    def the_end_comes_once(self) -> None:
        if hasattr(self, "journey"):
            assert len(self.finishes) == (self.journey.state is State.DONE)
            if self.finishes and self.finishes[0].reason is FinishReason.LENGTH:
                assert len(self.delivered) == self.max_tokens

    def teardown(self) -> None:
        if not hasattr(self, "journey"):
            return
        for _ in range(4):  # it ends by itself: the deadlines see to that
            self.now = max(self.now, self.journey.wake_at)
            self.feed(ev.Tick())
        self.now = 1e6
        self.feed(ev.Tick())
        assert len(self.finishes) == 1
        left = {name: list(fake.held) for name, fake in self.fakes.items() if fake.held}
        assert not left, "an attempt was neither finished nor cancelled"
        assert self.journey.claim == NO_CLAIM


Machine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestJourney = Machine.TestCase
