"""What a request is served on: its class, tenant, limits and priority, from the configuration and the call. Deciding code.

A class is a name for limits and a priority. Limits that a call names take the place of its class's; a call that names
limits and no class is held to exactly these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from core.config import RouterConfig
from core.errors import InvalidRequestError
from core.request import Slo
from router.frontend_types import FrontRequest

NAME_CHARS_MAX = 128
NAMES_SHOWN = 20
DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True)
class Terms:
    """`priority`: higher goes first. `deadline_s`: for the whole answer, from arrival; None: the router's own."""

    slo_class: str = ""
    tenant: str = DEFAULT_TENANT
    slo: Slo = field(default_factory=Slo)
    priority: int = 0
    deadline_s: float | None = None


class TermError(InvalidRequestError):
    """A fault of one of the things a call may say, named by its field."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class TermsOf:
    """Resolves calls by the router's configuration."""

    def __init__(self, config: RouterConfig) -> None:
        self._classes = config.classes
        self._tenants = config.tenants
        self._default_class = config.default_class

    def __call__(self, asked: FrontRequest) -> Terms:
        """Raises TermError: a class or tenant there is not, limits that cannot be met or contradict each other."""
        check_limits(asked.slo, asked.deadline_s)
        tenant = self._tenant(asked.tenant)
        name = asked.slo_class or self._class_of(tenant)
        found = self._classes.get(name)
        if found is None:
            raise TermError("slo_class", f"slo_class {_short(name)} is not known here; choose one of {_names(self._classes)}")
        slo = Slo(found.ttft_s, found.tbt_s, found.tpot_s)
        if asked.slo != Slo():
            base = slo if asked.slo_class else Slo()
            slo = Slo(
                base.ttft_s if asked.slo.ttft_s is None else asked.slo.ttft_s,
                base.tbt_s if asked.slo.tbt_s is None else asked.slo.tbt_s,
                base.tpot_s if asked.slo.tpot_s is None else asked.slo.tpot_s,
            )
        return Terms(name, tenant, slo, found.priority + asked.priority, asked.deadline_s)

    def _tenant(self, name: str) -> str:
        if len(name) > NAME_CHARS_MAX or not name.isprintable():
            raise TermError("tenant", f"a tenant's name has at most {NAME_CHARS_MAX} printable characters, got {_short(name)}")
        if not self._tenants:
            return name or DEFAULT_TENANT
        if not name and DEFAULT_TENANT not in self._tenants:
            raise TermError("tenant", f"the request names no tenant; name one of {_names(self._tenants)}")
        if (name or DEFAULT_TENANT) not in self._tenants:
            raise TermError("tenant", f"tenant {_short(name)} is not known here; name one of {_names(self._tenants)}")
        return name or DEFAULT_TENANT

    def _class_of(self, tenant: str) -> str:
        known = self._tenants.get(tenant)
        return known.slo_class if known is not None and known.slo_class else self._default_class


def check_limits(slo: Slo, deadline_s: float | None) -> None:
    """Raises TermError for limits that no request could meet or miss, or of which one makes another void."""
    limits = {"ttft_slo_s": slo.ttft_s, "tbt_slo_s": slo.tbt_s, "tpot_slo_s": slo.tpot_s}
    for name, limit_s in (*limits.items(), ("deadline_s", deadline_s)):
        if limit_s is not None and not (math.isfinite(limit_s) and limit_s > 0):
            raise TermError(name, f"{name} must be a positive number of seconds, got {limit_s}; or leave it out")
    if deadline_s is not None:
        for name, limit_s in limits.items():
            if limit_s is not None and limit_s > deadline_s:
                text = f"{name} ({limit_s:g}) allows more than deadline_s ({deadline_s:g}), which is for the whole answer"
                raise TermError(name, f"{text}; raise deadline_s or lower {name}")
    if slo.tpot_s is not None and slo.tbt_s is not None and slo.tpot_s > slo.tbt_s:
        text = f"tpot_slo_s ({slo.tpot_s:g}), for the mean gap, is above tbt_slo_s ({slo.tbt_s:g}), for the mean of the slowest"
        raise TermError("tpot_slo_s", f"{text} tenth, which is never below it; lower tpot_slo_s or leave it out")


def _names(known: Iterable[str]) -> str:
    names = sorted(known)
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")


def _short(name: str) -> str:
    return repr(name if len(name) <= 40 else name[:37] + "...")
