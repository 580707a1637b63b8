"""Contenders that take turns on one machine, and rivals that take theirs in processes and environments of their own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median

from benchmarks.peers import environment_of, python_of

Go = Callable[[], Awaitable[float]]
"""One transfer; returns the seconds it took."""

READY_S = 60.0
TURN_S = 30.0
PAUSE_S = 0.002  # between turns: whoever begins on a busy machine with its predecessor's slice of time spent is put off at once


class RivalGoneError(Exception):
    """A rival answered with something else than a time, or not at all."""


def timed(work: Callable[[], Awaitable[object]]) -> Go:
    async def go() -> float:
        started = time.perf_counter()
        await work()
        return time.perf_counter() - started

    return go


async def in_turns(contenders: Mapping[str, Go], rounds: int) -> dict[str, float]:
    """Median seconds of each: everybody once per round, somebody else first each time, after a round that counts for nothing.

    A rival that gives up is left out of the answer, and said so.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for number in range(rounds + 1):
        for name in tuple(order):
            await asyncio.sleep(PAUSE_S)
            try:
                took_s = await contenders[name]()
            except RivalGoneError as error:
                print(f"{name}: not measured ({error})", file=sys.stderr)
                order.remove(name)
                continue
            if number:
                taken[name].append(took_s)
        order = order[1:] + order[:1]
    return {name: median(seconds) for name, seconds in taken.items() if name in order}


def times(seen: Mapping[str, float], ours: str, theirs: str) -> float | None:
    """How many times as fast `ours` was; None when one of them was not measured."""
    return seen[theirs] / seen[ours] if ours in seen and theirs in seen else None


class Rival:
    """A script that says `ready` and then, for each line with a number of bytes, `took SECONDS` of one transfer."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, still: bool) -> None:
        self._name, self._process, self._still = name, process, still

    def moves(self, size: int) -> Go:
        async def go() -> float:
            assert self._process.stdin is not None
            try:
                self.stop(False)
                self._process.stdin.write(f"{size}\n".encode())
                return float(await self.answer("took", TURN_S))
            except (OSError, ValueError) as error:
                raise RivalGoneError(f"{self._name} broke: {error}") from None
            finally:
                self.stop(True)

        return go

    def stop(self, stop: bool) -> None:
        """Halts its whole group between its turns, or lets it go on. Of rivals that were asked to stand still alone."""
        if self._still and self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGSTOP if stop else signal.SIGCONT)

    async def answer(self, word: str, timeout_s: float) -> str:
        """What follows `word` on the next line that begins with it; rivals print much else. Raises RivalGoneError."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                while line := (await self._process.stdout.readline()).decode(errors="replace"):
                    if line.startswith(word):
                        return line.removeprefix(word).strip()
        except TimeoutError:
            raise RivalGoneError(f"{self._name} is silent for {timeout_s:g} s") from None
        raise RivalGoneError(f"{self._name} has ended: {await self._last_words()}")

    async def _last_words(self) -> str:
        assert self._process.stderr is not None
        said = (await self._process.stderr.read()).decode(errors="replace").strip().splitlines()
        return said[-1] if said else "without a word"


@asynccontextmanager
async def rival(
    name: str, script: str, *words: str, ours: bool = False, still: bool = False, **settings: str
) -> AsyncIterator[Rival | None]:
    """`script` of this folder in the environment of the peer `name` (in ours when `ours`), with `settings` in its environment.

    `still`: halted while it is not its turn, for those whose threads spin and would take the others' cores.
    None when it is not installed, or does not get ready; why is said on standard error.
    """
    python = Path(sys.executable) if ours else python_of(name)
    if python is None:
        print(f"{name}: not measured (not installed: python -m benchmarks.peers {name})", file=sys.stderr)
        yield None
        return
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        str(python), str(Path(__file__).with_name(script)), *words,
        stdin=pipe, stdout=pipe, stderr=pipe, limit=2**20, env=environment_of(name, **settings),
        process_group=0 if still else None,
    )  # fmt: skip
    made = Rival(name, process, still)
    try:
        try:
            print(f"{name} is ready {await made.answer('ready', READY_S)}", file=sys.stderr)
        except RivalGoneError as error:
            print(f"{name}: not measured ({error})", file=sys.stderr)
            yield None
        else:
            yield made
    finally:
        made.stop(False)
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Standard input ends; a script that does not end by itself then is killed."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(10):
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
