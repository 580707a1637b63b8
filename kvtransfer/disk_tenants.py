"""Whose blocks are on disk: names of tenants by their numbers, in a file beside the segments.

A record's header has room for a number alone. A tenant's number is the hash of its name, so a tenant whose entry was lost
(in a power cut) is nobody, never somebody else. Entries are appended before the first record that names them, and
those that no record names any more are left out at the next start.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Collection
from pathlib import Path

import xxhash

from kvtransfer.segment_file import FileCalls

FILE_NAME = "tenants"
TENANT_BYTES_MAX = 1024
TENANTS_MAX = 65_536  # of one directory; what belongs to others is nobody's after a restart
NOBODY = 0
_ENTRY = struct.Struct("<HQ")  # length of the name that follows, and its number


class DiskTenants:
    """For one thread at a time."""

    def __init__(self, directory: Path, calls: FileCalls) -> None:
        self._path = directory / FILE_NAME
        self._calls = calls
        self._names: dict[int, bytes] = {}
        self._end = 0  # of the entries that are whole
        self._fd = -1

    def __len__(self) -> int:
        return len(self._names)

    def read(self) -> None:
        """Takes up what an earlier process left, as far as it is whole. Raises OSError."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        while len(data) >= self._end + _ENTRY.size and len(self) < TENANTS_MAX:
            length, number = _ENTRY.unpack_from(data, self._end)
            name = data[self._end + _ENTRY.size : self._end + _ENTRY.size + length]
            if not name or number != number_of(name):
                return
            self._names[number] = name
            self._end += _ENTRY.size + length

    def name(self, number: int) -> bytes:
        """Empty for nobody, and for a number that is not known."""
        return self._names.get(number, b"")

    def note(self, tenant: bytes) -> int:
        """The tenant's number, in the file from now on. Raises OSError."""
        number = number_of(tenant)
        if number == NOBODY or number in self._names:
            return number
        if len(tenant) > TENANT_BYTES_MAX or len(self) >= TENANTS_MAX:
            return NOBODY
        if self._fd < 0:
            self._fd = self._calls.open(self._path, os.O_RDWR | os.O_CREAT)
            os.ftruncate(self._fd, self._end)  # a torn entry must not stand before ours
        entry = _ENTRY.pack(len(tenant), number) + tenant
        if self._calls.pwritev(self._fd, [memoryview(entry)], self._end) < len(entry):
            raise OSError(f"{self._path} takes no more bytes")
        self._names[number] = tenant
        self._end += len(entry)
        return number

    def keep(self, tenants: Collection[bytes]) -> None:
        """Forgets the others; to be called before the first `note`. A disk that does not let us costs nothing: they stay."""
        kept = {number: name for number, name in self._names.items() if name in tenants}
        if len(kept) == len(self._names):
            return
        entries = b"".join(_ENTRY.pack(len(name), number) + name for number, name in kept.items())
        fresh = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            fresh.write_bytes(entries)
            fresh.replace(self._path)
            self._names, self._end = kept, len(entries)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def number_of(tenant: bytes) -> int:
    return xxhash.xxh3_64_intdigest(tenant) or 1 if tenant else NOBODY
