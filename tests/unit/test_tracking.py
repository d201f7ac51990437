"""What an MLflow server is told of a run, over real HTTP; and what becomes of it when the server fails."""

import base64
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kdsr import tracking
from kdsr.config import TeacherTrainingConfig
from kdsr.errors import NonFiniteLoss, RequestError
from kdsr.spec import RepChainSpec
from kdsr.store import open_store
from kdsr.tracking import begin_mlflow
from kdsr.training import Worker, train
from tests.pictures import photograph
from tests.small_shards import row, write_set
from tests.unit.test_tune import config_of


class Server(ThreadingHTTPServer):
    """As much of MLflow's REST API as a run needs, kept in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.experiments: list[str] = []
        self.runs: list[dict[str, Any]] = []
        self.authorization: set[str | None] = set()
        self.is_broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, what: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.is_broken:
            return 503, {"error_code": "TEMPORARILY_UNAVAILABLE"}
        match what:
            case "experiments/get-by-name" if asked["experiment_name"] not in self.experiments:
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}
            case "experiments/get-by-name":
                place = self.experiments.index(asked["experiment_name"])
                return 200, {"experiment": {"experiment_id": str(place)}}
            case "experiments/create":
                self.experiments.append(asked["name"])
                return 200, {"experiment_id": str(len(self.experiments) - 1)}
            case "runs/create":
                self.runs.append({**asked, "status": "RUNNING", "metrics": [], "params": []})
                return 200, {"run": {"info": {"run_id": str(len(self.runs) - 1)}}}
        run = self.runs[int(asked.pop("run_id"))]
        if what == "runs/update":
            run.update(asked)
        else:
            assert what == "runs/log-batch" and len(asked.get("metrics", [])) <= 1000
            assert len(asked.get("params", [])) <= 100
            run["metrics"] += asked.get("metrics", [])
            run["params"] += asked.get("params", [])
        return 200, {}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.reply(dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query)))

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, asked: dict[str, Any]) -> None:
        self.server.authorization.add(self.headers["Authorization"])
        what = urllib.parse.urlsplit(self.path).path.removeprefix("/api/2.0/mlflow/")
        status, content = self.server.answer(what, asked)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        """The terminal is for the tests."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("TOKEN", "USERNAME", "PASSWORD"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(server: Server, tmp_path: Path) -> TeacherTrainingConfig:
    rows = [row(f"{seed}", photograph(seed, height=40, width=40), heldout=seed == 0) for seed in range(3)]
    write_set(open_store(f"file://{tmp_path}/shards"), [rows])
    tracked = {"tracking": {"mlflow_uri": server.url, "experiment": "trials"}}
    found = config_of(tmp_path, base=tracked).base_run()
    assert isinstance(found, TeacherTrainingConfig)
    return found


def values(run: dict[str, Any], name: str) -> dict[int, float]:
    return {each["step"]: each["value"] for each in run["metrics"] if each["key"] == name}


def test_a_server_has_what_the_run_has_logged_and_how_it_was_asked(
    server: Server, config: TeacherTrainingConfig
) -> None:
    reports = list(train(config))
    (run,) = server.runs
    assert server.experiments == ["trials"] and run["run_name"] == "base" and run["status"] == "FINISHED"
    for name in ("loss", "heldout_psnr_y"):
        assert values(run, name) == {report.step: report.metrics[name] for report in reports}
    params = {each["key"]: each["value"] for each in run["params"]}
    assert params["optimizer.learning_rate"] == "0.001" and params["model.kind"] == "espcn"
    assert not any(key.startswith(("store", "tracking")) for key in params)


def test_a_run_that_goes_on_stays_the_same_run_on_the_server(
    server: Server, config: TeacherTrainingConfig
) -> None:
    first = train(config)
    next(first), next(first)
    first.close()
    assert server.runs[0]["status"] == "RUNNING"
    list(train(config))
    (run,) = server.runs
    assert sorted(values(run, "loss")) == [1, 2, 3, 4] and run["status"] == "FINISHED"


def test_a_run_that_fails_is_told_so(server: Server, config: TeacherTrainingConfig) -> None:
    optimizer = config.optimizer.model_copy(update={"learning_rate": 1e30})
    fields = {"optimizer": optimizer, "model": RepChainSpec(scale=2, num_features=4, num_layers=3)}
    with pytest.raises(NonFiniteLoss):
        list(train(config.model_copy(update=fields)))
    assert server.runs[0]["status"] == "FAILED"


def test_only_the_first_rank_reports(server: Server, config: TeacherTrainingConfig) -> None:
    list(train(config, Worker(rank=1, world_size=2)))
    assert server.runs == []


def test_a_server_that_fails_in_the_middle_stops_no_run_and_is_told_later(
    server: Server, config: TeacherTrainingConfig
) -> None:
    for progress in train(config):
        server.is_broken = progress.step == 2
    (run,) = server.runs
    assert sorted(values(run, "loss")) == [1, 2, 3, 4]


def test_a_server_that_does_not_answer_is_named_before_anything_runs(
    server: Server, config: TeacherTrainingConfig
) -> None:
    server.is_broken = True
    with pytest.raises(RequestError, match=f"MLflow at {server.url} refused experiments/get-by-name"):
        list(train(config))
    server.shutdown()
    server.server_close()
    with pytest.raises(RequestError, match="no MLflow server answers at .*leave tracking.mlflow_uri out"):
        list(train(config))


def test_many_settings_and_values_go_in_parts_and_what_is_not_finite_stays(
    server: Server, tmp_path: Path
) -> None:
    store = open_store(f"file://{tmp_path}/run")
    settings = {f"field{number}": "x" * 1000 for number in range(250)}
    run = begin_mlflow(server.url, experiment="e", name="n", store=store, settings=settings, commit="c")
    run.add(1, {f"m{number}": 1.0 for number in range(2500)} | {"bad": float("nan")})
    assert len(server.runs[0]["params"]) == 250 and len(server.runs[0]["metrics"]) == 2500
    assert {len(each["value"]) for each in server.runs[0]["params"]} == {tracking.PARAM_CHARACTERS}


def test_credentials_come_from_the_environment(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(name: str) -> None:
        store = open_store(f"file://{tmp_path}/{name}")
        begin_mlflow(server.url, experiment="e", name=name, store=store, settings={}, commit="c")

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    begin("basic")
    assert server.authorization == {f"Basic {base64.b64encode(b'me:secret').decode()}"}
    server.authorization.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "word")
    begin("token")
    assert server.authorization == {"Bearer word"}
