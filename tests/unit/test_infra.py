"""What the cluster files promise, as far as it can be checked without a cluster."""

import ast
import functools
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

from cluster.serve import CONTROLLER, JOBS, KEEPS, REPLICA
from kdsr.cli import parse
from kdsr.config import DistillConfig, ServeConfig
from kdsr.serving.host import check_table

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
YAML_FILES = sorted(INFRA.rglob("*.yaml"))
KUBERAY_FILES = sorted((INFRA / "kuberay").glob("*.yaml"))
RAY = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
KUBERAY = jsonschema.Draft202012Validator(
    json.loads((INFRA / "kuberay" / "schema.json").read_text(encoding="utf-8"))
)
Place = tuple[str | int, ...]
CONTAINER = "spec/headGroupSpec/template/spec/containers/0"


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


@pytest.mark.parametrize("path", KUBERAY_FILES, ids=lambda path: path.name)
def test_every_container_knows_its_store_and_its_limits(path):
    for containers in parts(load(path), "containers"):
        for container in containers:
            names = {next(iter(source.values()))["name"] for source in container["envFrom"]}
            assert names == {"kdsr-s3"}
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
            assert container["volumeMounts"][0]["mountPath"] == "/dev/shm"


@pytest.mark.parametrize("path", KUBERAY_FILES, ids=lambda path: path.name)
def test_a_cluster_on_kubernetes_asks_for_a_token(path):
    assert list(parts(load(path), "authOptions")) == [{"mode": "token"}]


def refusals(content: Any) -> set[str]:
    """The rules of KubeRay's schema that `content` breaks: `type`, `required`, `additionalProperties`, ..."""
    return {error.validator for error in KUBERAY.iter_errors(content)}


def levels(tree: Any, *, above: Place = ()) -> Iterator[Place]:
    """The place of every mapping in `tree` whose names are not free to choose."""
    if isinstance(tree, dict) and above[-1:] not in {("rayStartParams",), ("limits",), ("requests",)}:
        yield above
    if isinstance(tree, dict | list):
        for name, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from levels(branch, above=(*above, name))


def level(tree: Any, place: Place) -> Any:
    return functools.reduce(lambda branch, name: branch[name], place, tree)


def steps(where: str) -> Place:
    """`a/0/b` as ("a", 0, "b")."""
    return tuple(int(name) if name.isdecimal() else name for name in where.split("/"))


@pytest.mark.parametrize("path", KUBERAY_FILES, ids=lambda path: path.name)
def test_a_file_for_kuberay_fits_the_schema_of_its_kind(path: Path) -> None:
    assert not [f"{error.json_path}: {error.message}" for error in KUBERAY.iter_errors(load(path))]


def test_the_schema_of_kuberay_is_one_and_open_at_no_level() -> None:
    KUBERAY.check_schema(KUBERAY.schema)
    definitions = KUBERAY.schema["$defs"]
    named = [place for place in levels(definitions) if "properties" in level(definitions, place)]
    assert len(named) > 20
    assert all(level(definitions, place).get("additionalProperties") is False for place in named)


@pytest.mark.parametrize("path", KUBERAY_FILES, ids=lambda path: path.name)
def test_a_misspelt_field_is_refused_at_every_level(path: Path) -> None:
    places = list(levels(load(path)))
    assert len(places) > 20
    for place in places:
        content = load(path)
        fields = level(content, place)
        first = next(iter(fields))
        fields[f"{first}s"] = fields[first]  # beside the right one, or its absence could be what is refused
        assert "additionalProperties" in refusals(content), f"{place}: {first}s"


