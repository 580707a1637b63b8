"""Trace formats are recognised by content, and what is wrong with a file is said with its row and column."""

from __future__ import annotations

import gzip
import itertools
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigError
from sim.traces import read_trace, trace_format
from sim.workload import Arrival

HEAD = "arrival_s,input_tokens,output_tokens\n"
PLAIN = "arrival_s,input_tokens,output_tokens,session,tenant,slo_class\n5.0,10,3,a,t1,fast\n5.5,20,4,,,\n"
SERVEGEN = "arrival_s,client_id,input_tokens,output_tokens,reason_tokens\n0.0000,20,326,8,2\n0.0002,0,303,53,50\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
AZURE_2024 = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 23:59:59.9+00:00,2162,5\n2024-05-11 00:00:00+00:00,2399,6\n"
SPLITWISE = (
    "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
    "0,2,0,1,1,4096,32\n1,2,0,3,1,2048,8\n"
)
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,7,1\n"
SHAREGPT = "input_tokens,output_tokens\n29,202\n14,58\n"
ARXIV = "num_prefill_tokens,num_decode_tokens\n3772,54\n"
INPUTS = "query_id,arrival_s,input_tokens\n0,1.5,512\n1,3.25,512\n"
MOONCAKE = (
    '{"timestamp": 2000, "input_length": 700, "output_length": 5, "hash_ids": [7, 8]}\n'
    '{"timestamp": 3500, "input_length": 600, "output_length": 6, "hash_ids": [7, 9]}\n'
)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "trace"
    path.write_bytes(text.encode())
    return str(path)


def read(tmp_path: Path, text: str, **how: object) -> list[Arrival]:
    return list(read_trace(write(tmp_path, text), **how))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "name", "arrivals"),
    [
        (PLAIN, "plain", [Arrival(0.0, 10, 3, session="a", tenant="t1", slo_class="fast"), Arrival(0.5, 20, 4)]),
        (SERVEGEN, "ServeGen", [Arrival(0.0, 326, 8, tenant="20"), Arrival(0.0002, 303, 53, tenant="0")]),
        (AZURE, "Azure", [Arrival(0.0, 374, 44), Arrival(pytest.approx(4.314579, abs=1e-9), 396, 109)]),
        (AZURE_2024, "Azure", [Arrival(0.0, 2162, 5), Arrival(pytest.approx(0.1), 2399, 6)]),
        (SPLITWISE, "Splitwise", [Arrival(0.0, 4096, 32), Arrival(2.0, 2048, 8)]),
        (VIDUR, "Vidur", [Arrival(0.0, 7, 1)]),
        (MOONCAKE, "Mooncake", [Arrival(0.0, 700, 5, (7, 8), 512), Arrival(1.5, 600, 6, (7, 9), 512)]),
    ],
)
def test_a_format_is_known_by_its_content(tmp_path: Path, text: str, name: str, arrivals: list[Arrival]) -> None:
    assert read(tmp_path, text) == arrivals
    assert trace_format(write(tmp_path, text)).name == name
    assert read(tmp_path, text.replace("\n", "\r\n")) == arrivals
    assert read(tmp_path, "\ufeff" + text) == arrivals, "as spreadsheets write it"
    assert read(tmp_path, text.rstrip("\n")) == arrivals
    assert read(tmp_path, text + "\n\n") == arrivals
    path = tmp_path / "trace.bin"
    path.write_bytes(gzip.compress(text.encode()))
    assert list(read_trace(str(path))) == arrivals


@pytest.mark.parametrize("text", [SHAREGPT, ARXIV])
def test_lengths_alone_arrive_when_they_are_told_to(tmp_path: Path, text: str) -> None:
    lengths = [tuple(map(int, row.split(","))) for row in text.splitlines()[1:]]
    read_ones = read(tmp_path, text, due=itertools.count(1.0))
    assert [(a.arrival_s, a.input_tokens, a.output_tokens) for a in read_ones] == [(n, *t) for n, t in enumerate(lengths, 1)]
    assert len(read(tmp_path, text, due=[0.5])) == 1
    with pytest.raises(ConfigError, match="no times of arrival; give a rate"):
        read(tmp_path, text)
    with pytest.raises(ConfigError, match=r"row 1 \(line 2\): -1 s is negative"):
        read(tmp_path, text, due=[-1.0])


def test_a_file_of_inputs_alone_is_told_how_long_answers_are(tmp_path: Path) -> None:
    assert read(tmp_path, INPUTS, output_tokens=9) == [Arrival(0.0, 512, 9), Arrival(1.75, 512, 9)]
    with pytest.raises(ConfigError, match="no column output_tokens; say how long"):
        read(tmp_path, INPUTS)


