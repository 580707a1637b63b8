"""Trace formats are recognised by content, and a damaged file is named with its line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.trace import TraceRequest, read_trace

PLAIN = "arrival_s,input_tokens,output_tokens,session,tenant\n5.0,10,3,a,t1\n5.5,20,4,,\n"
SERVEGEN = "arrival_s,client_id,input_tokens,output_tokens\n0.0000,20,326,8\n0.0002,0,303,53\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
MOONCAKE = (
    '{"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [7, 8]}\n'
    '{"timestamp": 1500, "input_length": 600, "output_length": 6, "hash_ids": [7, 9]}\n'
)


def read(tmp_path: Path, text: str) -> list[TraceRequest]:
    path = tmp_path / "trace"
    path.write_text(text)
    return list(read_trace(str(path)))


def test_a_plain_file_begins_at_zero(tmp_path: Path) -> None:
    assert read(tmp_path, PLAIN) == [TraceRequest(0.0, 10, 3, "a", "t1"), TraceRequest(0.5, 20, 4)]


def test_servegen_names_its_client(tmp_path: Path) -> None:
    assert read(tmp_path, SERVEGEN)[1] == TraceRequest(0.0002, 303, 53, tenant="0")


def test_azure_counts_ten_millionths_of_a_second(tmp_path: Path) -> None:
    first, second = read(tmp_path, AZURE)
    assert (first.arrival_s, first.input_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.arrival_s == pytest.approx(4.314579, abs=1e-6)


def test_mooncake_names_the_blocks_of_its_prompts(tmp_path: Path) -> None:
    assert read(tmp_path, MOONCAKE) == [
        TraceRequest(0.0, 700, 5, prefix_ids=(7, 8)),
        TraceRequest(1.5, 600, 6, prefix_ids=(7, 9)),
    ]


def test_a_compressed_file_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(PLAIN.encode()))
    assert list(read_trace(str(path))) == read(tmp_path, PLAIN)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no trace known here"),
        ("a,b\n1,2\n", "arrival_s,input_tokens,output_tokens"),
        ("arrival_s,input_tokens,output_tokens\n0,ten,1\n", "line 2"),
        ("arrival_s,input_tokens,output_tokens\n1,1,1\n0,1,1\n", "line 3: arrivals must not go back"),
        ("arrival_s,input_tokens,output_tokens\n1,0,1\n", "at least one input token"),
        ("arrival_s,input_tokens,output_tokens\n1,1\n", "line 2"),
        ('{"timestamp": 0, "input_length": 7}\n', "output_length"),
        ('{"timestamp": 0\n', "line 2"),
    ],
)
def test_a_damaged_file_is_named_with_its_place(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        read(tmp_path, text)


def test_a_missing_file_says_so() -> None:
    with pytest.raises(ConfigError, match="No such file"):
        list(read_trace("/nowhere.csv"))


def test_a_truncated_compressed_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "cut.gz"
    rows = "".join(f"{n},10,3,,\n" for n in range(10_000))
    path.write_bytes(gzip.compress(("arrival_s,input_tokens,output_tokens,session,tenant\n" + rows).encode())[:-20])
    with pytest.raises(ConfigError, match="cannot read the trace"):
        list(read_trace(str(path)))
