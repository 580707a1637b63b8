"""The dashboard and the alerts name only metrics that running processes export, and the router lists every process."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import httpx
import pytest
import yaml
from in_loop import cluster_in_loop
from prometheus_client.parser import text_string_to_metric_families

from tandem import AsyncClient, SamplingParams

pytestmark = pytest.mark.service

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SUFFIXES = re.compile(r"_(bucket|sum|count)$")


def named(text: str) -> set[str]:
    return {SUFFIXES.sub("", name) for name in re.findall(r"tandem_[a-z0-9_]+", text)}


def dashboard_expressions() -> list[str]:
    panels = json.loads((DEPLOY / "grafana/tandem.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def alert_expressions() -> list[str]:
    groups = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def labels_of(families) -> dict[str, set[str]]:
    """Metric name as PromQL says it → label names its samples carry."""
    return {
        family.name + ("_total" if family.type == "counter" else ""): {
            name for sample in family.samples for name in sample.labels
        }
        for family in families
    }


async def test_what_is_watched_exists():
    async with cluster_in_loop({}) as addresses, httpx.AsyncClient() as http:
        async with AsyncClient(addresses.grpc) as client:
            await client.generate("import os\n" * 20, SamplingParams(max_tokens=4, ignore_eos=True))
        async with asyncio.timeout(10):
            groups: list[dict] = []
            while len(groups) < 4:  # the view reaches the router with the next heartbeat
                groups = (await http.get(f"http://{addresses.http}/metrics/targets")).json()
                await asyncio.sleep(0)
        assert {group["labels"]["role"] for group in groups} == {"prefill", "decode", "router", "store"}
        exported: dict[str, set[str]] = {}
        for group in groups:
            (target,) = group["targets"]
            page = await http.get(f"http://{target}/metrics")
            assert page.status_code == 200
            for name, labels in labels_of(text_string_to_metric_families(page.text)).items():
                exported[name] = exported.get(name, set()) | labels | set(group["labels"])
    watched = dashboard_expressions() + alert_expressions()
    assert len(watched) > 25
    missing = set().union(*map(named, watched)) - set(exported)
    assert not missing, f"dashboards or alerts name what nobody exports: {missing}"
    for expression in watched:
        for names in re.findall(r"by \(([a-z_, ]+)\)", expression):
            known = set().union({"le"}, *(exported[name] for name in named(expression)))
            assert set(re.split(r", *", names)) <= known, expression


def test_every_alert_says_what_to_do():
    groups = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"]
    assert all({"summary", "do"} <= set(rule["annotations"]) for group in groups for rule in group["rules"])


def test_the_scrape_configuration_asks_the_router():
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["http_sd_configs"][0]["url"].endswith("/metrics/targets")
    assert (DEPLOY / "prometheus" / config["rule_files"][0]).exists()
