"""What the router knows of the served model, gathered from the workers' reports. Deciding code."""

from __future__ import annotations

from core.errors import UnavailableError
from core.request import WorkerRole
from router.frontend_types import ModelCard
from router.view import ClusterView, WorkerView

VERSION_UNKNOWN = "unknown"


class ModelKnowledge:
    """Remembers the card when every worker is gone: requests may wait for a replacement, so they are still checked."""

    def __init__(self, name: str, version: str) -> None:
        self._name = name
        self._version = version
        self._card: ModelCard | None = None
        self._view: ClusterView | None = None

    def card(self, view: ClusterView) -> ModelCard:
        """Raises UnavailableError until a worker has reported its model."""
        if view is not self._view:
            self._view = view
            self._card = self._gather(view) or self._card
        if self._card is None:
            raise UnavailableError("no worker has loaded the model yet; retry in a moment", retry_after_s=1.0)
        return self._card

    def _gather(self, view: ClusterView) -> ModelCard | None:
        workers = [w for w in view.serving() if w.max_model_len and w.layout is not None]
        if not workers:
            return None
        one = workers[0]
        assert one.layout is not None
        context = min(w.max_model_len for w in workers)
        return ModelCard(
            name=self._name or one.model_name,
            version=self._version,
            max_model_len=min([context, *_kv_tokens(workers)]),
            vocab_size=one.vocab_size,
            fingerprint=one.layout.fingerprint.hex(),
            dtype=one.layout.dtype,
        )


def _kv_tokens(workers: list[WorkerView]) -> list[int]:
    """Tokens of KV that the largest worker which can hold a whole request has room for; longer ones could never run."""
    whole = [w for w in workers if w.role is not WorkerRole.PREFILL and w.blocks_total]
    sizes = [w.blocks_total * w.layout.block_size for w in whole if w.layout is not None]
    return [max(sizes)] if sizes else []