@pytest.mark.parametrize("how", [{"due": itertools.repeat(0.0)}, {"output_tokens": 4}])
def test_what_a_file_says_itself_is_not_overruled(tmp_path: Path, how: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="of its own"):
        read(tmp_path, PLAIN, **how)


ROW = '{"timestamp": 5, "input_length": 7, "output_length": 1}\n'
DAMAGED = [
    ("", "is no trace known here"),
    ("\n", "is no trace known here"),
    ("a,b\n1,2\n", "a plain one is arrival_s,input_tokens,output_tokens"),
    ("arrival_s,output_tokens\n1,2\n", "has no column input_tokens"),
    ("hello", "is no trace known here: its first line is 'hello'"),
    ("", "is no trace known here: its first line is empty"),
    (HEAD + "0,ten,1\n", "row 1 (line 2), column input_tokens: 'ten' is no whole number of tokens"),
    (HEAD + "0,1,1\n0,1,1.5\n", "row 2 (line 3), column output_tokens: '1.5' is no whole number"),
    (HEAD + "0,1,\n", "row 1 (line 2), column output_tokens: '' is no whole number"),
    (HEAD + "0,1,1\n\nnoon,1,1\n", "row 3 (line 4), column arrival_s: 'noon' is no time"),
    (HEAD + "nan,1,1\n", "row 1 (line 2), column arrival_s: nan is no time"),
    (HEAD + "0,1,1\ninf,1,1\n", "row 2 (line 3), column arrival_s: inf is no time"),
    (HEAD + "-0.5,1,1\n", "row 1 (line 2), column arrival_s: -0.5 s is negative"),
    (HEAD + "1,1,1\n0,1,1\n", "row 2 (line 3), column arrival_s: 0 s comes after 1 s; arrivals must not go back"),
    (HEAD + "1,0,1\n", "row 1 (line 2), column input_tokens: 0 tokens; a request reads and writes at least one"),
    (HEAD + "1,1,0\n", "row 1 (line 2), column output_tokens: 0 tokens"),
    (HEAD + "1,1,-4\n", "row 1 (line 2), column output_tokens: -4 tokens"),
    (HEAD + f"1,{2**31},1\n", "row 1 (line 2), column input_tokens: 2147483648 tokens are more than any model holds"),
    (HEAD + "1,1\n", "row 1 (line 2), column output_tokens: the row has 2 values, the first line names 3"),
    (HEAD + "1,1,1,1\n", "row 1 (line 2): the row has 4 values, the first line names 3"),
    (HEAD + '1,1,"' + "9" * 200_000 + '"\n', "row 1 (line 2): field larger than field limit"),
    (AZURE + "yesterday,1,1\n", "row 3 (line 4), column TIMESTAMP: 'yesterday' is no time"),
    (AZURE + "2023-11-16 18:15:40.0,1,1\n", "row 3 (line 4), column TIMESTAMP"),
    (AZURE + "2023-11-16 18:16:00.0,x,1\n", "row 3 (line 4), column ContextTokens: 'x'"),
    (SPLITWISE + "2,2,0,4,1,,8\n", "row 3 (line 4), column prompt_size: '' is no whole number"),
    (ROW + '{"timestamp": 5, "input_length": 7}\n', "row 2 (line 2), column output_length: it is missing"),
    (ROW + '{"timestamp": "5", "input_length": 7, "output_length": 1}\n', "row 2 (line 2), column timestamp: '5' is no time"),
    (ROW + '{"timestamp": 5, "input_length": 7.0, "output_length": 1}\n', "column input_length: 7.0 is no whole number"),
    (ROW + '{"timestamp": 5, "input_length": true, "output_length": 1}\n', "column input_length: True is no whole number"),
    (ROW + '{"timestamp": 5, "input_length": 7, "output_length": null}\n', "column output_length: None is no whole number"),
    (
        ROW + '{"timestamp": 4, "input_length": 7, "output_length": 1}\n',
        "row 2 (line 2), column timestamp: 0.004 s comes",
    ),
    (ROW + '{"timestamp": -4, "input_length": 7, "output_length": 1}\n', "column timestamp: -0.004 s is negative"),
    (ROW + '{"timestamp": NaN, "input_length": 7, "output_length": 1}\n', "column timestamp: nan is no time"),
    (ROW + '{"timestamp": 5\n', "row 2 (line 2): no JSON at character"),
    (ROW + "[1]\n", "row 2 (line 2): [1] is no JSON object"),
    (ROW + "[" * 100_000 + "\n", "row 2 (line 2): no JSON"),
    (ROW[:-2] + ', "hash_ids": 3}\n', "row 1 (line 1), column hash_ids: 3 is no list of whole numbers"),
    (ROW[:-2] + ', "hash_ids": ["a"]}\n', "row 1 (line 1), column hash_ids: ['a'] is no list of whole numbers"),
    (ROW[:-2] + ', "hash_ids": [1, 2]}\n', "column hash_ids: 2 ids of 512 tokens each cannot name an input_length of 7"),
]


