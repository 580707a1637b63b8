"""Ray's object store between two actors of one host, in a Ray of its own; run by `benchmarks.rounds`.

python rival_ray.py BYTES_MAX

One actor holds the bytes, the other asks for them, waits for the object and copies it into memory of its own that stands
ready, as a pull does. Even numbers of bytes are moved as one NumPy array, which Ray maps; odd ones, less one byte, as the
same array in a torch tensor, which it pickles.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np

TIMEOUT_S = 30.0


def actors(ray: Any) -> tuple[Any, Any]:
    class Source:
        def __init__(self, size: int) -> None:
            self._memory = np.random.default_rng(0).integers(0, 256, size, np.uint8)

        def read(self, size: int) -> Any:
            if size % 2:
                import torch

                return torch.from_numpy(self._memory[: size - 1])
            return self._memory[:size]

    class Destination:
        def __init__(self, source: Any, size: int) -> None:
            self._source, self._memory = source, np.zeros(size, np.uint8)

        def pull(self, size: int) -> float:
            started = time.perf_counter()
            came = ray.get(self._source.read.remote(size), timeout=TIMEOUT_S)
            self._memory[: len(came)] = came
            return time.perf_counter() - started

    return ray.remote(Source), ray.remote(Destination)


def main() -> None:
    size_max = int(sys.argv[1])
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    ray = __import__("ray")  # a rival here, not how the product starts its workers
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=max(2**29, 6 * size_max), logging_level="ERROR")
    try:
        source, destination = actors(ray)
        holder = source.options(num_cpus=1).remote(size_max)
        puller = destination.options(num_cpus=1).remote(holder, size_max)
        for size in (size_max, size_max + 1):
            ray.get(puller.pull.remote(size), timeout=TIMEOUT_S)
        print("ready", flush=True)
        for line in sys.stdin:
            print(f"took {ray.get(puller.pull.remote(int(line)), timeout=TIMEOUT_S):.9f}", flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
