"""Whether a directory can be kept in the Redis that the configuration names; asked once, when a cluster starts."""

from __future__ import annotations

import ssl

from redis import exceptions

from core.errors import ConfigError
from kvtransfer.directory import DirectoryError
from kvtransfer.redis_link import open_link
from kvtransfer.redis_scripts import CHECK
from kvtransfer.redis_url import parse_redis_url

_REFUSED = (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)


async def check_redis(url: str, timeout_s: float) -> str:
    """Asks, once, whether a directory can be kept there. Returns what is wrong for now; nothing when all is well.

    Raises ConfigError for what waiting will not mend: a URL that is none, a password refused, commands or keys forbidden, a
    certificate that is not trusted, TLS where there is none, a replica that takes no writes.
    """
    target = parse_redis_url(url)
    link = open_link(target, timeout_s)
    try:
        await link.run(f"{target.prefix}{{0}}".encode(), CHECK, (), timeout_s)
    except DirectoryError as error:
        fault = error.__cause__
        hint = _hint(fault)
        if hint:
            raise ConfigError(f"redis: {target}: {fault}; {hint}") from None
        doubt = "; check that it speaks TLS there" if target.tls else ""
        return f"{target} does not answer: {fault or type(fault).__name__}{doubt}"
    finally:
        await link.close()
    return ""


def _hint(fault: BaseException | None) -> str:
    """What to change, for faults that stay."""
    while fault is not None:
        if isinstance(fault, _REFUSED):
            return "check the name and password in its URL and the rights of that user"
        if isinstance(fault, ssl.SSLError):
            return "check that it speaks TLS there, and `ca` and `verify` in its URL"
        if isinstance(fault, exceptions.ResponseError):  # of a command inside a script the kind is told in words alone
            words = str(fault)
            if "READONLY" in words:
                return "this is a replica: name its master, or its Sentinels with redis+sentinel://"
            if words.startswith(("MOVED", "CROSSSLOT")) or isinstance(fault, exceptions.MovedError):
                return "this is a Redis Cluster: say redis+cluster://"
            if words.startswith(("NOAUTH", "NOPERM", "WRONGPASS")) or "can't run this command" in words:
                return "check the name and password in its URL and the rights of that user"
        fault = fault.__cause__ or fault.__context__
    return ""
