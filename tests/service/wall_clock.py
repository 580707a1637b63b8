"""A wall clock that a test can set, for processes it starts: clock_shift.c, built and preloaded."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clock_shift.c")
BUILD_TIMEOUT_S = 60.0


class WallClock:
    """Processes started with `environment` see the wall clock shifted by what `set` said last. Needs a C compiler."""

    def __init__(self, folder: Path) -> None:
        self._library, shift = folder / "clock_shift.so", folder / "shift_s"
        compiler = next(found for name in ("cc", "gcc", "clang") if (found := shutil.which(name)))
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(self._library), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True, capture_output=True, timeout=BUILD_TIMEOUT_S)
        shift.write_bytes(struct.pack("q", 0))
        with shift.open("r+b") as file:
            self._shift = mmap.mmap(file.fileno(), 8)
        self.environment = {"LD_PRELOAD": str(self._library), "CLOCK_SHIFT_FILE": str(shift)}

    @staticmethod
    def available() -> bool:
        """Whether such a clock can be built here: Linux, with a compiler."""
        return Path("/proc/self/maps").exists() and any(map(shutil.which, ("cc", "gcc", "clang")))

    def set(self, shift_s: int) -> None:
        self._shift[:8] = struct.pack("q", shift_s)

    def rules(self, pid: int) -> bool:
        """Whether the process sees it."""
        return str(self._library) in Path(f"/proc/{pid}/maps").read_text()

    def close(self) -> None:
        self._shift.close()
