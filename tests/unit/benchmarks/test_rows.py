"""Figures are kept with what was run, of which commit, on which machine."""

from __future__ import annotations

import json

from benchmarks.rows import Row, report, run_of


def test_rows_are_written_with_what_was_run_beside_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/spine.py", "--only", "split,idle"])
    where = tmp_path / "spine.json"
    report([Row("a", "a claim", 2.0, "x", 1.0), Row("b", "another", None, "ms", 1.0, "<=")], where)
    assert [(row["id"], row["measured"]) for row in json.loads(where.read_text())] == [("a", 2.0), ("b", None)]
    run = json.loads((tmp_path / "spine.run.json").read_text())
    assert run.keys() == {"command", "commit", "machine", "date"}
    assert all(run.values())
    said = capsys.readouterr().out
    assert "met" in said
    assert "not measured" in said


def test_a_command_can_be_typed_again():
    assert run_of(["x/kv_shm.py", "--shm-dir", "a b", "--data", "/home/me/traces"])["command"] == (
        "python -m benchmarks.kv_shm --shm-dir 'a b' --data traces"
    )
