"""How requests are cut into pieces, what passes between a worker and its helper, and where collective may be configured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import TransferConfig
from core.errors import ConfigError
from kvtransfer.collective_end import open_collective
from kvtransfer.collective_orders import Drop, Join, Meet, Receive, Send, Span, from_line, to_line
from kvtransfer.collective_pieces import PIECE_BYTES_MAX, RUN_BYTES_MIN, check_pieces, cut
from kvtransfer.shared_arena import SharedArena

EPOCH = 7
ROOT = Path(__file__).resolve().parents[3]
MIB = 2**20


@pytest.fixture
def directory(tmp_path):
    return str(tmp_path)


@pytest.mark.parametrize(
    ("source", "dest", "block_bytes", "pieces"),
    [
        ([], [], MIB, []),
        ([7], [3], MIB, [1]),
        (range(10), range(20, 30), MIB, [4, 4, 2]),  # in place, at most 4 MiB
        (range(100), range(99, -1, -1), MIB // 8, [32, 32, 32, 4]),  # through a buffer, at most 4 MiB
        (range(8), range(15, 7, -1), RUN_BYTES_MIN, [1] * 8),  # a block alone is long enough
        (range(8), range(15, 7, -1), RUN_BYTES_MIN // 2, [8]),  # gathered
        ([0, 9, 1, 2, 3, 4, 20], [0, 9, 11, 12, 13, 14, 3], RUN_BYTES_MIN // 4, [2, 4, 1]),
        (range(3), range(3), 2 * PIECE_BYTES_MAX, [1, 1, 1]),  # a block larger than a piece is one
    ],
)
def test_pieces(source, dest, block_bytes, pieces):
    assert cut(list(source), list(dest), block_bytes) == pieces


@given(
    st.integers(1, 300).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.permutations(range(n)))),
    st.integers(1, 6 * MIB),
)
def test_pieces_always_pass_the_sources_check(blocks, block_bytes):
    source, dest = blocks
    pieces = cut(source, dest, block_bytes)
    assert check_pieces(pieces, len(source), block_bytes) is None
    assert all(piece == 1 or piece * block_bytes <= PIECE_BYTES_MAX for piece in pieces)


@pytest.mark.parametrize("pieces", [[0, 3], [4], [1, 1], [2, 2], [2**40]])
def test_pieces_that_do_not_fit_are_named(pieces):
    assert check_pieces(pieces, 3, 2 * MIB)


SPAN = Span("/dev/shm/a", 2**40, [3, 1], [2])


@pytest.mark.parametrize(
    "order",
    [
        Meet("g", 1.5),
        Join("g", "[::1]:7", 0.5),
        Send("g", 2, SPAN, [2**63, 1], 3.0),
        Receive("g", 3, SPAN, [0, 1], [2**64 - 1, 7], 4.0),
        Drop("g"),
    ],
)
def test_orders_arrive_as_they_were_given(order):
    assert from_line(to_line(5, order)) == (5, order)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", ":0", "[::]:0"])
def test_an_address_that_nobody_can_dial(directory, listen):
    arena = SharedArena(directory, "w", EPOCH, 1, 64)
    with pytest.raises(ConfigError, match="collective needs the address"):
        open_collective(TransferConfig(transport="collective", shm_dir=directory), arena, listen)
    arena.close()


def test_nccl_without_a_gpu_is_refused_by_name(directory, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arena = SharedArena(directory, "w", EPOCH, 1, 64)
    config = TransferConfig(transport="collective", collective="nccl", shm_dir=directory)
    with pytest.raises(ConfigError, match=r"transfer\.collective: nccl needs a GPU"):
        open_collective(config, arena, "127.0.0.1:0")
    arena.close()


def test_it_is_only_opened_where_it_is_configured(directory):
    arena = SharedArena(directory, "w", EPOCH, 1, 64)
    for transport in ("auto", "shm", "tcp", "grpc", "loopback"):
        assert open_collective(TransferConfig(transport=transport, shm_dir=directory), arena, "127.0.0.1:0") is None
    arena.close()


def test_nothing_of_the_worker_imports_torch_for_it():
    code = "import sys, kvtransfer.plane; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
