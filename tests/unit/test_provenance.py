"""Where a number comes from: what was typed, which source, which machine."""

import re
import subprocess
import sys

import pytest

from kdsr import __version__, provenance


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/repo/jobs/distill.py", "--name", "a b"], "python jobs/distill.py --name 'a b'"),
        (["jobs/distill.py"], "python jobs/distill.py"),
        (["/repo/bench/tiles.py"], "python bench/tiles.py"),
        (["/elsewhere/own.py", "--x=1"], "python own.py --x=1"),
    ],
)
def test_the_command_can_be_typed_again(monkeypatch, argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    assert provenance.command() == expected


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder in the place of kdsr's own."""
    (tmp_path / "kdsr").mkdir()
    source = tmp_path / "kdsr" / "provenance.py"
    source.write_text("one")
    monkeypatch.setattr(provenance, "__file__", str(source))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_outside_a_checkout_the_version_stands_for_the_source(checkout):
    assert provenance.commit() == __version__


def test_a_commit_is_marked_when_files_differ_from_it(checkout):
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    head = git(checkout, "rev-parse", "HEAD")
    assert provenance.commit() == head[:12]
    (checkout / "out").write_text("made by a run")
    assert provenance.commit() == head[:12]
    (checkout / "kdsr" / "provenance.py").write_text("two")
    assert provenance.commit() == f"{head[:12]}+"


def test_a_checkout_that_git_cannot_read_gives_the_version(checkout):
    (checkout / ".git").write_text("gitdir: nowhere")
    assert provenance.commit() == __version__


def test_machine_and_time_are_named():
    assert re.fullmatch(r"\S.*, [1-9]\d* cores", provenance.machine())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", provenance.now())
    assert provenance.stamp().keys() == {"machine", "command", "commit", "date"}
