"""Policies by name. Deciding code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from core.errors import ConfigError
from router.baselines import Conductor, KvCost, PowerOfTwo, PrefixAware, Random, RoundRobin, Splitwise
from router.goodput import Goodput
from router.policy import LeastLoad, Policy

POLICIES: Mapping[str, Callable[[], Policy]] = MappingProxyType(
    {
        "goodput": Goodput,
        "least_load": LeastLoad,
        "random": Random,
        "round_robin": RoundRobin,
        "power_of_two": PowerOfTwo,
        "prefix_aware": PrefixAware,
        "kv_cost": KvCost,
        "conductor": Conductor,
        "splitwise": Splitwise,
    }
)


def make_policy(name: str) -> Policy:
    """Raises ConfigError naming the policies there are."""
    if name not in POLICIES:
        raise ConfigError(f"router.policy {name!r} is not known; choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()


def name_of(policy: Policy) -> str:
    """The name it is chosen by; that of its class for one that is not in the list."""
    return next((name for name, kind in POLICIES.items() if kind is type(policy)), type(policy).__name__)
