"""Desired against actual: which incarnation to start, which to end, when to give up. Deciding only; time is an argument.

A slot is one place in a pool, named `ROLE-N`. It goes

    waiting ──launch──▶ starting ──ready──▶ ready ──drain──▶ draining
       ▲                   │                  │                  │
       └───── ended ◀──────┴── stopping ◀─────┴──────────────────┘   (a drained slot is removed instead)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from core.request import WorkerRole


@dataclass(frozen=True, slots=True)
class Launch:
    worker_id: str
    role: WorkerRole
    epoch: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End this incarnation; a grace of 0 kills it."""

    worker_id: str
    epoch: int
    grace_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    """The slot is gone for good."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The cluster cannot come up; somebody must change something."""

    reason: str


Command = Launch | Stop | Forget | GiveUp


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    start_timeout_s: float
    grace_s: float
    start_attempts: int = 3
    """Deaths of one worker before the cluster was ever ready, after which it gives up."""
    first_delay_s: float = 0.5
    max_delay_s: float = 30.0
    stable_s: float = 30.0
    """A worker ready for this long is replaced at once when it dies; a shorter life counts as another failure."""


POOL_ROLES = frozenset({WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED})


class Phase(Enum):
    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"


@dataclass(slots=True)
class Slot:
    role: WorkerRole
    epoch: int = 0
    phase: Phase = Phase.WAITING
    since: float = 0.0  # when the phase began; of a waiting slot, when it may start
    failures: int = 0  # in a row
    deadline: float = 0.0  # of a draining slot
    ready_since: float | None = None  # of this epoch
    reason: str = ""  # why it is being stopped
    removed: bool = False  # not to be started again once it has ended