@pytest.mark.parametrize(
    ("name", "where", "value", "refusal"),
    [
        ("cluster", "apiVersion", "ray.io/v1alpha1", "const"),
        ("cluster", "kind", "RayClusters", "enum"),
        ("cluster", "spec", [], "type"),
        ("cluster", "spec/rayVersion", 2.6, "type"),
        ("cluster", "spec/enableInTreeAutoscaling", "yes", "type"),
        ("cluster", "spec/authOptions/mode", "tokens", "enum"),
        ("cluster", "spec/autoscalerOptions/version", "v3", "enum"),
        ("cluster", "spec/autoscalerOptions/idleTimeoutSeconds", "2m", "type"),
        ("cluster", "spec/headGroupSpec/rayStartParams/num-cpus", 0, "type"),
        ("cluster", "spec/workerGroupSpecs/0/replicas", "0", "type"),
        ("cluster", "spec/workerGroupSpecs/1/template/spec/tolerations/0/effect", "Never", "enum"),
        ("cluster", f"{CONTAINER}/env/0/value", 60, "type"),
        ("cluster", f"{CONTAINER}/resources/limits/cpu", 0.5, "type"),
        ("cluster", f"{CONTAINER}/resources/limits/memory", "8 GiB", "pattern"),
        ("distill", "spec/entrypoint", ["python"], "type"),
        ("distill", "spec/backoffLimit", 1.5, "type"),
        ("distill", "spec/preRunningDeadlineSeconds", 0, "minimum"),
        ("distill", "spec/submissionMode", "K8sJob", "enum"),
        ("service", "spec/serveConfigV2", {"applications": []}, "type"),
        ("service", "spec/upgradeStrategy/type", "RollingUpdate", "enum"),
    ],
)
def test_a_wrong_value_is_refused(name: str, where: str, value: Any, refusal: str) -> None:
    content = load(INFRA / "kuberay" / f"{name}.yaml")
    *above, field = steps(where)
    assert field in level(content, above)
    level(content, above)[field] = value
    assert refusals(content) == {refusal}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("cluster", "spec/idleTimeoutSeconds"),  # of autoscalerOptions, or of a group of workers
        ("cluster", "spec/entrypoint"),  # of a RayJob
        ("cluster", "spec/headGroupSpec/replicas"),  # of a group of workers
        ("cluster", "spec/headGroupSpec/containers"),  # of template.spec
        ("cluster", "spec/headGroupSpec/template/spec/resources"),  # of a container
        ("distill", "spec/rayClusterConfig"),  # so it is called in a RayService
        ("distill", "spec/rayClusterSpec/backoffLimit"),  # of the job around it
        ("service", "spec/rayClusterSpec"),  # so it is called in a RayJob
        ("service", "spec/rayClusterConfig/serveConfigV2"),  # of the service around it
    ],
)
def test_a_field_in_the_wrong_place_is_refused(name: str, where: str) -> None:
    content = load(INFRA / "kuberay" / f"{name}.yaml")
    *above, field = steps(where)
    level(content, above)[field] = {}
    assert refusals(content) == {"additionalProperties"}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("cluster", "apiVersion"),
        ("cluster", "metadata/name"),
        ("cluster", "spec"),
        ("cluster", "spec/headGroupSpec"),
        ("cluster", "spec/headGroupSpec/template"),
        ("cluster", "spec/headGroupSpec/template/spec"),
        ("cluster", "spec/headGroupSpec/template/spec/containers"),
        ("cluster", f"{CONTAINER}/name"),
        ("cluster", f"{CONTAINER}/env/0/name"),
        ("cluster", f"{CONTAINER}/volumeMounts/0/mountPath"),
        ("cluster", "spec/workerGroupSpecs/0/groupName"),
        ("cluster", "spec/workerGroupSpecs/0/minReplicas"),
        ("cluster", "spec/workerGroupSpecs/0/maxReplicas"),
        ("cluster", "spec/workerGroupSpecs/1/template"),
        ("distill", "spec/rayClusterSpec/headGroupSpec"),
        ("service", "spec/rayClusterConfig"),
    ],
)
def test_a_missing_field_is_refused(name: str, where: str) -> None:
    content = load(INFRA / "kuberay" / f"{name}.yaml")
    *above, field = steps(where)
    del level(content, above)[field]
    assert refusals(content) == {"required"}


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
    assert content["http_options"]["request_timeout_s"] > config.longest_seconds


def test_the_service_on_kubernetes_deploys_the_same_with_room_to_grow_and_to_update() -> None:
    spec = load(INFRA / "kuberay" / "service.yaml")["spec"]
    content = yaml.safe_load(spec["serveConfigV2"])
    assert content == load(INFRA / "serve" / "serve.yaml")
    assert content["controller_options"]["runtime_env"] == CONTROLLER
    config = ServeConfig.model_validate(content["applications"][0]["args"])
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    assert workers["maxReplicas"] > config.cluster.most_workers
    assert int(container["resources"]["requests"]["cpu"]) > config.cluster.cpus_per_worker
    assert str(config.keys_file.parent) in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert pod["terminationGracePeriodSeconds"] > config.longest_seconds


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


@pytest.mark.parametrize("own", [REPLICA, JOBS])
def test_what_runs_networks_keeps_memory_though_it_inherits_from_what_gives_it_back(own):
    inherited = CONTROLLER["env_vars"] | own["env_vars"]
    assert {name: inherited[name] for name in KEEPS} == KEEPS
    assert CONTROLLER["env_vars"].keys() & KEEPS.keys()
