"""What a launcher hands to the process or actor it starts."""

from __future__ import annotations

import json
from dataclasses import dataclass

from core.config import Config
from core.request import WorkerRole


@dataclass(frozen=True, slots=True)
class HostSpec:
    """Everything a worker or router needs to run. Picklable, so that it can cross a process or a Ray boundary.

    `controller` is the address of the Cluster service to report to. `epoch` is this incarnation; a replacement gets a
    higher one. `listen` overrides where the host listens (`HOST:PORT`, port 0 picks one);
    routers read theirs from `config.router`.
    """

    worker_id: str
    role: WorkerRole
    epoch: int
    config: Config
    controller: str
    node: str = "local"
    listen: str = "127.0.0.1:0"

    def to_json(self) -> str:
        """One line, for the pipe to a child process."""
        return json.dumps(
            {
                "worker_id": self.worker_id,
                "role": self.role.value,
                "epoch": self.epoch,
                "config": self.config.model_dump(mode="json"),
                "controller": self.controller,
                "node": self.node,
                "listen": self.listen,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> HostSpec:
        fields = json.loads(text)
        return cls(
            **{**fields, "role": WorkerRole(fields["role"]), "config": Config.model_validate(fields["config"])},
        )
