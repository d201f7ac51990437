"""Every byte that kdsr reads or keeps: `file://` and `s3://` behind one small protocol.

A key is a relative path with "/" between its parts, taken literally: nothing is percent-decoded, and no key
leads out of its store's root. Writes are atomic: a reader sees the old object, the new one, or none.
Credentials come from AWS's standard chain and are in no uri, repr, pickle or error text.
The only module that knows boto3. Knows no images and no JSON.
"""

import errno
import fcntl
import hashlib
import mimetypes
import os
import platform
import random
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import count, takewhile
from logging import getLogger
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeVar
from urllib.parse import urlsplit

from kdsr.config import StoreConfig
from kdsr.errors import (
    AccessDenied,
    BucketNotFound,
    KeyExists,
    KeyNotFound,
    RequestError,
    StoreError,
    StoreUnreachable,
)
from kdsr.uris import absolute_uri

if TYPE_CHECKING:
    import pyarrow.fs
    from botocore.exceptions import ClientError

# ruff: noqa: D102 - the methods of Store say what those of its two kinds do

logger = getLogger(__name__)

DEFAULTS = StoreConfig()

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class ObjectInfo:
    """What a store says of an object without reading it. `etag` changes when the content does."""

    key: str
    size: int
    etag: str


class Store(Protocol):
    """Objects under one root. Picklable, and safe to share between threads.

    Every method raises RequestError for a text that is no key, and StoreError when the store fails.
    """

    @property
    def uri(self) -> str:
        """`file:///absolute/root` or `s3://bucket/prefix`, without a slash at the end."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key begins with the text `prefix`, read by page, in the byte order of keys.

        A server that goes folder by folder instead (SeaweedFS) keeps its order, the same on every call.
        """

    def stat(self, key: str) -> ObjectInfo:
        """Size and etag of one object. Raises KeyNotFound."""

    def exists(self, key: str) -> bool:
        """Whether there is an object under `key`."""
        try:
            self.stat(key)
        except KeyNotFound:
            return False
        return True

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """All bytes, or up to `length` of them from `start`; none beyond the end. Raises KeyNotFound."""

    def put(self, key: str, data: bytes) -> ObjectInfo:
        """Write or replace an object, atomically."""

    def create(self, key: str, data: bytes) -> ObjectInfo:
        """Write an object that must not exist yet. Of several writers one wins, the others get KeyExists."""

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        """Write or replace an object with the content of a local file of any size, atomically."""

    def delete(self, key: str) -> None:
        """Remove an object. One that does not exist is fine."""

    def child(self, prefix: str) -> "Store":
        """The same store rooted at the folder `prefix` below this root."""

    def arrow(self) -> "tuple[pyarrow.fs.FileSystem, str]":
        """A filesystem for Parquet with the same settings and credentials, and the root's path in it."""


def open_store(uri: str, config: StoreConfig = DEFAULTS) -> Store:
    """The store at a `file://` or `s3://` uri or at a plain path. Touches neither disk nor network.

    Raises RequestError for a uri that cannot be one: unknown scheme, no bucket, credentials in it.
    """
    scheme, root = _split_uri(uri)
    if scheme == "file":
        return FileStore(Path(root or "/"))
    bucket, _, prefix = root.partition("/")
    prefix = prefix.strip("/")
    return S3Store(bucket, _checked_key(prefix) if prefix else "", config)


def open_object(uri: str, config: StoreConfig = DEFAULTS) -> tuple[Store, str]:
    """The store that holds the object at `uri`, and the object's key in it: the last part of the uri."""
    scheme, path = _split_uri(uri)
    parent, _, name = path.rpartition("/")
    if not name or (scheme == "s3" and not parent):
        raise RequestError(f"{uri} names no object; expected a uri that ends with the name of one")
    return open_store(f"{scheme}://{parent or '/'}", config), _checked_key(name)


