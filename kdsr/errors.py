"""What can go wrong, by who has to act.

KdsrError
├── RequestError            the caller asked for something impossible; never retried
│   └── UnknownModel        neither a bundled name nor a model directory
├── StoreError              a store did not do what it was asked; retried inside the store only
│   ├── KeyNotFound         no object under this key
│   ├── KeyExists           a conditional create met an object that was already there
│   ├── BucketNotFound      the bucket does not exist
│   ├── AccessDenied        the credentials do not allow it
│   └── StoreUnreachable    nothing answered at the endpoint
├── ServerError             a server of kdsr did not give what it was asked for
│   ├── ServerUnreachable   nothing answered, or the answer broke off
│   ├── ServerBusy          it has no room for the request, or its models are not ready
│   ├── RequestRefused      the request is wrong: no key, an unknown option, no such job
│   ├── ImageRefused        the image is too large, or none that can be read
│   └── JobFailed           a job of the server ended without all of its results
├── Abandoned               nobody waits for the result any more
└── DataError               this image, shard or checkpoint is bad
    ├── ImageCorrupt        the bytes are no image, or a broken one
    ├── ImageUnsupported    an image, but of a kind that is not handled
    ├── ImageTooSmall       an image below the size that was asked for
    ├── ImageTooLarge       an image above the pixel limit
    ├── ShardCorrupt        a shard does not match its index
    ├── CheckpointCorrupt   weights or training state do not match their card
    └── NonFiniteLoss       a loss or a gradient became NaN or infinite

Every message is a sentence to the person who must act: what, which, expected, found, what to do next.
"""


class KdsrError(Exception):
    """Base of all errors that kdsr raises on purpose."""


class RequestError(KdsrError):
    """The caller asked for something impossible. Never retried."""


class UnknownModel(RequestError):
    """Neither the name of a bundled model nor the uri of a model directory."""


class StoreError(KdsrError):
    """A store did not do what it was asked. Retried inside the store and nowhere else."""


class KeyNotFound(StoreError):
    """No object under this key."""


class KeyExists(StoreError):
    """A conditional create met an object that was already there."""


class BucketNotFound(StoreError):
    """The bucket does not exist."""


class AccessDenied(StoreError):
    """The credentials do not allow it."""


class StoreUnreachable(StoreError):
    """Nothing answered at the endpoint."""


class ServerError(KdsrError):
    """A server of kdsr did not give what it was asked for."""

    status: int | None = None
    """Of the HTTP answer, when there was one."""
    kind: str = ""
    """Of the problem, as docs/serving.md lists them."""
    request_id: str = ""
    """Under which the server's log knows the request."""


class ServerUnreachable(ServerError):
    """Nothing answered, or the answer broke off. Was tried several times."""


class ServerBusy(ServerError):
    """The server has no room for the request, or its models are not ready. Was tried several times."""


class RequestRefused(ServerError):
    """The server finds the request wrong. Never retried."""


class ImageRefused(ServerError):
    """The server finds the image too large, or cannot read it. Never retried."""


class JobFailed(ServerError):
    """A job of the server ended without all of its results."""


class Abandoned(KdsrError):
    """Nobody waits for the result any more: its caller left, or its deadline passed."""


class DataError(KdsrError):
    """This image, shard or checkpoint is bad."""


class ImageCorrupt(DataError):
    """The bytes are no image, or a broken one."""


class ImageUnsupported(DataError):
    """An image, but of a kind that is not handled."""


class ImageTooSmall(DataError):
    """An image below the size that was asked for."""


class ImageTooLarge(DataError):
    """An image above the pixel limit."""


class ShardCorrupt(DataError):
    """A shard does not match its index."""


class CheckpointCorrupt(DataError):
    """Weights or a training state do not match their card."""


class NonFiniteLoss(DataError):
    """A loss or a gradient became NaN or infinite."""
