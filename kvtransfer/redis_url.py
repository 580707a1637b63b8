"""URLs of a Redis, in every form we know, read once and checked in full.

    redis://[[USER]:PASSWORD@]HOST[:PORT][/DB]                                one server; rediss:// with TLS
    unix://[[USER]:PASSWORD@]/PATH/TO/SOCKET[?db=DB]                          one server on this host
    redis+sentinel://[[USER]:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]/SERVICE[/DB] the master that Sentinels name; rediss+sentinel://
    redis+cluster://[[USER]:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]               a Redis Cluster; rediss+cluster://

Options follow after `?`: `prefix` of all our keys (`tandem`; two clusters on one Redis need two), `sentinel_username` and
`sentinel_password`, and with TLS `ca`, `cert` and `key` (PEM files) and `verify` (`full`, `ca` for any host name, `none`).
Letters that mean something in a URL are percent-encoded in passwords.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from core.errors import ConfigError

PREFIX = "tandem"
_PORTS = {"single": 6379, "cluster": 6379, "sentinel": 26379}
_VERIFY = {"full": ("required", True), "ca": ("required", False), "none": ("none", False)}
_TLS_OPTIONS = {"ca": "ssl_ca_certs", "cert": "ssl_certfile", "key": "ssl_keyfile"}
_ENCODED = " (are / ? # @ : in the password percent-encoded?)"
_LOGIN = ("username", "password")
_OPTIONS = ("prefix", "db", "sentinel_username", "sentinel_password", "verify", *_TLS_OPTIONS)


@dataclass(frozen=True, slots=True)
class RedisTarget:
    """What a URL says. `tls` holds the arguments of a TLS connection of redis-py; empty: no TLS."""

    kind: Literal["single", "unix", "sentinel", "cluster"]
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    service: str = ""
    db: int = 0
    prefix: str = PREFIX
    login: dict[str, str] = field(default_factory=dict, repr=False)
    sentinel_login: dict[str, str] = field(default_factory=dict, repr=False)
    tls: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """For people: no password in it."""
        if self.kind == "unix":
            return self.path
        places = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{self.service} by {places}" if self.service else places


def parse_redis_url(url: str) -> RedisTarget:
    """Raises ConfigError that says what is wrong, without repeating the password."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise _wrong(str(error)) from None
    scheme, _, form = parts.scheme.partition("+")
    if scheme == "unix" and not form:
        return _unix(parts)
    if scheme not in ("redis", "rediss") or form not in ("", "sentinel", "cluster"):
        known = "redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
        raise _wrong(f"it begins with {known}, not with {parts.scheme + '://' if parts.scheme else 'nothing'}")
    kind: Literal["single", "sentinel", "cluster"] = form or "single"  # type: ignore[assignment]
    options = _options(parts)
    hosts = _hosts(parts, _PORTS[kind])
    if kind == "single" and len(hosts) > 1:
        raise _wrong("several hosts; say redis+sentinel:// or redis+cluster:// for what they are")
    service, db = _path(parts, kind)
    if options.get("db"):
        db = options["db"]
    if kind == "cluster" and db not in ("", "0"):
        raise _wrong("a Redis Cluster has database 0 alone; use `prefix` to keep clusters apart")
    return RedisTarget(
        kind=kind,
        hosts=hosts,
        service=service,
        db=_number(db or "0", "database", 0, 65_535),
        prefix=_prefix(options),
        login=_login(parts),
        sentinel_login={
            name: options[f"sentinel_{name}"] for name in ("username", "password") if f"sentinel_{name}" in options
        },
        tls=_tls(options) if scheme == "rediss" else _no_tls(options),
    )


def _unix(parts: SplitResult) -> RedisTarget:
    options = _options(parts)
    _no_tls(options)
    if not parts.path.startswith("/"):
        raise _wrong("unix:// takes the absolute path of a socket, as in unix:///run/redis.sock")
    db = _number(options.get("db") or "0", "database", 0, 65_535)
    return RedisTarget("unix", path=unquote(parts.path), db=db, prefix=_prefix(options), login=_login(parts))


def _login(parts: SplitResult) -> dict[str, str]:
    user, colon, password = parts.netloc.rpartition("@")[0].partition(":")
    found = {"username": unquote(user), "password": unquote(password)} if colon else {}
    if user and not colon:
        raise _wrong("a name without a password; write :PASSWORD@ for a password alone")
    return {name: value for name, value in found.items() if value}


def _hosts(parts: SplitResult, default_port: int) -> tuple[tuple[str, int], ...]:
    found = []
    for place in parts.netloc.rpartition("@")[2].split(","):
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/\s]+)(?::(\d+))?", place)
        if match is None:
            raise _wrong(f"its address is no HOST or HOST:PORT{_ENCODED}")
        host, port = match.groups()
        found.append((host.strip("[]"), _number(port, "port", 1, 65_535) if port else default_port))
    return tuple(found)


def _path(parts: SplitResult, kind: str) -> tuple[str, str]:
    """(service, database) of the URL's path."""
    steps = [unquote(step) for step in parts.path.split("/")[1:] if step]
    if kind == "sentinel":
        if not 1 <= len(steps) <= 2:
            raise _wrong("Sentinels are asked for a service: redis+sentinel://HOST:PORT/SERVICE[/DB]")
        return steps[0], "".join(steps[1:])
    if len(steps) > 1:
        raise _wrong(f"one number of a database may follow the address, no more{_ENCODED}")
    return "", "".join(steps)


def _options(parts: SplitResult) -> dict[str, str]:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.fragment or not all(name.replace("_", "").isalpha() for name in options):
        raise _wrong(f"what follows the address is not understood{_ENCODED}")
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise _wrong(f"option {unknown[0]!r} is not known; there are {', '.join(_OPTIONS)}")
    return options


def _prefix(options: dict[str, str]) -> str:
    prefix = options.get("prefix", PREFIX)
    if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,32}", prefix):
        raise _wrong("`prefix` has 1 to 32 letters, digits and _ . : -")
    return prefix


def _tls(options: dict[str, str]) -> dict[str, Any]:
    verify = options.get("verify", "full")
    if verify not in _VERIFY:
        raise _wrong(f"verify={verify}; it is one of {', '.join(_VERIFY)}")
    files = {argument: options[name] for name, argument in _TLS_OPTIONS.items() if options.get(name)}
    for path in files.values():
        _readable(path)
    if ("ssl_certfile" in files) != ("ssl_keyfile" in files):
        raise _wrong("`cert` and `key` belong together; give both")
    required, check_hostname = _VERIFY[verify]
    return {"ssl_cert_reqs": required, "ssl_check_hostname": check_hostname, **files}


def _no_tls(options: dict[str, str]) -> dict[str, Any]:
    given = [name for name in ("verify", *_TLS_OPTIONS) if name in options]
    if given:
        raise _wrong(f"`{given[0]}` is for TLS, which a URL asks for with rediss://")
    return {}


def _readable(path: str) -> None:
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise _wrong(f"cannot read {path}: {error.strerror}") from None


def _number(text: str, what: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise _wrong(f"what stands where the {what} goes is no number from {least} to {most}{_ENCODED}")
    return int(text)


def _wrong(what: str) -> ConfigError:
    return ConfigError(f"redis: the URL cannot be used: {what}")
