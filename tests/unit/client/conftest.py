"""Servers for clients: a real one, and ones that say what they are told to."""

import pytest

from kdsr.client import AsyncClient, Client
from kdsr.config import ServeConfig
from kdsr.serving.keys import new_key
from tests.scripted_server import IMPATIENT, Scripted
from tests.small_server import Server, listening, save_tiny


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """(address, key) of a server with tiny networks."""
    folder = tmp_path_factory.mktemp("served")
    models = {"tiny": [save_tiny(folder / f"x{scale}", scale=scale)[0] for scale in (2, 4)]}
    key, lines = new_key("anna")
    sha256 = lines.rpartition("sha256: ")[2].removesuffix("}")
    limits = {"max_pixels": 100 * 100, "max_body_bytes": 100_000}
    server = Server(
        ServeConfig.model_validate(
            {"models": models, "keys": {"anna": {"sha256": sha256}}, "precision": "float32", "limits": limits}
        )
    )
    with listening(server.app) as address:
        yield address, key
    server.client.close()
    server.host.close()


@pytest.fixture
def client(served):
    address, key = served
    with Client(address, api_key=key, retries=IMPATIENT) as made:
        yield made


@pytest.fixture
def make_async(served):
    address, key = served
    return lambda: AsyncClient(address, api_key=key, retries=IMPATIENT)


@pytest.fixture
def scripted():
    """Starts scripted servers."""
    running = []

    def start(*answers):
        running.append(Scripted(list(answers)).running())
        return running[-1].__enter__()

    yield start
    for server in running:
        server.__exit__(None, None, None)
