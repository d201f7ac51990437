"""The options that Serve's proxies get bring a real handshake, by the proxies' own server and without Ray."""

import asyncio
import shutil
import ssl
import subprocess

import pytest
from pydantic import ValidationError
from ray.serve._private.http_util import start_asgi_http_server

from cluster import serve
from infra.local import free_port
from kdsr.config import ServeConfig

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """PEM files of a certificate for localhost, which signs itself, and of its key."""
    if shutil.which("openssl") is None:
        pytest.skip("the program openssl is not there")
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(command, check=True, capture_output=True)
    return files


@pytest.fixture
def options(certificate):
    chain, key = certificate
    config = ServeConfig(auth="none", port=free_port(), tls_certificate=chain, tls_key=key)
    return serve.http_options(config)


@pytest.fixture
def trusting(certificate):
    return ssl.create_default_context(cafile=str(certificate[0]))


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["scheme"].encode()})


def answer(options, context):
    """What comes back over TLS from a server with these options."""

    async def run():
        loop = asyncio.get_running_loop()
        task, server = await start_asgi_http_server(hello, options, event_loop=loop)
        try:
            while not server.started:
                await asyncio.sleep(0.005)
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", options.port, ssl=context, server_hostname="localhost"
            )
            writer.write(REQUEST)
            found = await reader.read()
            writer.close()
            return found
        finally:
            server.should_exit = True
            await task

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_a_client_that_trusts_the_certificate_is_answered_over_tls(options, trusting):
    found = answer(options, trusting)
    assert found.startswith(b"HTTP/1.1 200") and b"https" in found


def test_a_client_that_does_not_trust_it_is_not(options):
    with pytest.raises(ssl.SSLCertVerificationError):
        answer(options, ssl.create_default_context())


def test_no_field_promises_that_clients_are_asked_for_certificates(options, trusting, certificate):
    with pytest.raises(ValidationError, match="tls_client_ca"):
        ServeConfig.model_validate({"auth": "none", "tls_client_ca": "authority.pem"})
    # All that it came to: Serve's proxies answer clients without a certificate just the same.
    options = options.model_copy(update={"ssl_ca_certs": str(certificate[0])})
    assert answer(options, trusting).startswith(b"HTTP/1.1 200")