def _split_uri(uri: str) -> tuple[str, str]:
    """Scheme, and what follows it without slashes at the end."""
    try:
        scheme, _, rest = absolute_uri(uri).partition("://")
    except ValueError as error:
        raise RequestError(str(error)) from None
    if "\0" in rest:
        raise RequestError("a uri cannot hold a NUL character")
    return scheme, rest.rstrip("/")


# ---------------------------------------------------------------- keys

_TEMPORARY = re.compile(r"\.kdsr-[0-9a-f]{32}\.tmp")
"""Name of a file that is being written: never listed, never a key."""


def _checked_key(key: str) -> str:
    """`key`, which names a place strictly below a root. Raises RequestError for any other text."""
    # Some servers read "\" as "/", so ".." beside a backslash could lead out of the root as well.
    leaves_root = ".." in re.split(r"[/\\]", key)
    if leaves_root or any(part in ("", ".") or _TEMPORARY.fullmatch(part) for part in key.split("/")):
        raise RequestError(f"{key!r} is no key: expected names with / between them, below the store's root")
    if "\0" in key or not _is_unicode(key):
        raise RequestError(f"{key!r} is no key: NUL and invalid Unicode are not allowed")
    return key


def _checked_prefix(prefix: str) -> str:
    """`prefix`, with which a key may begin; its last part can be any beginning of a name."""
    folder, slash, _ = prefix.rpartition("/")
    if slash:
        _checked_key(folder)
    return prefix


def _checked_range(start: int, length: int | None) -> None:
    if start < 0 or (length is not None and length < 0):
        raise RequestError(f"start {start} and length {length} must not be negative")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---------------------------------------------------------------- file://


