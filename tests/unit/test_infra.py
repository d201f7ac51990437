"""What the cluster files promise, as far as it can be checked without a cluster."""

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

from kdsr.cli import parse
from kdsr.config import DistillConfig

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


def test_the_aws_cluster_fits_the_schema_of_ray():
    schema = Path(find_spec("ray").origin).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(load(INFRA / "aws" / "cluster.yaml"), json.loads(schema.read_text(encoding="utf-8")))


def test_the_head_of_the_aws_cluster_hides_its_dashboard():
    start = " ".join(load(INFRA / "aws" / "cluster.yaml")["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize("path", [path for path in YAML_FILES if path.parent.name in {"aws", "kuberay"}])
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
