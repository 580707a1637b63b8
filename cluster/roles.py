"""Which engine role a worker of a pool plays. Deciding code."""

from __future__ import annotations

from core.config import Config
from core.request import WorkerRole
from decode_worker.role import DecodeRole
from engine.role import Role
from prefill_worker.role import PrefillRole
from worker.colocated import ColocatedRole


def engine_role(config: Config, role: WorkerRole) -> Role:
    match role:
        case WorkerRole.PREFILL:
            return PrefillRole(config.transfer.lease_s)
        case WorkerRole.DECODE:
            return DecodeRole()
        case WorkerRole.COLOCATED:
            return ColocatedRole()
        case _:
            raise AssertionError(f"{role.value} is no role of the pools")
