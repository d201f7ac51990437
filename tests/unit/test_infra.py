"""What the cluster files promise, as far as it can be checked without a cluster."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from kdsr.cli import parse
from kdsr.config import DistillConfig, ServeConfig
from kdsr.serving.host import check_table

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
YAML_FILES = sorted(INFRA.rglob("*.yaml"))
RAY = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def parts(tree: Any, key: str) -> Iterator[Any]:
    """Every value under `key`, anywhere in `tree`."""
    if isinstance(tree, dict):
        yield from (value for name, value in tree.items() if name == key)
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from parts(branch, key)


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_the_ray_of_a_cluster_is_the_one_that_is_tested(path):
    assert set(parts(load(path), "rayVersion")) <= {RAY}


def test_the_image_derives_from_the_ray_that_is_tested():
    dockerfile = (INFRA / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"rayproject/ray:([\d.]+)-py311", dockerfile)) == {RAY}


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_no_file_carries_a_secret(path):
    text = json.dumps(load(path))
    assert not re.search(r"AKIA[0-9A-Z]{16}", text)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
        assert name not in text


@pytest.mark.parametrize("path", sorted((INFRA / "kuberay").glob("*.yaml")), ids=lambda path: path.name)
def test_every_container_knows_its_store_and_its_limits(path):
    for containers in parts(load(path), "containers"):
        for container in containers:
            names = {next(iter(source.values()))["name"] for source in container["envFrom"]}
            assert names == {"kdsr-s3"}
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
            assert container["volumeMounts"][0]["mountPath"] == "/dev/shm"


@pytest.mark.parametrize("path", sorted((INFRA / "kuberay").glob("*.yaml")), ids=lambda path: path.name)
def test_a_cluster_on_kubernetes_asks_for_a_token(path):
    assert list(parts(load(path), "authOptions")) == [{"mode": "token"}]


def test_the_job_on_kubernetes_is_a_request_that_distill_accepts():
    spec = load(INFRA / "kuberay" / "distill.yaml")["spec"]
    program, job, *argv = shlex.split(spec["entrypoint"].replace("/home/ray/kdsr", str(ROOT)))
    assert program == "python"
    assert Path(job) == ROOT / "jobs" / "distill.py"
    config = parse(DistillConfig, argv)
    workers = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    assert config.cluster.num_workers == workers["replicas"]
    assert spec["backoffLimit"] > 0
    assert spec["activeDeadlineSeconds"] > 0


def test_what_serve_deploys_is_an_application_that_ray_and_kdsr_accept() -> None:
    content = load(INFRA / "serve" / "serve.yaml")
    (application,) = ServeDeploySchema.model_validate(content).applications
    options = {deployment.name: deployment for deployment in application.deployments}
    config = ServeConfig.model_validate(application.args | options["Replica"].user_config)
    check_table(config)
    assert all(each.max_surge_percent == 100 for each in options.values())
    module, _, name = application.import_path.partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert config.auth == "keys" and config.keys_file is not None
    assert content["http_options"]["request_timeout_s"] >= (
        config.limits.timeout_seconds + config.limits.body_seconds
    )


def test_the_service_on_kubernetes_deploys_the_same_with_room_to_grow_and_to_update() -> None:
    spec = load(INFRA / "kuberay" / "service.yaml")["spec"]
    content = yaml.safe_load(spec["serveConfigV2"])
    assert content == load(INFRA / "serve" / "serve.yaml")
    config = ServeConfig.model_validate(content["applications"][0]["args"])
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    assert workers["maxReplicas"] > config.cluster.most_workers
    assert int(container["resources"]["requests"]["cpu"]) > config.cluster.cpus_per_worker
    assert str(config.keys_file.parent) in {mount["mountPath"] for mount in container["volumeMounts"]}
    longest = config.limits.timeout_seconds + config.limits.body_seconds
    assert pod["terminationGracePeriodSeconds"] > longest


def test_the_aws_cluster_fits_the_schema_of_ray():
    schema = Path(find_spec("ray").origin).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(load(INFRA / "aws" / "cluster.yaml"), json.loads(schema.read_text(encoding="utf-8")))


def test_the_head_of_the_aws_cluster_hides_its_dashboard():
    start = " ".join(load(INFRA / "aws" / "cluster.yaml")["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start


RUN_JOBS = [path for path in YAML_FILES if path.parent.name in {"aws", "kuberay"} and path.stem != "service"]


@pytest.mark.parametrize("path", RUN_JOBS, ids=lambda path: path.name)
def test_a_stopped_job_has_time_to_save_a_checkpoint(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    seconds = re.findall(r'RAY_JOB_STOP_WAIT_TIME_S(?:=|.*\n\s*value: ")(\d+)', text)
    assert seconds == ["60"]


def test_the_dashboard_asks_for_numbers_that_are_told_and_the_page_names_them_all() -> None:
    told = set(re.findall(r'_(counter|gauge)\("(kdsr_train_\w+)"', (ROOT / "cluster/metrics.py").read_text()))
    names = {f"ray_{name}{'_total' if kind == 'counter' else ''}" for kind, name in told}
    asked = set(re.findall(r"ray_kdsr_train_\w+", (ROOT / "infra/grafana/training.json").read_text()))
    page = set(re.findall(r"ray_kdsr_train_\w+", (ROOT / "docs/running.md").read_text()))
    json.loads((ROOT / "infra/grafana/training.json").read_text())
    assert asked <= names and page == names and len(names) > 10
