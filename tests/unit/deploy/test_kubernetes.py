"""What we ship for Kubernetes is valid offline: objects against the published schemas, our configuration against our own."""

from __future__ import annotations

import json
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from cluster.ray_launcher import resource_of
from core.config import load
from core.request import WorkerRole

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
VERSION = "1.32"


def objects(name: str) -> list[dict]:
    return [item for item in yaml.safe_load_all((KUBERNETES / name).read_text()) if item]


RAYCLUSTER = objects("raycluster.yaml")[0]
GROUPS = {group["groupName"]: group for group in RAYCLUSTER["spec"]["workerGroupSpecs"]}


def validate(item: dict) -> None:
    kubernetes_validate.validate(item, VERSION, strict=True)


@pytest.mark.parametrize("item", objects("services.yaml"), ids=lambda item: item["kind"])
def test_objects_satisfy_their_schema(item):
    validate(item)


def test_the_validation_bites():
    item = objects("services.yaml")[0]
    item["spec"]["ports"][0]["port"] = "50051x"
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(item)


@pytest.mark.parametrize("group", ["head", *GROUPS])
def test_every_pod_template_of_the_ray_cluster_is_a_valid_pod(group):
    spec = RAYCLUSTER["spec"]["headGroupSpec"] if group == "head" else GROUPS[group]
    template = spec["template"]
    validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group, **template["metadata"]}, "spec": template["spec"]})
    pod = template["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert all(not c["securityContext"]["allowPrivilegeEscalation"] for c in pod["containers"])
    assert all({"name": "shm", "mountPath": "/dev/shm"} in c["volumeMounts"] for c in pod["containers"])


def test_each_pool_has_a_worker_group_and_the_resource_the_launcher_asks_for():
    assert set(GROUPS) == {"prefill", "decode", "store", "router"}
    for name, group in GROUPS.items():
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {resource_of(WorkerRole(name)): 1}


def test_the_pods_live_longer_than_the_grace_time():
    config = load(str(KUBERNETES / "tandem.yaml"))
    for group in GROUPS.values():
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > config.cluster.grace_s


@pytest.mark.parametrize(
    "path", [KUBERNETES / "tandem.yaml", *sorted((DEPLOY / "configs").glob("*.yaml"))], ids=lambda p: p.name
)
def test_every_shipped_configuration_loads(path):
    load(str(path))


def test_the_service_points_at_the_ports_of_the_router_pods():
    (service,) = (item for item in objects("services.yaml") if item["kind"] == "Service")
    ports = {port["name"] for port in GROUPS["router"]["template"]["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    labels = GROUPS["router"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


def test_the_job_selects_the_cluster_by_name():
    (job,) = objects("job.yaml")
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] == RAYCLUSTER["metadata"]["name"]
