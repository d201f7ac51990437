"""The same network and the same codecs behind LitServe.

    python bench/serving/peer.py PORT MODEL WORKERS THREADS

What LitServe needs is on PYTHONPATH, see bench/serve.py. A body comes as raw bytes and goes to a worker as it
is, which is the least that LitServe can do with it.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import litserve
from fastapi import Depends
from starlette.requests import Request
from starlette.responses import Response


async def body(request: Request) -> bytes:
    """Of a request."""
    return await request.body()


class Peer(litserve.LitAPI):  # type: ignore[misc]
    """Decode, upscale, encode, one image after the other in each worker."""

    def __init__(self, model: str, threads: int) -> None:
        super().__init__()
        self._name, self._threads = model, threads

    def setup(self, device: str) -> None:
        """In each worker, before its first request."""
        import torch

        from kdsr.checkpoint import load_model
        from kdsr.engine import Engine
        from kdsr.upscale import Upscaler

        torch.set_num_threads(self._threads)
        self._upscaler = Upscaler(Engine(load_model(self._name).model, device=device))

    def decode_request(self, request: Annotated[bytes, Depends(body)]) -> Any:
        """Bytes of a file to an image."""
        from kdsr import codecs

        return codecs.decode(request, max_pixels=4_194_304)

    def predict(self, image: Any) -> Any:
        """An image to a larger one."""
        return self._upscaler.upscale(image)

    def encode_response(self, image: Any) -> Response:
        """As JPEG, like an answer of kdsr."""
        from kdsr import codecs
        from kdsr.config import EncodeConfig

        data = codecs.encode(image, format="jpeg", options=EncodeConfig())
        return Response(data, media_type="image/jpeg")


if __name__ == "__main__":
    port, model, workers, threads = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    server = litserve.LitServer(
        Peer(model, threads), accelerator="cpu", workers_per_device=workers, timeout=120
    )
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error")