@dataclass(frozen=True)
class FileStore(Store):
    """A folder. The first write makes it and the folders below it. A link out of it is not followed."""

    root: Path

    @property
    def uri(self) -> str:
        return f"file://{self.root}"

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return _walk(self.root, _checked_prefix(prefix))

    def stat(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with _os_errors(path):
            return _file_info(key, path)

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        _checked_range(start, length)
        self.stat(key)  # Opening a pipe would wait for ever.
        path = self._path(key)
        with _os_errors(path), path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def put(self, key: str, data: bytes) -> ObjectInfo:
        return self._write(key, lambda file: file.write(data), _replace)

    def create(self, key: str, data: bytes) -> ObjectInfo:
        return self._write(key, lambda file: file.write(data), _create)

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        with path.open("rb") as source:
            return self._write(key, lambda file: shutil.copyfileobj(source, file, 2**20), _replace)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _os_errors(path), suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()

    def child(self, prefix: str) -> "FileStore":
        return FileStore(self._path(prefix.rstrip("/")))

    def arrow(self) -> "tuple[pyarrow.fs.FileSystem, str]":
        import pyarrow.fs

        return pyarrow.fs.LocalFileSystem(), str(self.root)

    def _path(self, key: str) -> Path:
        path = self.root / _checked_key(key)
        if not _is_inside(path, self.root):
            raise RequestError(f"{key!r} is a link that leads out of {self.uri}")
        return path

    def _write(
        self, key: str, fill: Callable[[BinaryIO], object], publish: Callable[["_Draft", Path], None]
    ) -> ObjectInfo:
        """Fill a file without a name, bring it to the disk, and only then give it its name."""
        path = self._path(key)
        with _os_errors(path):
            _make_folder(path.parent)
            _sweep(path.parent, os.getpid())
            with _draft(path.parent) as draft:
                fill(draft.file)
                draft.file.flush()
                os.fsync(draft.file.fileno())
                info = _file_info(key, draft.place)
                publish(draft, path)
            _sync_folder(path.parent)
        return info


def _walk(root: Path, prefix: str) -> Iterator[ObjectInfo]:
    """Objects below `root` in the byte order of their keys. Holds the names of one folder per level."""
    levels = [iter(_names(root, ""))]
    while levels:
        key = next(levels[-1], None)
        if key is None:
            levels.pop()
        elif key.endswith("/"):
            if key.startswith(prefix) or prefix.startswith(key):
                levels.append(iter(_names(root, key)))
        elif key.startswith(prefix):
            # What was deleted since its folder was read is no object any more.
            with _os_errors(root / key), suppress(FileNotFoundError):
                yield _file_info(key, root / key)


def _names(root: Path, folder: str) -> list[str]:
    """Keys of what is directly in `folder`; folders end with "/", which puts them where S3 puts them."""
    with _os_errors(root / folder), suppress(FileNotFoundError), os.scandir(root / folder) as entries:
        names = (_name(root, entry) for entry in entries)
        return sorted((folder + name for name in names if name), key=str.encode)
    return []


def _name(root: Path, entry: os.DirEntry[str]) -> str | None:
    """The entry's part of a key, or None when it is no object."""
    if _TEMPORARY.fullmatch(entry.name):
        return None
    leads_away = entry.is_symlink() and (entry.is_dir() or not _is_inside(Path(entry.path), root))
    if leads_away or not _is_unicode(entry.name):
        logger.warning(
            "%r is not listed: it links to a folder or out of the root, or is not UTF-8", entry.path
        )
        return None
    return f"{entry.name}/" if entry.is_dir() else entry.name if entry.is_file() else None


def _is_inside(path: Path, root: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _file_info(key: str, path: Path) -> ObjectInfo:
    """Raises FileNotFoundError for all that is no regular file, as folders are no objects."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(errno.ENOENT, "no regular file", str(path))
    return ObjectInfo(key, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}")


def _make_folder(folder: Path) -> None:
    """Make `folder` and what is missing above it so that a power cut does not take it back."""
    missing = takewhile(lambda above: not above.is_dir(), (folder, *folder.parents))
    for path in reversed(list(missing)):
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What is not finished has no name where the file system can do that: the kernel then removes it with the
# process. Elsewhere it is locked for as long as its writer lives, and one without a lock is swept away.

_LEFT_BEHIND_SECONDS = 24 * 3600.0
"""After that long without a write, the temporary file of a writer that cannot be asked is nobody's."""


@dataclass(frozen=True)
class _Draft:
    """A file that is not an object yet."""

    file: BinaryIO
    temporary: Path
    """The name that it has, or may be given for a moment."""
    is_named: bool

    @property
    def place(self) -> Path:
        """A path at which the file can be opened or linked."""
        return self.temporary if self.is_named else Path(f"/proc/self/fd/{self.file.fileno()}")


@contextmanager
def _draft(folder: Path) -> Iterator[_Draft]:
    """A new file in `folder` that is gone at the end of the block unless it was published."""
    temporary = folder / f".kdsr-{_machine()}{uuid.uuid4().hex[8:]}.tmp"
    unnamed = _open_unnamed(folder)
    try:
        with unnamed or _open_locked(temporary) as file:
            yield _Draft(file, temporary, is_named=unnamed is None)
    finally:
        temporary.unlink(missing_ok=True)


def _open_unnamed(folder: Path) -> BinaryIO | None:
    """A file that only this process knows, or None where the system has no such thing."""
    try:
        file = os.fdopen(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb")
    except (OSError, AttributeError):
        return None
    if Path(f"/proc/self/fd/{file.fileno()}").exists():
        with suppress(OSError):  # Where it replaces a file it has a name for a moment, and others sweep.
            fcntl.flock(file, fcntl.LOCK_EX)
        return file
    file.close()
    return None


def _open_locked(temporary: Path) -> BinaryIO:
    """A new file, locked until it is closed or its process ends."""
    while True:
        file = temporary.open("xb")
        with suppress(OSError):  # Not every file system knows locks.
            fcntl.flock(file, fcntl.LOCK_EX)
        # Somebody who swept may have been quicker with the lock.
        if temporary.exists():
            return file
        file.close()


def _replace(draft: _Draft, path: Path) -> None:
    """Make the draft the file at `path`, whatever was there."""
    if not draft.is_named:
        try:
            _link(draft.place, path)
            return
        except FileExistsError:
            _link(draft.place, draft.temporary)
    draft.temporary.replace(path)


def _create(draft: _Draft, path: Path) -> None:
    """Make the draft the file at `path` unless there is one: unlike a rename, a link never replaces."""
    try:
        _link(draft.place, path)
    except FileExistsError:
        raise KeyExists(f"file://{path} exists already; nothing was written") from None


def _link(source: Path, path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # With a descriptor Python takes the call that follows the link in /proc to the file.
        os.link(source, path.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


@lru_cache(maxsize=1024)
def _sweep(folder: Path, _process: int) -> None:
    """Remove what killed writers left in `folder`. Looks once for a process and a folder."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    _remove_if_left_behind(Path(entry.path))


def _remove_if_left_behind(temporary: Path) -> None:
    """Remove the file unless its writer lives, or might live on another machine."""
    with temporary.open("r+b") as file:
        is_free = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = temporary.name.startswith(f".kdsr-{_machine()}")
        except BlockingIOError:
            return
        except OSError:
            logger.debug("%s cannot be locked; its age decides", temporary)
        if is_free or time.time() - temporary.stat().st_mtime > _LEFT_BEHIND_SECONDS:
            temporary.unlink()


@cache
def _machine() -> str:
    """8 hex digits for this machine since it was started: on it, locks are certain."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        name = platform.node()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


_TO_DO = {
    errno.ENOSPC: "the disk is full; free some space on it or choose another place, and run again",
    errno.EDQUOT: "the disk quota is used up; free some space or ask for more, and run again",
    errno.EROFS: "the file system is read-only; mount it for writing or choose another place",
    errno.EIO: "the disk does not answer as it should; look after it before you run again",
}


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise KeyNotFound(f"no object at file://{path}") from None
    except PermissionError as error:
        raise AccessDenied(f"file://{path}: {error.strerror}; check the owner and the mode") from error
    except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise StoreError(
            f"file://{path}: a file is where a folder is needed, or the other way round"
        ) from error
    except OSError as error:
        trouble = _TO_DO.get(error.errno or 0, error.strerror or str(error))
        raise StoreError(f"file://{path}: {trouble}") from error


# ---------------------------------------------------------------- s3://

_PART_BYTES = 16 * 2**20
_AWAY_SECONDS = 150.0
"""How long a request waits for a store that answered before and answers nobody now."""
_AWAY_STATUSES = frozenset({429, 500, 502, 503, 504})
_RENEWED_BY_ARROW = frozenset({"iam-role", "container-role", "assume-role-with-web-identity"})
"""Sources of expiring credentials that pyarrow finds and renews by itself."""


@dataclass(frozen=True)
class S3Store(Store):
    """A prefix in a bucket of AWS, or of a server that speaks its protocol. The bucket must exist."""

    bucket: str
    prefix: str
    config: StoreConfig

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self._walk(self._root + _checked_prefix(prefix))

    def _walk(self, full_prefix: str) -> Iterator[ObjectInfo]:
        with self._errors():
            for page in self._pages(Bucket=self.bucket, Prefix=full_prefix):
                for found in page.get("Contents", ()):
                    # A key that ends with "/" is a folder that some tool made visible.
                    if not found["Key"].endswith("/"):
                        yield _object_info(found["Key"].removeprefix(self._root), found["Size"], found)

    def _pages(self, **request: str) -> Iterator[dict[str, Any]]:
        while True:
            page = self._ask("list_objects_v2", **request)
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def stat(self, key: str) -> ObjectInfo:
        head = self._head(key)
        return _object_info(key, head["ContentLength"], head)

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        _checked_range(start, length)
        if length == 0:
            self.stat(key)
            return b""
        request = self._at(key)
        if start or length is not None:
            request["Range"] = f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"
        with suppress(_BeyondEndError), self._errors(key):
            return self._read(request)
        return b""

    def put(self, key: str, data: bytes) -> ObjectInfo:
        with self._errors(key):
            answer = self._ask("put_object", **self._at(key), **_content_type(key), Body=data)
        return _object_info(key, len(data), answer)

    def create(self, key: str, data: bytes) -> ObjectInfo:
        mark = {"kdsr-writer": uuid.uuid4().hex}
        try:
            with self._errors(key):
                answer = self._ask("put_object", **self._at(key), Body=data, IfNoneMatch="*", Metadata=mark)
        except KeyExists:
            # When only the answer to a first try was lost, its retry meets our own object.
            answer = self._head(key)
            if answer.get("Metadata") != mark:
                raise
        return _object_info(key, len(data), answer)

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        from boto3.s3.transfer import TransferConfig

        # Large files go up in parts, which become visible together or are thrown away.
        transfer = TransferConfig(
            multipart_threshold=4 * _PART_BYTES,
            multipart_chunksize=_PART_BYTES,
            max_concurrency=4,
            preferred_transfer_client="classic",
        )

        def upload() -> None:
            with path.open("rb") as file:
                self._connection.client.upload_fileobj(
                    file, **self._at(key), ExtraArgs=_content_type(key), Config=transfer
                )

        with self._errors(key):
            self._patiently(upload)
        return self.stat(key)

    def delete(self, key: str) -> None:
        with suppress(KeyNotFound), self._errors(key):
            self._ask("delete_object", **self._at(key))

    def child(self, prefix: str) -> "S3Store":
        return replace(self, prefix=self._root + _checked_key(prefix.rstrip("/")))

    def arrow(self) -> "tuple[pyarrow.fs.FileSystem, str]":
        with self._errors():
            filesystem = _arrow_filesystem(self._connection, self.config, self.bucket)
        return filesystem, f"{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def _connection(self) -> "_Connection":
        return _connection(self.config)

    @property
    def _root(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self.bucket, "Key": self._root + _checked_key(key)}

    def _head(self, key: str) -> dict[str, Any]:
        try:
            with self._errors(key):
                return self._ask("head_object", **self._at(key))
        except KeyNotFound:
            # The answer to a HEAD request does not tell a missing key from a missing bucket.
            self._require_bucket()
            raise

    def _require_bucket(self) -> None:
        if self.bucket not in self._connection.seen_buckets:
            with suppress(AccessDenied), self._errors():
                self._ask("list_objects_v2", Bucket=self.bucket, Prefix=self._root, MaxKeys=1)
            self._connection.seen_buckets.add(self.bucket)

    def _read(self, request: dict[str, Any]) -> bytes:
        """The whole body. boto3 tries a request again, but not a body that breaks off."""
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError
        from urllib3.exceptions import HTTPError

        max_attempts = self.config.max_attempts
        for attempt in range(max_attempts):
            body = self._ask("get_object", **request)["Body"]
            # An encrypted answer that breaks off is an error of urllib3 that boto3 does not know.
            broken_off = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError, HTTPError)
            with closing(body), suppress(*broken_off):
                return bytes(body.read())
            time.sleep(min(0.1 * 2**attempt, 5))
        raise StoreError(f"s3://{self.bucket}/{request['Key']}: the answer broke off {max_attempts} times")

    def _ask(self, operation: str, **request: Any) -> dict[str, Any]:
        """One request of boto3, see `_patiently`."""
        client = self._connection.client
        answer: dict[str, Any] = self._patiently(lambda: getattr(client, operation)(**request))
        return answer

    def _patiently(self, request: Callable[[], Answer]) -> Answer:
        """What `request` returns; tried again while a store that answered before is away.

        boto3 has tried for some seconds when it gives up. The store is away when no other request was
        answered since; one that fails while others succeed is not tried for long.
        """
        connection, began, failed = self._connection, time.monotonic(), 0.0
        for attempt in count():
            try:
                answer = request()
            except Exception as error:
                if not _may_pass(error):
                    raise
                is_only_this = failed and connection.answered > failed
                failed = time.monotonic()
                if not connection.answered or is_only_this or failed - began > _AWAY_SECONDS:
                    raise
            else:
                connection.answered = time.monotonic()
                return answer
            if attempt == 0:
                logger.warning("%s does not answer; trying on for %.0f s", self.uri, _AWAY_SECONDS)
            time.sleep(random.uniform(0.5, 1.0) * min(0.5 * 2 ** min(attempt, 4), 5.0))  # noqa: S311 - no secret
        raise AssertionError("unreachable")

    @contextmanager
    def _errors(self, key: str = "") -> Iterator[None]:
        """Turn what boto3 raises into what kdsr raises, without repeating text that could hold a secret."""
        from botocore import exceptions as boto

        place = f"{self.uri}/{key}".rstrip("/")
        try:
            yield
        except boto.ClientError as error:
            raise _refusal(error, place, self.bucket) from None
        except (boto.ConnectionError, boto.HTTPClientError) as error:
            raise StoreUnreachable(
                f"{place}: no answer from {self._connection.client.meta.endpoint_url} "
                f"({type(error).__name__}); check --store.endpoint_url or AWS_ENDPOINT_URL, "
                "and that the server runs"
            ) from None
        except (
            boto.NoCredentialsError,
            boto.PartialCredentialsError,
            boto.CredentialRetrievalError,
        ) as error:
            raise AccessDenied(
                f"{place}: no usable AWS credentials ({type(error).__name__}); "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from None
        except boto.BotoCoreError as error:
            raise StoreError(f"{place}: {type(error).__name__}: {error}") from None


@dataclass
class _Connection:
    """What stores with the same settings share in a process."""

    session: Any
    client: Any
    seen_buckets: set[str] = field(default_factory=set)
    answered: float = 0.0
    """When the server answered last, by the monotonic clock; 0 when it never did."""


_connecting = Lock()


def _connection(config: StoreConfig) -> _Connection:
    """The connection with these settings: stores stay plain data, and making a client is slow."""
    environment = frozenset(item for item in os.environ.items() if item[0].startswith("AWS_"))
    with _connecting:
        # A forked process must not use the sockets of its parent.
        return _connect(config, os.getpid(), hash(environment))


@cache
def _connect(config: StoreConfig, _process: int, _environment: int) -> _Connection:
    import boto3.session

    session = boto3.session.Session(region_name=config.region or os.environ.get("AWS_REGION"))
    client = _client(session, config, addressing_style="auto")
    if not _is_aws(client):
        # Other servers seldom have a host name for each bucket.
        client = _client(session, config, addressing_style="path")
    return _Connection(session, client)


def _client(session: Any, config: StoreConfig, *, addressing_style: str) -> Any:
    from botocore.config import Config

    settings = Config(
        retries={"mode": "standard", "total_max_attempts": config.max_attempts},
        connect_timeout=config.connect_timeout_seconds,
        read_timeout=config.read_timeout_seconds,
        max_pool_connections=32,
        s3={"addressing_style": addressing_style},
        # Many servers do not know the newer checksums yet.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # An endpoint with credentials in it must not get into the text of an error.
    with suppress(ValueError):
        client = session.client("s3", endpoint_url=config.endpoint_url, config=settings)
        if "@" not in client.meta.endpoint_url:
            return client
    raise RequestError(
        "the S3 endpoint is no plain URL; expected http://host:port or https://host without credentials "
        "in --store.endpoint_url or AWS_ENDPOINT_URL"
    )


def _is_aws(client: Any) -> bool:
    host = urlsplit(client.meta.endpoint_url).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _arrow_filesystem(connection: _Connection, config: StoreConfig, bucket: str) -> "pyarrow.fs.S3FileSystem":
    import pyarrow.fs

    options: dict[str, Any] = {
        "connect_timeout": config.connect_timeout_seconds,
        "request_timeout": config.read_timeout_seconds,
        "retry_strategy": pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=config.max_attempts),
        "tls_ca_file_path": os.environ.get("AWS_CA_BUNDLE"),
    }
    options |= _arrow_credentials(connection.session)
    if _is_aws(connection.client):
        options["region"] = config.region or _region_on_aws(bucket)
    else:
        options["scheme"], _, address = connection.client.meta.endpoint_url.partition("://")
        options["endpoint_override"] = address.rstrip("/")
        options["region"] = connection.session.region_name or "us-east-1"
    return pyarrow.fs.S3FileSystem(**options)


def _region_on_aws(bucket: str) -> str:
    """Where the bucket is: boto3 is sent on to the right region, pyarrow has to be told."""
    import pyarrow.fs

    try:
        return str(pyarrow.fs.resolve_s3_region(bucket))
    except OSError as error:
        raise StoreError(f"s3://{bucket}: its region is unknown ({error}); set --store.region") from None


def _arrow_credentials(session: Any) -> dict[str, str | None]:
    """Those that boto3 found, unless they expire and pyarrow finds and renews the same ones itself."""
    from botocore.exceptions import NoCredentialsError

    found = session.get_credentials()
    if found is None:
        raise NoCredentialsError
    if found.method in _RENEWED_BY_ARROW:
        return {}
    now = found.get_frozen_credentials()
    return {"access_key": now.access_key, "secret_key": now.secret_key, "session_token": now.token}


def _may_pass(error: Exception) -> bool:
    """Whether nothing or a broken server answered, so that the same request may succeed later."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        return error.response["ResponseMetadata"].get("HTTPStatusCode") in _AWAY_STATUSES
    return isinstance(error, boto.ConnectionError | boto.HTTPClientError)


class _BeyondEndError(StoreError):
    """A range that begins after the last byte."""


def _content_type(key: str) -> dict[str, str]:
    """What a browser needs to show the object rather than save it; nothing where the name does not tell."""
    found, _ = mimetypes.guess_type(key, strict=False)
    return {"ContentType": found} if found else {}


def _object_info(key: str, size: int, answer: Mapping[str, Any]) -> ObjectInfo:
    if "ETag" not in answer:
        raise StoreError(f"{key}: the answer has no ETag; check that the endpoint is an S3 server")
    return ObjectInfo(key, size, answer["ETag"].strip('"'))


def _refusal(refused: "ClientError", place: str, bucket: str) -> StoreError:
    """The error that a server's refusal stands for."""
    answer = refused.response
    code, message = str(answer["Error"].get("Code", "")), answer["Error"].get("Message", "")
    error: StoreError = StoreError(f"{place}: {code}: {message}")
    match answer["ResponseMetadata"]["HTTPStatusCode"], code:
        case _, "NoSuchBucket" | "InvalidBucketName":
            error = BucketNotFound(f"{place}: there is no bucket {bucket}; create it or correct the uri")
        # The answer to HEAD has no body; anything else that says 404 without a code is no S3 server.
        case 404, _ if code == "NoSuchKey" or refused.operation_name == "HeadObject":
            error = KeyNotFound(f"no object at {place}")
        case 404, _:
            error = StoreError(f"{place}: 404 {message}; check that the endpoint is an S3 server")
        case (401 | 403, _) | (_, "ExpiredToken" | "InvalidToken"):
            error = AccessDenied(f"{place}: access denied ({code}: {message}); check the credentials")
        case (412, _) | (_, "ConditionalRequestConflict"):
            error = KeyExists(f"{place} exists already; nothing was written")
        case (507, _) | (_, "QuotaExceeded" | "XMinioStorageFull"):
            error = StoreError(f"{place}: the store is full ({code}: {message}); make room and run again")
        case 416, _:
            error = _BeyondEndError(place)
        case (301 | 307, _) | (_, "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException"):
            error = StoreError(f"{place}: the bucket is in another region ({code}); set --store.region")
    return error
