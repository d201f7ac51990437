"""Stores on files, and the uris that open a store."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from contracts import StoreContract, keys, put_many
from hypothesis import given
from hypothesis import strategies as st

from kdsr import store as store_module
from kdsr.config import StoreConfig
from kdsr.errors import KeyNotFound, RequestError, StoreError
from kdsr.store import Store, open_object, open_store

SECRET = "wJalrXUtnFEMI7MDENG"


@pytest.mark.parametrize("store", ["file"], indirect=True)
class TestFileStore(StoreContract):
    pass


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def files(root: Path) -> Store:
    return open_store(f"file://{root}")


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen:
    """Another interpreter that runs `code` with `arguments` as sys.argv[1:]."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# ---------------------------------------------------------------- listing

names = st.text(st.sampled_from(" !+-./0Aaé\uffee😀"), min_size=1, max_size=6)


def usable(found: set[str]) -> set[str]:
    """Keys without empty or dotted parts, of which none is a folder of another."""
    found = {key for key in found if all(part not in ("", ".", "..") for part in key.split("/"))}
    folders = {key[:i] for key in found for i, letter in enumerate(key) if letter == "/"}
    return found - folders


@given(found=st.sets(names, max_size=12).map(usable), prefix=st.text(" +-.0Aaé😀", max_size=2))
def test_files_are_listed_in_the_byte_order_of_their_keys(
    tmp_path_factory: pytest.TempPathFactory, found: set[str], prefix: str
):
    root = tmp_path_factory.mktemp("root")
    for key in found:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).touch()
    expected = sorted((key for key in found if key.startswith(prefix)), key=str.encode)
    assert keys(open_store(str(root)), prefix) == expected


DEEP_TREE = """
import sys
from kdsr.store import open_store
store, deep = open_store(sys.argv[1]), "/".join(["d"] * 300)
sys.setrecursionlimit(100)
store.put(deep, b"")
print([info.key for info in store.list()] == [deep])
"""


def test_a_tree_deeper_than_the_stack_is_written_and_listed(root: Path):
    printed, errors = python(DEEP_TREE, root).communicate()
    assert printed.strip() == "True", errors


def test_links_are_followed_only_to_files_inside_the_root(files: Store, root: Path, tmp_path: Path, caplog):
    files.put("real/file", b"inside")
    (tmp_path / "secret").write_text("outside")
    (root / "inner").symlink_to(root / "real/file")
    (root / "outer").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    (root / "real/loop").symlink_to(root)
    (root / "broken").symlink_to(root / "nothing")
    assert keys(files) == ["inner", "real/file"]
    assert str(root / "outer") in caplog.text
    assert files.get("inner") == b"inside"


@pytest.mark.parametrize("key", ["outer", "folder/secret", "folder/new", "real/loop/../../secret"])
def test_a_link_out_of_the_root_is_refused(files: Store, root: Path, tmp_path: Path, key: str):
    files.put("real/file", b"inside")
    (tmp_path / "secret").write_text("outside")
    (root / "outer").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    (root / "real/loop").symlink_to(root)
    for call in (files.get, files.stat, files.delete, lambda key: files.put(key, b"x")):
        with pytest.raises(RequestError):
            call(key)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "secret"]
    assert (tmp_path / "secret").read_text() == "outside"


def test_a_child_cannot_be_a_link_out_of_the_root(files: Store, root: Path, tmp_path: Path):
    root.mkdir()
    (root / "away").symlink_to(tmp_path)
    with pytest.raises(RequestError, match="leads out of"):
        files.child("away")


def test_the_root_itself_may_be_a_link(files: Store, root: Path, tmp_path: Path):
    files.put("key", b"x")
    (tmp_path / "link").symlink_to(root)
    assert keys(open_store(str(tmp_path / "link"))) == ["key"]


def test_pipes_and_names_that_are_no_text_are_not_listed(files: Store, root: Path, caplog):
    files.put("file", b"x")
    os.mkfifo(root / "pipe")
    (Path(os.fsdecode(os.fsencode(root) + b"/latin-\xe9"))).touch()
    assert keys(files) == ["file"]
    assert "not UTF-8" in caplog.text
    with pytest.raises(KeyNotFound):
        files.get("pipe")


