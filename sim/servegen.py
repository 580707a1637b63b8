"""Production workloads as sums of clients, each with a rate, a burstiness and lengths of its own, which change with the hours.

Xiang et al., "ServeGen: Workload Characterization and Generation of Large Language Model Serving in Production"
(arXiv:2505.09999, 2025), its decomposition by client: what all send together is neither Poisson nor of one distribution of
lengths, while each client alone is a renewal process with Gamma or Weibull gaps, and a few clients send most of it.
"""

from __future__ import annotations

import csv
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from core.errors import ConfigError
from sim.trace_formats import shown
from sim.traces import opened
from sim.workload import Arrival, merged
from sim.workload_lengths import Apart, Lengths, Quantiles

WINDOW_S = 600.0
_GAP_KINDS = ("Gamma", "Weibull")


@dataclass(frozen=True, slots=True)
class Window:
    """A client from `start_s` on, for WINDOW_S: `rate` per second, gaps of `kind` Gamma or Weibull with that `shape`."""

    start_s: float
    rate: float
    kind: str
    shape: float

    def gaps(self, rng: random.Random) -> Callable[[], float]:
        """Draws gaps with mean 1/rate."""
        shape, mean_s = self.shape, 1.0 / self.rate
        if self.kind == "Gamma":
            return lambda: rng.gammavariate(shape, mean_s / shape)
        scale_s = mean_s / math.gamma(1 + 1 / shape)
        return lambda: rng.weibullvariate(scale_s, shape)


@dataclass(slots=True)
class Client:
    """`windows` in the order of time; `lengths` by the time in s from which they hold, never empty."""

    name: str
    windows: list[Window] = field(default_factory=list)
    lengths: list[tuple[float, Lengths]] = field(default_factory=list)

    def arrivals(self, start_s: float, end_s: float, rng: random.Random) -> Iterator[Arrival]:
        """What it sends from `start_s` to `end_s`, which counts as 0. Each window begins at a random phase of a gap."""
        for window in self.windows:
            if window.start_s + WINDOW_S <= start_s or window.start_s >= end_s:
                continue
            first, last = max(start_s, window.start_s), min(end_s, window.start_s + WINDOW_S)
            gap, lengths = window.gaps(rng), self._lengths_at(window.start_s)
            at_s = first + gap() * rng.random()
            while at_s < last:
                asked, told = lengths.draw(rng)
                yield Arrival(at_s - start_s, asked, told, tenant=self.name)
                at_s += gap()

    def _lengths_at(self, at_s: float) -> Lengths:
        """Those that hold, else the first ones."""
        place = bisect_right(self.lengths, at_s, key=lambda one: one[0])
        return self.lengths[max(0, place - 1)][1]


@dataclass(frozen=True, slots=True)
class ServeGen:
    """`without_lengths`: clients left out, because nobody published how long their requests are."""

    clients: Sequence[Client]
    without_lengths: int = 0

    @classmethod
    def read(cls, rates_path: str, lengths_path: str) -> ServeGen:
        """From a table of rates (`window_start_s,client_id,rate_rps,iat_dist,shape`) and one of quantiles of lengths
        (`client_id,t_s,field,p0,…,p100`, fields `input_tokens` and `output_tokens`), gzipped or not.

        Raises ConfigError that names file, row and column.
        """
        clients: dict[str, Client] = {}
        for row in _rows(rates_path, ("window_start_s", "client_id", "rate_rps", "iat_dist", "shape")):
            client = clients.setdefault(row.text("client_id"), Client(row.text("client_id")))
            kind = row.text("iat_dist")
            if kind not in _GAP_KINDS:
                raise row.wrong("iat_dist", f"{shown(kind)} is none of {', '.join(_GAP_KINDS)}")
            start_s = row.number("window_start_s", 0.0)
            if client.windows and start_s < client.windows[-1].start_s + WINDOW_S:
                raise row.wrong("window_start_s", f"a client's windows are {WINDOW_S:g} s long and in the order of time")
            rate, shape = row.number("rate_rps", 1e-9), row.number("shape", 1e-9)
            client.windows.append(Window(start_s, rate, kind, shape))
        for name, times in _read_lengths(lengths_path).items():
            if name in clients:
                clients[name].lengths = sorted(times.items())
        known = [client for client in clients.values() if client.lengths]
        return cls(known, len(clients) - len(known))

    def arrivals(self, start_s: float, end_s: float, rng: random.Random) -> Iterator[Arrival]:
        """What all clients send from `start_s` to `end_s`, as a stream; a client is a tenant."""
        return merged(*(client.arrivals(start_s, end_s, random.Random(rng.getrandbits(64))) for client in self.clients))


def _read_lengths(path: str) -> dict[str, dict[float, Lengths]]:
    """By client and time."""
    found: dict[tuple[str, float], dict[str, Quantiles]] = {}
    for row in _rows(path, ("client_id", "t_s", "field", "p0", "p50", "p100")):
        columns = [name for name in row.values if name[0] == "p" and name != "field"]
        values = [row.number(name, 0.0) for name in columns]
        if values != sorted(values):
            raise row.wrong("p0", "quantiles must not fall")
        key = row.text("client_id"), row.number("t_s", 0.0)
        found.setdefault(key, {})[row.text("field")] = Quantiles([float(name[1:]) for name in columns], values)
    clients: dict[str, dict[float, Lengths]] = {}
    for (client, at_s), fields in found.items():
        if {"input_tokens", "output_tokens"} <= fields.keys():
            clients.setdefault(client, {})[at_s] = Apart(fields["input_tokens"], fields["output_tokens"])
    return clients


@dataclass(frozen=True, slots=True)
class _Row:
    path: str
    number_of_row: int
    values: Mapping[str, str]

    def text(self, column: str) -> str:
        return self.values[column]

    def number(self, column: str, least: float) -> float:
        try:
            number = float(self.values[column])
        except ValueError:
            number = math.nan
        if not least <= number < math.inf:
            raise self.wrong(column, f"{shown(self.values[column])} is no number of {least:g} or more")
        return number

    def wrong(self, column: str, why: str) -> ConfigError:
        return ConfigError(f"{self.path}, row {self.number_of_row} (line {self.number_of_row + 1}), column {column}: {why}")


def _rows(path: str, columns: Sequence[str]) -> Iterator[_Row]:
    with opened(path) as lines:
        reader = csv.reader(lines)
        header = next(reader, [])
        if missing := [name for name in columns if name not in header]:
            raise ConfigError(f"{path} is no table of ServeGen's clients: it has no column {missing[0]}")
        for number, values in enumerate(reader, 1):
            if len(values) != len(header):
                why = f"the row has {len(values)} values, the first line names {len(header)}"
                raise ConfigError(f"{path}, row {number} (line {number + 1}): {why}")
            yield _Row(path, number, dict(zip(header, values, strict=True)))
