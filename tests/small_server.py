"""A whole server in this process: the application in front of a host with tiny networks."""

import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import PIL.Image
import torch
import uvicorn
from starlette.testclient import TestClient

from kdsr.checkpoint import save_model
from kdsr.models import build_model
from kdsr.serving.app import build_app
from kdsr.serving.host import HostBackend, ModelHost
from kdsr.serving.keys import read_keys
from kdsr.spec import Card, EspcnSpec
from kdsr.store import open_store
from tests.pictures import photograph


class InProcess(HostBackend):
    """The backend without a cluster, which counts its calls."""

    def __init__(self, host):
        super().__init__(host)
        self.host, self.calls = host, 0

    async def upscale(self, call):
        self.calls += 1
        return await super().upscale(call)


class Server:
    """What a test talks to."""

    def __init__(self, config):
        self.config = config
        self.host = ModelHost(config, num_threads=1)
        assert self.host.load(config.models) == {}
        self.backend = InProcess(self.host)
        self.app = build_app(config, self.backend, read_keys(config))
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def upscale(self, data, *, query="", content_type="image/png", **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(
            f"/v1/upscale{query}", content=data, headers={"Content-Type": content_type} | headers
        )


@contextmanager
def listening(app) -> Iterator[str]:
    """The address at which `app` answers real requests, from a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, args=([place],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def save_tiny(place, *, scale, seed=0):
    """A small random network at `place`."""
    torch.manual_seed(seed)
    network = build_model(EspcnSpec(scale=scale, num_features=4))
    store = open_store(str(place))
    card = Card(name=f"tiny-x{scale}", spec=network.spec, num_parameters=0, sha256="")
    return store.uri, save_model(store, network, card).sha256


def encoded(height=24, width=32, *, format_="PNG", mode="RGB", **options):
    """The bytes of a small photograph."""
    buffer = io.BytesIO()
    picture = PIL.Image.fromarray(photograph(3, height=64, width=64)[:height, :width]).convert(mode)
    picture.resize((width, height)).save(buffer, format_, **options)
    return buffer.getvalue()


def picture_of(response):
    """What came back, as an array."""
    assert response.status_code == 200, response.text
    return np.asarray(PIL.Image.open(io.BytesIO(response.content)))


def problem(response):
    """Status and kind; every refusal has the same form and tells nothing of how we are made."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    content = json.loads(response.content)
    assert set(content) == {"type", "title", "status", "detail", "instance"}
    assert content["status"] == response.status_code
    assert "Traceback" not in response.text and ".py" not in response.text
    return content["status"], content["type"].removeprefix("urn:kdsr:problem:")