@pytest.mark.parametrize(("text", "why"), DAMAGED, ids=itertools.count())
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    path = str(tmp_path / "trace")
    assert str(caught.value).startswith((path, f"cannot read the trace {path}"))
    assert why in str(caught.value)
    assert len(str(caught.value)) < len(path) + 250
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "column"), [("1,90,30", "output_tokens"), ("1,120,1", "input_tokens"), ("1,100,1", "input_tokens")]
)
def test_lengths_beyond_the_context_are_refused_where_there_is_one(tmp_path: Path, row: str, column: str) -> None:
    text = HEAD + "0,99,1\n" + row + "\n"
    assert len(read(tmp_path, text)) == 2
    with pytest.raises(ConfigError, match=rf"row 2 \(line 3\), column {column}: .* more than the context of 100 holds"):
        read(tmp_path, text, context_max=100)


def test_a_missing_file_and_a_folder_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        list(read_trace("/nowhere.csv"))
    with pytest.raises(ConfigError, match="directory"):
        list(read_trace(str(tmp_path)))


ROWS = "".join(f"{n},10,3\n" for n in range(10_000))


@pytest.mark.parametrize("spoil", ["cut", "bits", "short"])
def test_a_damaged_compressed_file_says_so(tmp_path: Path, spoil: str) -> None:
    data = bytearray(gzip.compress((HEAD + ROWS).encode()))
    if spoil == "bits":
        data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    path = tmp_path / "spoiled.gz"
    path.write_bytes(data[:-20] if spoil == "cut" else data[:5] if spoil == "short" else data)
    with pytest.raises(ConfigError, match=r"cannot read the trace|row \d+"):
        list(read_trace(str(path)))


def test_a_file_that_is_no_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"arrival_s,input_tokens,output_tokens\n\xff\xfe\x00\n")
    with pytest.raises(ConfigError, match="it is no text, at byte 0xff"):
        list(read_trace(str(tmp_path / "weights")))


def test_what_was_read_before_the_damage_stands(tmp_path: Path) -> None:
    rows = read_trace(write(tmp_path, HEAD + "0,1,1\n3,1,1\n2,1,1\n"))
    assert [next(rows).arrival_s, next(rows).arrival_s] == [0, 3]
    with pytest.raises(ConfigError, match="row 3"):
        next(rows)


def test_a_long_file_is_read_as_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "long.csv.gz"
    path.write_bytes(gzip.compress((HEAD + "".join(f"{n / 8},100,100\n" for n in range(60_000))).encode(), 1))

    def peak(most: int) -> int:
        tracemalloc.start()
        try:
            assert sum(1 for _ in itertools.islice(read_trace(str(path)), most)) == most
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1000)
    assert peak(60_000) < peak(6_000) + 200_000


@contextmanager
def written(text: str) -> Iterator[str]:
    """A file for one of hypothesis's examples, many of which share one `tmp_path`."""
    with tempfile.TemporaryDirectory() as folder:
        yield write(Path(folder), text)


arrivals_strategy = st.lists(
    st.tuples(st.integers(0, 10**7), st.integers(1, 10**6), st.integers(1, 10**5)), min_size=1, max_size=30
).map(lambda rows: sorted(rows, key=lambda row: row[0]))


@settings(deadline=None)
@given(arrivals_strategy)
def test_any_workload_survives_being_written_and_read(rows: list[tuple[int, int, int]]) -> None:
    start = rows[0][0]
    with written(HEAD + "".join(f"{ms / 1000},{asked},{told}\n" for ms, asked, told in rows)) as path:
        found = [(round(a.arrival_s * 1000), a.input_tokens, a.output_tokens) for a in read_trace(path)]
    assert found == [(ms - start, asked, told) for ms, asked, told in rows]


@settings(deadline=None)
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: data.decode("latin1")))
def test_a_row_of_anything_is_read_or_named(row: str) -> None:
    for head in (HEAD + "0,5,5\n", AZURE, ROW):
        with written(head + row + "\n") as path:
            rows = read_trace(path)
            next(rows)
            refused = ""
            try:
                list(rows)
            except ConfigError as error:
                refused = str(error)
        assert not refused or refused.startswith(f"{path}, row ")
