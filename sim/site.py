"""What all simulated processes share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core.config import Config
from sim.events import Events
from sim.network import Network
from sim.post import Post
from sim.prompt import Content
from sim.watched import Books

if TYPE_CHECKING:
    from sim.plane import SimPlane
    from sim.worker import SimWorker


@dataclass(slots=True)
class Site:
    """`contents`: of the requests that are under way, by the number that their sampling is seeded with."""

    config: Config
    events: Events
    post: Post
    network: Network
    contents: dict[int, Content] = field(default_factory=dict)
    capacity_tokens: int = 0
    """KV of the smallest worker that holds whole requests."""
    workers: dict[str, SimWorker] = field(default_factory=dict)
    """The latest incarnation of each."""
    books: Books = field(default_factory=Books)
    plane: SimPlane | None = None
    """None: workers know at once what others have, and there are no stores."""

    def find(self, worker: str, epoch: int) -> SimWorker | None:
        """None: it is gone."""
        found = self.workers.get(worker)
        return found if found is not None and found.epoch == epoch and found.alive else None
