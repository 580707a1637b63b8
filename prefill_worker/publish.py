"""What the engine's steps mean outside: tokens to the router, committed blocks to whoever follows the hand-off."""

from __future__ import annotations

from core.errors import LeaseExpiredError
from core.request import AttemptKey
from engine.output import Prefilled, StepOutput
from kvtransfer.exports import Exports
from kvtransfer.handoff import ExportState
from worker.bridge import EngineThread
from worker.links import RouterLinks


class Publisher:
    """Carries step outputs to routers and followers. Used from the asyncio thread only.

    An attempt of a prefill worker lives until its export has ended: only then does it hold nothing here. `computing` are
    the attempts the engine still has to do with.
    """

    def __init__(self, engine: EngineThread, links: RouterLinks, exports: Exports) -> None:
        self.computing: set[AttemptKey] = set()
        self._engine = engine
        self._links = links
        self._exports = exports

    def on_step(self, output: StepOutput, started: float) -> None:
        """The first token goes out before anything else is done with the step: it never waits for the transfer."""
        self._links.send_step(output)
        for committed in output.committed:
            self._exports.announce(committed.key, committed.records)
        for prefilled in output.prefilled:
            self._on_prefilled(prefilled)
        self.computing.difference_update(output.left)
        for key in self._links.lose(output):
            self._exports.revoke(key, "the prompt could not be computed")

    def on_export_ended(self, key: AttemptKey, state: ExportState) -> None:
        """The hand-off is over. A prompt that is still being computed is of no use to anybody then."""
        if key in self.computing:
            self.computing.discard(key)
            self._engine.cancel(key)
            self._links.fail(key, LeaseExpiredError("the hand-off ended while its prompt was computed: nobody follows it"))
        self._engine.poke()  # its blocks are free
        self._links.finish(key, "expired" if state is ExportState.EXPIRED else "finished")

    def _on_prefilled(self, prefilled: Prefilled) -> None:
        self.computing.discard(prefilled.key)
        self._exports.close_(prefilled.key, prefilled.closing, prefilled.partial)
