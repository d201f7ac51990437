"""Servers with tiny networks for the tests of this folder."""

import pytest

from kdsr.config import ServeConfig
from tests.small_server import Server, save_tiny


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Uris of tiny networks by scale."""
    folder = tmp_path_factory.mktemp("models")
    return {scale: save_tiny(folder / f"x{scale}", scale=scale)[0] for scale in (2, 3, 4)}


@pytest.fixture
def serve(tiny_models):
    """Makes servers, and ends them."""
    servers = []

    def make(**fields):
        given = {"models": {"tiny": [tiny_models[2], tiny_models[4]]}, "auth": "none", "precision": "float32"}
        servers.append(Server(ServeConfig.model_validate(given | fields)))
        return servers[-1]

    yield make
    for server in servers:
        server.client.close()
        server.host.close()


@pytest.fixture
def server(serve):
    return serve()
