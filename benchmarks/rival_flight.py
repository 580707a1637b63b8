"""Arrow Flight between two processes on loopback, run in its own environment by `benchmarks.rounds`.

python rival_flight.py BYTES_MAX

DoGet of a table of 4 KiB rows, copied into memory that stands ready, as a pull's bytes are. For every size it tries batch
sizes a few times and takes its turns with the quickest.
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

import numpy as np
import pyarrow as pa
from pyarrow import flight

ROW_BYTES = 4096
BATCHES = tuple(n * 2**20 for n in (1, 2, 4, 16))
TRIES = 4


class Server(flight.FlightServerBase):
    def __init__(self, size: int) -> None:
        super().__init__("grpc://127.0.0.1:0")
        data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        rows = pa.FixedSizeBinaryArray.from_buffers(pa.binary(ROW_BYTES), size // ROW_BYTES, [None, pa.py_buffer(data)])
        self._table = pa.table({"blocks": rows})

    def do_get(self, context, ticket):
        size, batch = map(int, ticket.ticket.split())
        batches = self._table.slice(0, size // ROW_BYTES).to_batches(max_chunksize=batch // ROW_BYTES)
        return flight.RecordBatchStream(pa.Table.from_batches(batches))


def took_s(client: flight.FlightClient, dest: np.ndarray, size: int, batch: int) -> float:
    started, at = time.perf_counter(), 0
    for chunk in client.do_get(flight.Ticket(b"%d %d" % (size, batch))):
        column = chunk.data.column(0)
        data = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * ROW_BYTES :][: len(column) * ROW_BYTES]
        dest[at : at + len(data)] = data
        at += len(data)
    if at != size:
        raise SystemExit(f"{at} bytes of {size} came")
    return time.perf_counter() - started


def main() -> None:
    size_max = int(sys.argv[1])
    if "--server" in sys.argv:
        server = Server(size_max)
        print(server.port, flush=True)
        sys.stdin.read()
        server.shutdown()
        return
    command = [sys.executable, __file__, str(size_max), "--server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        client = flight.connect(f"grpc://127.0.0.1:{int(other.stdout.readline())}")
        dest = np.zeros(size_max, np.uint8)
        print("ready", flush=True)
        best: dict[int, int] = {}
        for line in sys.stdin:
            size = int(line)
            if size not in best:
                best[size] = min(BATCHES, key=lambda batch: median(took_s(client, dest, size, batch) for _ in range(TRIES)))
            print(f"took {took_s(client, dest, size, best[size]):.9f}", flush=True)
        client.close()
        other.stdin.close()


if __name__ == "__main__":
    main()