class Reconciler:
    """Events in (`ready`, `ended`, `silent`, `drain`), commands out of `plan(now)`. Every method may be called in any order:
    what speaks of another epoch than the slot's is ignored."""

    def __init__(self, desired: Mapping[WorkerRole, int], policy: RestartPolicy) -> None:
        self.desired = dict(desired)
        self.slots: dict[str, Slot] = {}
        self.was_ready = False
        """The whole cluster has been ready once: from here on nothing makes it give up."""
        self._policy = policy
        self._outbox: list[Command] = []
        self._epochs: dict[str, int] = {}  # outlives slots: a name used again goes on counting

    def plan(self, now: float) -> list[Command]:
        """What to do now. Carrying it out is reported back through the other methods."""
        commands, self._outbox = self._outbox, []
        for role, count in self.desired.items():
            self._size(role, count, now, commands)
        for worker_id, slot in self.slots.items():
            match slot.phase:
                case Phase.WAITING if now >= slot.since:
                    slot.epoch, slot.phase, slot.since = slot.epoch + 1, Phase.STARTING, now
                    slot.ready_since, slot.reason = None, ""
                    self._epochs[worker_id] = slot.epoch
                    commands.append(Launch(worker_id, slot.role, slot.epoch))
                case Phase.STARTING if now - slot.since >= self._policy.start_timeout_s:
                    reason = f"not ready within {self._policy.start_timeout_s:g} s"
                    commands.append(self._stop(worker_id, slot, 0.0, reason, now))
                case Phase.DRAINING if now >= slot.deadline:
                    commands.append(self._stop(worker_id, slot, 0.0, "its drain deadline passed", now))
                case _:
                    pass
        return commands

    def ready(self, worker_id: str, epoch: int, now: float) -> None:
        slot = self._current(worker_id, epoch)
        if slot is not None and slot.phase is Phase.STARTING:
            slot.phase, slot.since, slot.ready_since = Phase.READY, now, now
            self.was_ready = self.was_ready or self.all_ready

    def ended(self, worker_id: str, epoch: int, reason: str, permanent: bool, now: float) -> None:
        """The incarnation is gone, whoever's idea it was. `permanent`: trying again cannot help."""
        slot = self._current(worker_id, epoch)
        if slot is None or slot.phase is Phase.WAITING:
            return
        self._outbox = [c for c in self._outbox if not (isinstance(c, Stop) and (c.worker_id, c.epoch) == (worker_id, epoch))]
        if slot.removed:
            del self.slots[worker_id]
            self._outbox.append(Forget(worker_id))
            return
        stable = slot.ready_since is not None and now - slot.ready_since >= self._policy.stable_s
        slot.failures = 0 if stable else slot.failures + 1
        if not self.was_ready and (permanent or slot.failures >= self._policy.start_attempts):
            self._outbox.append(GiveUp(f"{worker_id} could not start: {slot.reason or reason}"))
        slot.since = now + (self._policy.max_delay_s if permanent else self._delay_s(slot))
        slot.phase = Phase.WAITING

    def silent(self, worker_id: str, epoch: int, now: float) -> None:
        """It stopped reporting: whatever is left of it is killed before its successor starts."""
        slot = self._current(worker_id, epoch)
        if slot is not None and slot.phase in (Phase.READY, Phase.DRAINING):
            self._outbox.append(self._stop(worker_id, slot, 0.0, "it fell silent", now))

    def drain(self, worker_id: str, deadline: float) -> bool:
        """Lets it finish until `deadline`, starts a successor now. False when there is no such ready worker."""
        slot = self.slots.get(worker_id)
        if slot is None or slot.phase is not Phase.READY:
            return False
        slot.phase, slot.deadline, slot.removed = Phase.DRAINING, deadline, True
        return True

    def grow(self, role: WorkerRole) -> None:
        """One worker more of a pool is desired from now on."""
        self.desired[role] = self.desired.get(role, 0) + 1

    def retire(self, worker_id: str, deadline: float) -> bool:
        """Drains it without a successor: one worker less of its role is desired. False when there is no such ready worker."""
        if not self.drain(worker_id, deadline):
            return False
        self.desired[self.slots[worker_id].role] -= 1
        return True

    def set_role(self, worker_id: str, role: WorkerRole) -> str:
        """One worker more of that role and one less of its own are desired from now on. Why not, or an empty text."""
        slot = self.slots.get(worker_id)
        if slot is None or slot.phase is not Phase.READY or slot.removed:
            return f"{worker_id} is not ready; only a ready worker can play another role"
        if not {role, slot.role} <= POOL_ROLES:
            return f"{worker_id} is a {slot.role.value}; only prefill, decode and colocated workers change their roles"
        desired = dict(self.desired)
        if not desired.get(slot.role):
            return f"{worker_id} is no longer wanted as {slot.role.value}; it is about to end"
        desired[slot.role] -= 1
        desired[role] = desired.get(role, 0) + 1
        if bool(desired.get(WorkerRole.PREFILL)) != bool(desired.get(WorkerRole.DECODE)):
            return f"{worker_id} stays {slot.role.value}: split pools need at least one prefill and one decode worker"
        self.desired, slot.role = desired, role
        return ""

    def role_of(self, worker_id: str, epoch: int) -> WorkerRole | None:
        """What that incarnation is to play."""
        slot = self._current(worker_id, epoch)
        return slot.role if slot is not None else None

    def drained(self, worker_id: str, epoch: int, now: float) -> None:
        """Nothing runs on it any more."""
        slot = self._current(worker_id, epoch)
        if slot is not None and slot.phase is Phase.DRAINING:
            self._outbox.append(self._stop(worker_id, slot, self._policy.grace_s, "drained", now))

    @property
    def all_ready(self) -> bool:
        """Every pool that answers requests has as many ready workers as desired; stores make them quicker, no more."""
        ready = [slot.role for slot in self.slots.values() if slot.phase is Phase.READY]
        return all(ready.count(role) >= count for role, count in self.desired.items() if role is not WorkerRole.STORE)

    def wake_at(self) -> float | None:
        """When `plan` has something to do without any event; None: never."""
        times = [slot.since for slot in self.slots.values() if slot.phase is Phase.WAITING]
        times += [slot.since + self._policy.start_timeout_s for slot in self.slots.values() if slot.phase is Phase.STARTING]
        times += [slot.deadline for slot in self.slots.values() if slot.phase is Phase.DRAINING]
        return min(times, default=None)

    def _size(self, role: WorkerRole, count: int, now: float, commands: list[Command]) -> None:
        """Adds slots that are missing, ends the youngest that are too many."""
        mine = [worker_id for worker_id, slot in self.slots.items() if slot.role is role and not slot.removed]
        for _ in range(count - len(mine)):
            worker_id = next(name for n in range(len(self.slots) + 1) if (name := f"{role.value}-{n}") not in self.slots)
            self.slots[worker_id] = Slot(role, epoch=self._epochs.get(worker_id, 0), since=now)
        for worker_id in mine[count:]:
            slot = self.slots[worker_id]
            slot.removed = True
            if slot.phase is Phase.WAITING:
                del self.slots[worker_id]
                commands.append(Forget(worker_id))
            elif slot.phase is not Phase.STOPPING:
                commands.append(self._stop(worker_id, slot, self._policy.grace_s, "no longer wanted", now))

    def _current(self, worker_id: str, epoch: int) -> Slot | None:
        slot = self.slots.get(worker_id)
        return slot if slot is not None and slot.epoch == epoch else None

    def _stop(self, worker_id: str, slot: Slot, grace_s: float, reason: str, now: float) -> Stop:
        slot.phase, slot.since, slot.reason = Phase.STOPPING, now, reason
        return Stop(worker_id, slot.epoch, grace_s, reason)

    def _delay_s(self, slot: Slot) -> float:
        """Exponential from the second failure in a row on; the first replacement starts at once."""
        if slot.failures <= 1:
            return 0.0
        return min(self._policy.max_delay_s, self._policy.first_delay_s * float(2 ** min(slot.failures - 2, 16)))
