"""Metrics of a run on an MLflow server, over its REST API (2.0): no library of MLflow is needed.

Sends what it is given and knows no training. A server that fails in the middle of a run is told later, and
the run goes on: `metrics.jsonl` holds everything anyway.
"""

import base64
import json
import logging
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdsr.errors import KeyNotFound, RequestError
from kdsr.store import Store

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10.0
PAUSE_SECONDS = 60.0
"""Before a server that failed is asked again, so that training does not wait for it at every step."""
RUN_KEY = "mlflow.json"
METRICS_A_CALL, PARAMS_A_CALL, PARAM_CHARACTERS = 1000, 100, 500
"""What one call of the API takes, and what every version takes of a parameter."""


@dataclass
class MlflowRun:
    """One run on a server; what could not be sent waits for the next time."""

    url: str
    run_id: str
    waiting: list[dict[str, Any]] = field(default_factory=list)
    paused_until: float = 0.0

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step; those that are no finite numbers are left out."""
        now = _milliseconds()
        self.waiting += [
            {"key": name, "value": value, "timestamp": now, "step": step}
            for name, value in metrics.items()
            if math.isfinite(value)
        ]
        if time.monotonic() >= self.paused_until:
            self._send()

    def finish(self, status: Literal["FINISHED", "FAILED"]) -> None:
        """The last word: what waits, and how it ended."""
        self._send()
        if self.waiting:
            log.warning(
                "MLflow run %s lacks %d values; metrics.jsonl has them", self.run_id, len(self.waiting)
            )
        try:
            _call(
                self.url,
                "runs/update",
                {"run_id": self.run_id, "status": status, "end_time": _milliseconds()},
            )
        except RequestError as error:
            log.warning("%s", error)

    def _send(self) -> None:
        try:
            while self.waiting:
                metrics = self.waiting[:METRICS_A_CALL]
                _call(self.url, "runs/log-batch", {"run_id": self.run_id, "metrics": metrics})
                self.waiting = self.waiting[METRICS_A_CALL:]
        except RequestError as error:
            self.paused_until = time.monotonic() + PAUSE_SECONDS
            log.warning("%s; metrics wait for it", error)


def begin_mlflow(
    url: str, *, experiment: str, name: str, store: Store, settings: Mapping[str, Any], commit: str
) -> MlflowRun:
    """The run on the server that belongs to the run at `store`: an earlier start's, or a new one.

    `settings` become its parameters. Raises RequestError when the server does not answer or refuses.
    """
    if (run_id := _earlier(store, url)) is not None:
        _call(url, "runs/update", {"run_id": run_id, "status": "RUNNING"})
        return MlflowRun(url, run_id)
    tags = {"kdsr.commit": commit, "kdsr.run": store.uri}
    made = _call(
        url,
        "runs/create",
        {
            "experiment_id": _experiment(url, experiment),
            "run_name": name,
            "start_time": _milliseconds(),
            "tags": [{"key": key, "value": value} for key, value in tags.items()],
        },
    )
    run_id = made["run"]["info"]["run_id"]
    params = [{"key": key, "value": str(value)[:PARAM_CHARACTERS]} for key, value in settings.items()]
    for start in range(0, len(params), PARAMS_A_CALL):
        _call(url, "runs/log-batch", {"run_id": run_id, "params": params[start : start + PARAMS_A_CALL]})
    store.put(RUN_KEY, json.dumps({"url": url, "run_id": run_id}).encode())
    return MlflowRun(url, run_id)


def _earlier(store: Store, url: str) -> str | None:
    try:
        entry = json.loads(store.get(RUN_KEY))
    except KeyNotFound:
        return None
    return str(entry["run_id"]) if entry["url"] == url else None


def _experiment(url: str, name: str) -> str:
    """Its id; made where there is none."""
    query = urllib.parse.urlencode({"experiment_name": name})
    try:
        return str(_call(url, f"experiments/get-by-name?{query}")["experiment"]["experiment_id"])
    except _Unknown:
        return str(_call(url, "experiments/create", {"name": name})["experiment_id"])


class _Unknown(RequestError):
    """The server has no such thing."""


def _call(url: str, what: str, body: Mapping[str, Any] | None = None) -> Any:
    """One answer of the API: POST with a `body`, GET without. Raises RequestError."""
    request = urllib.request.Request(  # noqa: S310 - the config lets http and https pass only
        f"{url.rstrip('/')}/api/2.0/mlflow/{what}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **_authorization()},
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
            return json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        kind = _Unknown if "RESOURCE_DOES_NOT_EXIST" in text else RequestError
        raise kind(f"MLflow at {url} refused {what}: {error.code} {text:.200}") from None
    except (OSError, ValueError) as error:
        raise RequestError(
            f"no MLflow server answers at {url}: {error}; start it, or leave tracking.mlflow_uri out"
        ) from None


def _authorization() -> dict[str, str]:
    """As MLflow's own client takes it from the environment."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        pair = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
        return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
    return {}


def _milliseconds() -> int:
    return int(1000 * time.time())
