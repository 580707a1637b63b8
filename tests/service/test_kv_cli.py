"""`tandem kv` against a real cluster: a prompt is warmed, seen, fetched, verified and evicted."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_up import TANDEM, Cluster, eventually, tandem_up

from core.blocks import block_keys, root_key
from core.text import Tokenizer
from kvtransfer.codec import digest_of

pytestmark = pytest.mark.service
CONFIG = "store: {dram_bytes: 16MiB, disk_bytes: 64MiB, disk_dir: DISK}\nengine: {kv_bytes: 8MiB}\n"
PROMPT = "def area(width, height):\n    return width * height\n\n" * 12


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("kv")
    with tandem_up(folder, config=CONFIG.replace("DISK", str(folder / "disk"))) as running:
        running.only("store")
        yield running


def kv(cluster: Cluster, *arguments: str, status: int = 0) -> Any:
    done = subprocess.run(
        [TANDEM, "kv", *arguments, "--admin", cluster.admin], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout) if "--json" in arguments and not status else done.stdout + done.stderr


@pytest.fixture(scope="module")
def warmed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    file.write_text(PROMPT)
    return kv(cluster, "warm", str(file), "--json", "--wait", "30", "--grpc", cluster.grpc)


def test_a_warmed_prompt_is_in_the_store(cluster: Cluster, warmed: dict[str, Any]) -> None:
    assert warmed["blocks"] == warmed["prompt_tokens"] // 16 > 4
    assert warmed["stored"] == warmed["blocks"]
    [store] = kv(cluster, "stat", "--json", "--node", "store-0")["nodes"]
    dram, _disk = store["tiers"]
    assert dram["blocks"] >= warmed["blocks"]
    assert dram["hits"] >= warmed["blocks"]
    table = kv(cluster, "stat")
    assert "store-0" in table
    assert "prefill-0" in table
    assert "decode-0" in table


def test_a_block_can_be_listed_and_fetched(cluster: Cluster, warmed: dict[str, Any], tmp_path: Path) -> None:
    listed = kv(cluster, "ls", "--json", "--limit", "0", "--node", "store-0")["blocks"]
    tokenizer = Tokenizer.load(str(Path(__file__).resolve().parents[2] / "models" / "demo"))
    [store] = kv(cluster, "stat", "--json", "--node", "store-0")["nodes"]
    keys = block_keys(root_key(bytes.fromhex(store["fingerprint"])), tokenizer.encode(PROMPT), store["block_size"])
    assert {key.hex() for key in keys} <= {entry["key"] for entry in listed if entry["tier"] == "dram"}
    assert len(kv(cluster, "ls", "--json", "--limit", "2", "--node", "store-0")["blocks"]) == 2
    out = tmp_path / "block"
    found = kv(cluster, "get", keys[0].hex(), "--out", str(out), "--json", "--node", "store-0")
    assert found["node"] == "store-0"
    assert out.stat().st_size == found["bytes"]
    import numpy as np

    assert f"{digest_of(np.fromfile(out, np.uint8)):016x}" == found["digest"]
    assert "no node has the block" in kv(cluster, "get", "0" * 32, status=1)
    assert "no node nobody" in kv(cluster, "stat", "--node", "nobody", status=1)


def test_a_prompt_is_pinned_until_it_is_unpinned(cluster: Cluster, warmed: dict[str, Any], tmp_path: Path) -> None:
    prompt, other, short = tmp_path / "prompt", tmp_path / "other", tmp_path / "short"
    prompt.write_text(PROMPT)
    other.write_text("Nobody ever asked for any of this. " * 20)
    short.write_text("hi")
    blocks = warmed["blocks"]
    done = kv(cluster, "pin", str(prompt), "--json")
    assert (done["blocks"], [row["id"] for row in done["nodes"]]) == (blocks, ["store-0"])
    [row] = done["nodes"]
    assert row["pinned"] == row["pinned_blocks"] == blocks <= row["pinned_max"]
    kv(cluster, "evict", "--all", "--json", "--node", "store-0")
    listed = kv(cluster, "ls", "--json", "--limit", "0", "--node", "store-0")["blocks"]
    pinned = {entry["key"]: entry for entry in listed if entry["pinned"]}
    assert len(pinned) == blocks
    assert all(entry["age_s"] >= entry["idle_s"] > 0 for entry in pinned.values())
    table = kv(cluster, "ls", "--node", "store-0")
    assert "age" in table
    assert "idle" in table
    assert f"{blocks}/{row['pinned_max']}" in kv(cluster, "stat", "--node", "store-0")
    key = next(iter(pinned))
    assert kv(cluster, "unpin", "--key", key, "--json")["nodes"][0]["pinned"] == 1
    assert f"1 of 1 {blocks}/" in " ".join(kv(cluster, "pin", "--key", key).split())
    assert kv(cluster, "unpin", str(prompt), "--json")["nodes"][0] == {**row, "pinned_blocks": 0}
    assert kv(cluster, "unpin", "--all", "--json")["nodes"][0]["pinned"] == 0
    assert "tandem kv warm" in kv(cluster, "pin", str(other), status=1)
    assert "fills no block" in kv(cluster, "pin", str(short), status=2)
    assert "--key" in kv(cluster, "pin", status=2)
    assert "not both" in kv(cluster, "unpin", "--all", "--key", key, status=2)
    assert "no node nobody" in kv(cluster, "pin", str(prompt), "--node", "nobody", status=1)


def test_a_worker_keeps_room_for_its_longest_request(cluster: Cluster, warmed: dict[str, Any], tmp_path: Path) -> None:
    (prompt := tmp_path / "prompt").write_text(PROMPT)
    [stat] = kv(cluster, "stat", "--json", "--node", "prefill-0")["nodes"]
    [dram] = stat["tiers"]
    assert dram["pinned_max"] < dram["blocks_max"]
    if dram["pinned_max"] >= warmed["blocks"]:
        assert kv(cluster, "pin", str(prompt), "--node", "prefill-0", "--json")["nodes"][0]["id"] == "prefill-0"
        kv(cluster, "unpin", "--all")
    else:
        assert f"{dram['pinned_max']} may be" in kv(cluster, "pin", str(prompt), "--node", "prefill-0", status=2)


def test_verify_reads_everything_and_evict_drops_it(cluster: Cluster, warmed: dict[str, Any]) -> None:
    rows = {row["id"]: row for row in kv(cluster, "verify", "--json")["nodes"]}
    assert set(rows) == {"store-0", "prefill-0", "decode-0"}
    assert rows["store-0"]["checked"] >= warmed["blocks"]
    assert not any(row["dropped"] for row in rows.values())

    def gone() -> bool:
        """Workers may be offering still."""
        kv(cluster, "evict", "--all", "--json")
        tiers = [tier for node in kv(cluster, "stat", "--json")["nodes"] for tier in node["tiers"]]
        return not any(tier["blocks"] for tier in tiers)

    assert eventually(gone)