def test_a_file_as_root_is_told(tmp_path: Path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(StoreError, match=r"photo\.jpg: a file is where a folder is needed"):
        keys(open_store(str(tmp_path / "photo.jpg")))


# ---------------------------------------------------------------- writing

STUCK_WRITER = """
import os, sys
from pathlib import Path
from kdsr.store import open_store
if sys.argv[3] == "named":  # as on network drives and old systems
    del os.O_TMPFILE
open_store(sys.argv[1]).put_file("key", Path(sys.argv[2]))
"""

WRITE_ONE = """
import sys
from kdsr.store import open_store
open_store(sys.argv[1]).put("other", b"x")
"""


@contextmanager
def stuck_writer(root: Path, pipe: Path, kind: str) -> Iterator[subprocess.Popen]:
    """A process that has written a part of `key`."""
    os.mkfifo(pipe)
    writer = python(STUCK_WRITER, root, pipe, kind)
    with pipe.open("wb", buffering=0) as source:
        source.write(bytes(3 * 2**20))  # Returns when the writer has taken nearly all of it.
        yield writer
        writer.kill()
        writer.communicate()


def knows_unnamed_files(folder: Path) -> bool:
    """Whether the file system of `folder` has them; some layered ones and network drives do not."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
    except OSError:
        return False
    return True


def temporary_files(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("kind", ["unnamed", "named"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_writer_killed_in_the_middle_leaves_what_was_there(
    files: Store, root: Path, tmp_path: Path, before: bytes | None, kind: str
):
    if before:
        files.put("key", before)
    with stuck_writer(root, tmp_path / "pipe", kind) as writer:
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
    assert len(temporary_files(root)) == (kind == "named" or not knows_unnamed_files(root))
    assert keys(files) == (["key"] if before else [])
    assert files.exists("key") == bool(before)
    files.put("key", b"new")
    assert files.get("key") == b"new"


@pytest.mark.parametrize("kind", ["unnamed", "named"])
def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(
    root: Path, tmp_path: Path, kind: str
):
    with stuck_writer(root, tmp_path / "pipe", kind) as writer:
        others = temporary_files(root)
        assert python(WRITE_ONE, root).wait() == 0
        assert temporary_files(root) == others
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
    assert python(WRITE_ONE, root).wait() == 0
    assert [path.name for path in root.iterdir()] == ["other"]


def test_nobody_sweeps_what_is_about_to_replace_an_object(files: Store, root: Path, monkeypatch):
    files.put("key", b"old")
    link, seen = store_module._link, []

    def linked_beside_another(source: Path, path: Path) -> None:
        link(source, path)
        if path.suffix == ".tmp":
            assert python(WRITE_ONE, root).wait() == 0
            seen.append(path.exists())

    monkeypatch.setattr(store_module, "_link", linked_beside_another)
    files.put("key", b"new")
    assert files.get("key") == b"new"
    assert seen in ([], [True])  # none where files have a name from the start


def test_what_another_machine_left_goes_when_it_is_old(root: Path):
    root.mkdir()
    fresh, old, no_draft = (root / f".kdsr-{32 * digit}.tmp" for digit in "01x")
    for path in (fresh, old, no_draft):
        path.write_bytes(b"half")
    for path in (old, no_draft):
        os.utime(path, (0, 0))
    open_store(str(root)).put("key", b"x")
    assert {path.name for path in root.iterdir()} == {"key", fresh.name, no_draft.name}


def test_the_mode_of_a_file_is_what_the_process_asks_for(files: Store, root: Path):
    before = os.umask(0o027)
    try:
        files.put("key", b"x")
        files.put("key", b"again")
    finally:
        os.umask(before)
    assert (root / "key").stat().st_mode & 0o777 == 0o640


LIMITED_FILE = """
import resource, signal, sys
from kdsr.store import open_store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
open_store(sys.argv[1]).put("key", bytes(5000))
"""


def test_a_write_that_fails_leaves_nothing_and_says_why(root: Path):
    _, text = python(LIMITED_FILE, root).communicate()
    assert f"StoreError: file://{root}/key: File too large" in text
    assert list(root.iterdir()) == []


ON_A_MOUNT = """
import os, sys
from kdsr.errors import StoreError
from kdsr.store import open_store
if sys.argv[2] == "named":
    del os.O_TMPFILE
store = open_store(sys.argv[1])
for key, size in (("fits", 100_000), ("key", 2_000_000), ("fits too", 100_000)):
    try:
        store.put(key, bytes(size))
    except StoreError as error:
        print(error)
print(sorted(os.listdir(sys.argv[1])))
"""


def on_a_mount(root: Path, options: str, kind: str) -> list[str]:
    """What ON_A_MOUNT prints when `root` is a file system in memory of its own."""
    root.mkdir()
    # In a namespace of its own, so that the mount is gone with the process.
    mount = f'mount -t tmpfs -o {options} tmpfs "$1" && echo mounted && exec "$2" -c "$3" "$1" {kind}'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    done = subprocess.run(
        [*command, root, sys.executable, ON_A_MOUNT], capture_output=True, text=True, check=False
    )
    if not done.stdout.startswith("mounted"):
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[1:]


@pytest.mark.parametrize("kind", ["unnamed", "named"])
def test_a_full_disk_is_told_and_keeps_nothing_half_written(root: Path, kind: str):
    assert on_a_mount(root, "size=1m", kind) == [
        f"file://{root}/key: the disk is full; free some space on it or choose another place, and run again",
        "['fits', 'fits too']",
    ]


def test_a_file_system_that_cannot_be_written_is_told(root: Path):
    *errors, names = on_a_mount(root, "ro", "unnamed")
    assert errors[0] == (
        f"file://{root}/fits: the file system is read-only; mount it for writing or choose another place"
    )
    assert len(errors) == 3
    assert names == "[]"


def test_a_failed_create_leaves_nothing_behind(files: Store, root: Path):
    files.create("key", b"first")
    with pytest.raises(StoreError):
        files.create("key", b"second")
    assert [path.name for path in root.iterdir()] == ["key"]


DENIED = """
import os, sys
from kdsr.errors import AccessDenied
from kdsr.store import open_store
store = open_store(sys.argv[1])
if os.geteuid() == 0:  # root is forbidden nothing, so it steps down
    os.setuid(65534)
for call in (lambda: store.get("key"), lambda: store.put("new", b""), lambda: list(store.list("closed/"))):
    try:
        call()
    except AccessDenied as error:
        print(str(error).rpartition(": ")[2])
"""


def test_what_the_file_system_forbids_is_told(files: Store, root: Path):
    put_many(files, ["key", "closed/x"])
    (root / "key").chmod(0)
    (root / "closed").chmod(0)
    root.chmod(0o555)
    for parent in list(root.parents)[:3]:
        parent.chmod(0o755)
    printed, errors = python(DENIED, root).communicate()
    assert printed.splitlines() == ["Permission denied; check the owner and the mode"] * 3, errors


@pytest.mark.parametrize("key", ["file/below", "folder"])
def test_a_file_in_the_way_of_a_folder_is_told(files: Store, key: str):
    put_many(files, ["file", "folder/x"])
    with pytest.raises(StoreError, match=f"{key}: a file is where a folder is needed"):
        files.put(key, b"x")
    assert keys(files) == ["file", "folder/x"]


def test_new_files_have_the_mode_that_the_user_asked_for(files: Store, root: Path):
    before = os.umask(0o027)
    try:
        files.put("key", b"x")
    finally:
        os.umask(before)
    assert (root / "key").stat().st_mode & 0o777 == 0o640


def test_a_name_longer_than_the_file_system_takes_is_told(files: Store):
    with pytest.raises(StoreError, match="File name too long"):
        files.put("n" * 300, b"x")


# ---------------------------------------------------------------- uris


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("file:///a/b", "file:///a/b"),
        ("file:///a/b/", "file:///a/b"),
        ("file:///a b%20+#?", "file:///a b%20+#?"),
        ("file:///", "file:///"),
        ("/a/b//", "file:///a/b"),
        ("a", f"file://{Path.cwd()}/a"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a b%20+#?/c/", "s3://bucket/a b%20+#?/c"),
    ],
)
def test_a_uri_is_taken_literally(uri: str, expected: str):
    assert open_store(uri).uri == expected


@pytest.mark.parametrize("uri", ["http://host/a", "gs://bucket/a", "ftp://a", "S3://bucket"])
def test_an_unknown_scheme_is_refused_with_those_that_are_known(uri: str):
    with pytest.raises(RequestError, match=r"unknown scheme .*file://.*s3://"):
        open_store(uri)


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://AKIAKEY:{SECRET}@bucket/a",
        f"s3://AKIAKEY:{SECRET[:5]}/{SECRET[5:]}@bucket/a",
        f"s3://{SECRET}@bucket",
        f"http://AKIAKEY:{SECRET}@host/bucket",
    ],
)
@pytest.mark.parametrize("open_uri", [open_store, open_object])
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str, open_uri):
    with pytest.raises(RequestError) as caught:
        open_uri(uri)
    assert SECRET[5:] not in str(caught.value)
    assert "AKIAKEY" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["s3://", "s3:///a", "s3://-/a", "s3://b/a/../c", "s3://b/a//c", "file:///a\0"]
)
def test_a_uri_that_cannot_be_one_is_refused(uri: str):
    with pytest.raises(RequestError):
        open_store(uri)


def test_credentials_in_an_endpoint_are_refused_and_not_repeated():
    with pytest.raises(ValueError, match="credentials") as caught:
        StoreConfig(endpoint_url=f"http://user:{SECRET}@host")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "store", "key"),
    [
        ("file:///a/b/c.pt", "file:///a/b", "c.pt"),
        ("file:///c.pt", "file:///", "c.pt"),
        ("s3://bucket/a b/c.pt", "s3://bucket/a b", "c.pt"),
        ("s3://bucket/c.pt", "s3://bucket", "c.pt"),
    ],
)
def test_an_object_is_found_in_its_store(uri: str, store: str, key: str):
    found, name = open_object(uri)
    assert (found.uri, name) == (store, key)


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "file:///"])
def test_a_uri_without_a_name_is_no_object(uri: str):
    with pytest.raises(RequestError, match="names no object"):
        open_object(uri)


def test_opening_a_store_loads_no_library_of_a_cloud():
    code = (
        "import sys; from kdsr.store import open_store; open_store('s3://b'); print('boto3' in sys.modules)"
    )
    assert python(code).communicate()[0].strip() == "False"
