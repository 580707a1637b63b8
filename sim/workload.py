"""What a workload is: arrivals in the order of their time, whoever reads or makes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, before anybody has seen it.

    `arrival_s`: seconds since the workload began. `input_tokens` and `output_tokens`: what it asks and what it is told, 1 or
    more each. `blocks`: names of the prompt's consecutive blocks of `block_tokens` tokens each (the last may be partial), empty
    where nothing is known of its content; two prompts share a prefix exactly as far as their leading names agree. A session
    is a conversation, "" for a request of its own. `tenant` and `slo_class`: "" for the default ones.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0
    session: str = ""
    tenant: str = ""
    slo_class: str = ""
