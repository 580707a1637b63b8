"""The bridge between the asyncio thread and the engine thread, which alone touches the step loop and its tensors.

Commands go down as closures through a bounded inbox; results and step outputs come up through `call_soon_threadsafe`,
one call per step. The engine thread sleeps on a condition while it has nothing to do. When it crashes, `finished` carries
the error and the worker ends: a half-alive engine is never kept.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from core.clock import Clock
from core.cost_model import Fit, StepShape
from core.errors import InternalError, OverloadedError, TandemError
from core.request import AttemptKey
from core.step_learner import StepLearner
from core.telemetry import STEP_SECONDS, Histogram
from engine.loop import StepLoop
from engine.output import EngineLoad, StepOutput

log = logging.getLogger(__name__)

INBOX_MAX = 4096
MEMORY_RETRY_S = 0.01
STEPS_REMEMBERED = 512


Work = Callable[[StepLoop, float], None]
Done = Callable[[TandemError | None], None]


class _Command(NamedTuple):
    run: Work
    done: Done | None


class EngineThread:
    """Owns the step loop. Every method is for the asyncio thread unless it says otherwise.

    `load` is a snapshot taken after the latest step or command.
    """

    def __init__(self, loop: StepLoop, clock: Clock, *, inbox_max: int = INBOX_MAX) -> None:
        self.load: EngineLoad = loop.load()
        self.step_s = Histogram(STEP_SECONDS)
        self.computed_tokens = 0
        self._steps: deque[tuple[StepShape, float]] = deque(maxlen=STEPS_REMEMBERED)  # not yet learned from
        self._learner = StepLearner()
        self._loop = loop
        self._on_output: Callable[[StepOutput, float], None] = _nobody
        self._clock = clock
        self._inbox_max = inbox_max
        self._inbox: deque[_Command] = deque()
        self._wake = threading.Condition(threading.Lock())
        self._stopping = False
        self._poked = False
        self._aio = asyncio.get_running_loop()
        self.finished: asyncio.Future[None] = self._aio.create_future()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self, on_output: Callable[[StepOutput, float], None]) -> None:
        """`on_output(output, started)` hears, on the asyncio thread, of every step that has something to say."""
        self._on_output = on_output
        self._thread.start()

    def call(self, run: Work, done: Done) -> None:
        """Has `run(loop, now)` executed between two steps, then `done(error)` here, before anything of the step that follows.

        `error` is the TandemError that `run` raised. Raises OverloadedError when the inbox is full.
        """
        self._put(_Command(run, done))

    def cancel(self, key: AttemptKey) -> None:
        """Drops an attempt between two steps. Never refused: there are no more of these than attempts."""
        with self._wake:
            if not self._stopping:
                self._inbox.append(_Command(lambda loop, _: loop.cancel(key), None))
                self._wake.notify()

    def step_cost(self) -> Fit | None:
        """What steps cost here, learned from those that ran; None before enough did."""
        while self._steps:
            self._learner.observe(*self._steps.popleft())
        return self._learner.fit()

    def poke(self) -> None:
        """Memory became free: what waits for it is tried again now. Any thread may call it."""
        with self._wake:
            self._poked = True
            self._wake.notify()

    async def stop(self, timeout_s: float) -> bool:
        """Ends the thread after its present step; False when that takes longer than `timeout_s`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is None:
            return True
        await asyncio.wait((self.finished,), timeout=timeout_s)
        return self.finished.done()

    def _put(self, command: _Command) -> None:
        with self._wake:
            if self._stopping or self.finished.done():
                raise OverloadedError("the engine of this worker is stopping; the request must go to another worker")
            if len(self._inbox) >= self._inbox_max:
                raise OverloadedError(f"{self._inbox_max} commands wait for this worker's engine; try again later")
            self._inbox.append(command)
            self._wake.notify()

    # ---- the engine thread from here on

    def _main(self) -> None:
        error: BaseException | None = None
        try:
            while self._turn():
                pass
        except BaseException as crash:
            log.exception("the engine thread crashed")
            error = crash
        self._cross(self._finish, error)

    def _turn(self) -> bool:
        """One round: commands, then a step. False when it is time to end."""
        commands = self._next_commands()
        if commands is None:
            return False
        if commands:
            self._execute(commands)
        if self._loop.has_work():
            self._step()
        return True

    def _next_commands(self) -> list[_Command] | None:
        """Takes what is in the inbox; sleeps while there is neither a command nor work that can be done."""
        with self._wake:
            if not self._loop.has_work():
                # What waits although there is no work waits for memory, which other threads free without telling us.
                timeout_s = MEMORY_RETRY_S if self.load.waiting else None
                self._wake.wait_for(lambda: self._inbox or self._stopping or self._poked, timeout_s)
            if self._stopping:
                return None
            self._poked = False
            commands = list(self._inbox)
            self._inbox.clear()
            return commands

    def _execute(self, commands: list[_Command]) -> None:
        settled: list[tuple[Done, TandemError | None]] = []
        now = self._clock.now()
        for command in commands:
            error = self._run(command, now)
            if command.done is not None:
                settled.append((command.done, error))
        self.load = self._loop.load()
        if settled:
            self._cross(_settle, settled)

    def _run(self, command: _Command, now: float) -> TandemError | None:
        try:
            command.run(self._loop, now)
        except TandemError as refused:
            return refused
        except Exception as mistake:
            log.exception("a command to the engine failed")
            return InternalError(f"the engine failed on this request: {type(mistake).__name__}")
        return None

    def _step(self) -> None:
        started = self._clock.now()
        output = self._loop.step(started)
        self.load = self._loop.load()
        if output.num_tokens:
            took_s = self._clock.now() - started
            self.step_s.observe(took_s)
            self._steps.append((output.shape, took_s))
            self.computed_tokens += output.num_tokens
        if _says_something(output):
            self._cross(self._on_output, output, started)

    def _cross(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._aio.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the asyncio loop is closed: nobody is left to hear of it
            log.debug("the asyncio loop closed before the engine thread ended")

    # ---- back on the asyncio thread

    def _finish(self, error: BaseException | None) -> None:
        self._fail_waiting()
        if self.finished.done():
            return
        if error is None:
            self.finished.set_result(None)
        else:
            self.finished.set_exception(error)
            self.finished.exception()  # known to be there: nobody has to ask

    def _fail_waiting(self) -> None:
        with self._wake:
            waiting, self._inbox = self._inbox, deque()
        error = OverloadedError("the engine of this worker ended")
        _settle([(command.done, error) for command in waiting if command.done is not None])


def _nobody(output: StepOutput, started: float) -> None:
    raise AssertionError("the engine thread was started without a listener")


def _says_something(output: StepOutput) -> bool:
    return bool(
        output.tokens
        or output.committed
        or output.prefilled
        or output.joined
        or output.left
        or output.given_back
        or output.failed
    )


def _settle(settled: list[tuple[Done, TandemError | None]]) -> None:
    """Not through futures: their callbacks would run a turn later, behind the outcome of the step that follows."""
    for done, error in settled:
        done(error)
