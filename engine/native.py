"""`kernels/`, built once per machine with its C++ compiler and called through ctypes. Without a compiler: None.

Why a kernel at all: decoding is bound by memory, and torch reads fp32 weights whole even where the checkpoint holds bf16;
here they stay bf16 in memory (exactly the same numbers) and are widened in registers. And its sums have one order by
construction, so nothing depends on the batch, the chunks or the number of threads.

The library is kept in the user's cache directory under a hash of source, compiler and processor. It shares torch's OpenMP
threads: a second pool would fight with the first for the same cores.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import logging
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_SOURCES = Path(__file__).with_name("kernels")
_FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-std=gnu++17", "-fPIC", "-fopenmp", "-fno-math-errno")
_COMPILERS = ("g++", "c++", "clang++")
_BUILD_TIMEOUT_S = 120.0
MAX_HEAD_DIM = 512
PLAIN, SILU, ADD, MUL = range(4)

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


class Kernels:
    """The functions of `kernels/kernels.cpp`. Tensors are contiguous, floats fp32; `half` says that memory holds bf16."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._keep = library
        library.tandem_panel.restype = _long
        self.panel = int(library.tandem_panel())
        self.linear = library.tandem_linear
        self.linear.argtypes = [_pointer, _pointer, _int, _pointer, _pointer, _pointer, _int, _long, _long, _long, _int]
        self.linear.restype = _int
        self.rms_norm = library.tandem_rms_norm
        self.rms_norm.argtypes = (_pointer, _pointer, _pointer, _long, _long, _float)
        self.rms_norm.restype = None
        self.place = library.tandem_place
        self.place.argtypes = (*[_pointer] * 5, _int, _pointer, *[_long] * 5, _float, _int)
        self.place.restype = None
        self.attend = library.tandem_attend
        self.attend.argtypes = (*[_pointer] * 3, _int, _pointer, _long, _pointer, *[_long] * 6, _float, _long, _long, _int)
        self.attend.restype = _int

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        self.rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps)
        return out


@cache
def load_kernels() -> Kernels | None:
    """Builds when needed and loads; None, with the reason in the log, where that is not possible."""
    try:
        kernels = Kernels(_library())
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        _log.warning("running without native kernels, slower: %s", detail[-1] if detail else error)
        return None
    return kernels


def _library() -> ctypes.CDLL:
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError(f"no C++ compiler found; install one of {', '.join(_COMPILERS)}")
    openmp = _torch_openmp()
    name = _fingerprint(compiler, openmp)
    folder = _cache_folder()
    target = folder / f"kernels-{name}.so"
    with (folder / f"kernels-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers that start together build once
        if not target.is_file():
            _build(compiler, target, shared_openmp=openmp is not None)
    if openmp is not None:
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(target))


def _build(compiler: str, target: Path, shared_openmp: bool) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        unit, library = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        _run([compiler, *_FLAGS, "-c", "-o", str(unit), str(_SOURCES / "kernels.cpp")])
        # without -fopenmp the OpenMP symbols stay open and are found in torch's library, loaded before this one
        _run([compiler, "-shared", "-o", str(library), str(unit), *([] if shared_openmp else ["-fopenmp"])])
        library.replace(target)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)


def _torch_openmp() -> Path | None:
    return next(iter(sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))), None)


def _fingerprint(compiler: str, openmp: Path | None) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=10).stdout
    source = b"".join(file.read_bytes() for file in sorted(_SOURCES.iterdir()))
    digest = sha256(source + version + " ".join((compiler, *_FLAGS, str(openmp), platform.machine())).encode())
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        digest.update(
            "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})).encode()
        )
    return digest.hexdigest()[:20]


def _cache_folder() -> Path:
    try:
        folder = Path.home() / ".cache" / "tandem"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written: build for this process alone
        folder = Path(tempfile.mkdtemp(prefix="tandem-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
