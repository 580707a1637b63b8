"""Carries faults out."""

from __future__ import annotations

from collections.abc import Iterable

from core.errors import ConfigError
from sim.faults import LASTING_S, Fault
from sim.plane import SimPlane
from sim.worker import SimWorker
from sim.world import WARM_S, World

OUTSIDE = 1
"""The side of a partition on which whoever is cut off is alone: workers cut off at the same time do not reach each other."""


class Mischief:
    """Has `faults` happen to a world; raises ConfigError for one that cannot. What aims at the dead hits nobody."""

    def __init__(self, world: World, faults: Iterable[Fault]) -> None:
        self.done = 0
        self._world = world
        self._sides = OUTSIDE
        self._losing: list[float] = []
        faults = list(faults)
        if world.site.plane is None and any(fault.kind == "lose_directory" for fault in faults):
            raise ConfigError("lose_directory: no directory is simulated; set sim.directory: true, or leave the fault out")
        for fault in faults:
            world.events.at(WARM_S + fault.at_s, self._do, fault)

    def _do(self, fault: Fault) -> None:
        world = self._world
        if fault.kind == "lose_reports":
            self._lose(fault)
            return
        if fault.kind == "lose_directory":
            self._lose_directory(fault)
            return
        if fault.kind == "add":
            world.controller.refill(fault.target)
            return
        if world.site.plane is not None and fault.target in world.site.plane.stores:
            self._to_store(world.site.plane, fault)
            return
        worker = world.site.workers.get(fault.target)
        if worker is None or not worker.alive:
            return
        self.done += 1
        match fault.kind:
            case "kill":
                self._kill(worker, fault)
            case "notice":
                notice_s = world.site.config.sim.notice_s if fault.for_s is None else fault.for_s
                if not fault.refill:
                    world.controller.leave_empty(worker.name)
                world.controller.drain(worker, world.events.now() + notice_s)
                world.events.later(notice_s, lambda: self._kill(worker, fault))
            case "partition":
                self._cut_off(worker, _lasts_s(fault))
            case "slow":
                self._slow(worker.name, fault)

    def _to_store(self, plane: SimPlane, fault: Fault) -> None:
        store, world = plane.stores[fault.target], self._world
        if not store.alive:
            return
        self.done += 1
        match fault.kind:
            case "kill":
                plane.kill(store)
            case "notice":
                store.accepting = False
                notice_s = world.site.config.sim.notice_s if fault.for_s is None else fault.for_s
                world.events.later(notice_s, lambda: plane.kill(store))
            case "partition":
                self._sides += 1
                world.post.cut_off(store.name, self._sides)
                world.events.later(_lasts_s(fault), lambda: world.post.cut_off(store.name, 0))
            case "slow":
                self._slow(store.name, fault)

    def _slow(self, name: str, fault: Fault) -> None:
        network = self._world.site.network
        network.set_speed(name, fault.share)
        self._world.events.later(_lasts_s(fault), lambda: network.set_speed(name, 1.0))

    def _lose_directory(self, fault: Fault) -> None:
        plane = self._world.site.plane
        if plane is not None:
            self.done += 1
            plane.directory.lose(_lasts_s(fault))

    def _kill(self, worker: SimWorker, fault: Fault) -> None:
        if not fault.refill:
            self._world.controller.leave_empty(worker.name)
        self._world.kill(worker)

    def _cut_off(self, worker: SimWorker, lasts_s: float) -> None:
        world = self._world
        self._sides += 1
        worker.cut()
        worker.talk.let_all_go()
        world.post.cut_off(worker.name, self._sides)
        for router in world.routers:
            router.links.apart(worker.name)
        world.events.later(lasts_s, lambda: world.post.cut_off(worker.name, 0))

    def _lose(self, fault: Fault) -> None:
        controller = self._world.controller
        self.done += 1
        self._losing.append(fault.share)
        controller.reports_lost = max(self._losing)

        def over() -> None:
            self._losing.remove(fault.share)
            controller.reports_lost = max(self._losing, default=0.0)

        self._world.events.later(_lasts_s(fault), over)


def _lasts_s(fault: Fault) -> float:
    return LASTING_S if fault.for_s is None else fault.for_s
