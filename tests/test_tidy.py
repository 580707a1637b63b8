"""The house rules, as tests: what a reviewer would otherwise have to remember."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES_MAX = 350
BYTES_MAX = 2 * 2**20
ROOMS = [
    "tandem",
    "core",
    "engine",
    "worker",
    "prefill_worker",
    "decode_worker",
    "kvtransfer",
    "router",
    "cluster",
    "sim",
    "cli",
]
ROOMS += ["models", "benchmarks"]


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


TRACKED = tracked()
OURS = [p for p in TRACKED if p.suffix == ".py" and p.relative_to(ROOT).parts[:2] != ("tandem", "v1")]
PRODUCT = [p for p in OURS if p.relative_to(ROOT).parts[0] in ROOMS]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def calls(path: Path) -> list[str]:
    """Dotted names of everything a file calls or reads an attribute of."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]


def test_no_file_holds_two_ideas():
    long = {name(p): n for p in OURS if (n := len(p.read_text().splitlines())) > LINES_MAX}
    assert not long, f"over {LINES_MAX} lines, split by idea: {long}"


def test_nothing_large_is_committed_but_the_demo_weights():
    large = {name(p): p.stat().st_size for p in TRACKED if p.stat().st_size > BYTES_MAX}
    large.pop("models/demo/model.safetensors", None)
    assert not large


def test_nothing_is_left_for_later():
    pattern = re.compile(r"\b(TODO|FIXME|XXX|raise NotImplementedError)\b")
    left = [name(p) for p in OURS if p != Path(__file__) and pattern.search(p.read_text())]
    assert not left


def test_nothing_sleeps_to_wait():
    slept = [name(p) for p in OURS if "time.sleep" in calls(p)]
    assert not slept, "wait on a condition with a deadline instead"


def test_only_the_configuration_reads_the_environment():
    product = [p for p in PRODUCT if p.parent.name != "benchmarks"]
    readers = [name(p) for p in product if {"os.environ", "os.getenv"} & set(calls(p))]
    assert set(readers) <= {"core/config.py"}


def test_only_what_people_read_asks_the_wall_clock():
    """It jumps. Leases, ages and times to live are lengths, counted on each side's own monotonic clock."""
    wall = re.compile(r"(^|\.)time\.time(_ns)?$|\bdatetime\.(now|utcnow|today)$|\.st_[amc]time(_ns)?$|CLOCK_REALTIME")
    product = [p for p in PRODUCT if p.relative_to(ROOT).parts[0] != "benchmarks"]
    readers = {name(p) for p in product if any(wall.search(call) for call in calls(p))}
    shown = {"router/http.py", "core/chat_template.py", "kvtransfer/disk.py", "router/span_export.py"}
    assert readers <= shown, "`created` of an answer, dates in chat templates, ages of blocks on disk and times of spans alone"


def test_ray_has_one_door():
    importers = [name(p) for p in PRODUCT if re.search(r"^\s*(import|from) ray\b", p.read_text(), re.M)]
    assert set(importers) <= {"cluster/ray_launcher.py"}


def test_torch_stays_where_tensors_are():
    importers = {name(p) for p in PRODUCT if re.search(r"^\s*(import|from) torch\b", p.read_text(), re.M)}
    allowed = ("engine/", "kvtransfer/", "benchmarks/", "models/", "worker/node.py")
    assert not {path for path in importers if not path.startswith(allowed)}


def test_no_pool_has_a_utils_drawer():
    assert not [name(p) for p in OURS if p.stem in {"utils", "util", "helpers", "misc", "common"}]


def test_the_proto_folder_is_no_python_package():
    assert not list((ROOT / "proto").rglob("__init__.py")), "it would shadow proto-plus"


def test_nothing_names_the_machine_it_was_written_on():
    mark = re.compile("/" + "work/|/" + r"root/\.pyenv")
    named = [name(p) for p in TRACKED if p.suffix not in {".safetensors", ".png"} and mark.search(p.read_text(errors="ignore"))]
    assert not named


def test_generated_code_is_current(tmp_path):
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "proto").rglob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", *outputs, *sources], cwd=ROOT, check=True)
    stale = [p.name for p in (tmp_path / "tandem/v1").iterdir() if p.read_text() != (ROOT / "tandem/v1" / p.name).read_text()]
    assert not stale, "run `make proto` and commit the result"


def test_import_arrows_hold():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("first", ["tandem", "tandem.sampling", "tandem.errors"])
def test_the_sdk_pulls_in_nothing_of_the_server(first):
    heavy = ["torch", "ray", "core", "router", "pydantic", "redis"]
    code = f"import sys, {first}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
