"""What a router's commands do at a prefill worker."""

from __future__ import annotations

from functools import partial

from core.blocks import KvLayout, KvTicket
from core.errors import InvalidRequestError, TandemError
from core.request import AttemptKey, WorkItem
from engine.loop import StepLoop
from engine.role import Terms
from prefill_worker.publish import Publisher
from worker.bridge import EngineThread
from worker.kv_plane import KvPlane
from worker.links import RouterLinks
from worker.messages import Opened, OpenHandoff, Opening, StartPrefill


class PrefillHandler:
    """Admits prompts, opens their hand-offs, cancels both."""

    def __init__(
        self,
        engine: EngineThread,
        links: RouterLinks,
        kv: KvPlane,
        publisher: Publisher,
        layout: KvLayout,
        lease_s: float,
        codec: str,
    ) -> None:
        self._terms = Terms(hand_over=True, lease_s=lease_s)
        self._engine = engine
        self._links = links
        self._kv = kv
        self._publisher = publisher
        self._layout = layout
        self._lease_s = lease_s
        self._codec = codec

    def open(self, command: Opening) -> None:
        if not isinstance(command, StartPrefill):
            raise InvalidRequestError("a prefill worker takes prompts to hand over (StartPrefill) and nothing else")
        item = command.item
        self._kv.exports.open(item.key, self._lease_s)
        self._publisher.computing.add(item.key)
        self._kv.arrivals.admit(item, self._enter, self._admitted)

    def open_handoff(self, command: OpenHandoff) -> None:
        raise InvalidRequestError("a prefill worker hands blocks over; it takes none")

    def cancel(self, key: AttemptKey) -> None:
        self._publisher.computing.discard(key)
        self._kv.arrivals.cancel(key)
        self._kv.exports.revoke(key, "the attempt was cancelled")
        self._engine.cancel(key)

    def _enter(self, item: WorkItem) -> None:
        self._engine.call(partial(_submit, item, self._terms), partial(self._admitted, item.key))

    def _admitted(self, key: AttemptKey, error: TandemError | None) -> None:
        """The engine took it (its first step may be running already) or refused it."""
        if error is None:
            self._links.send(Opened(key, KvTicket(key, self._layout, self._kv.source(), self._lease_s, self._codec)))
            return
        self._links.fail(key, error)
        self.cancel(key)


def _submit(item: WorkItem, terms: Terms, loop: StepLoop, now: float) -> None:
    loop.submit(item, now, terms=terms)
