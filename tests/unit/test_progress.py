"""One bar for all long work, or JSON lines."""

import io
import json
import sys

import pytest

from kdsr.progress import LOG_SECONDS, TERMINAL_SECONDS, JsonProgress, progress_bar


@pytest.mark.parametrize(("is_terminal", "seconds"), [(True, TERMINAL_SECONDS), (False, LOG_SECONDS)])
def test_a_log_gets_fewer_lines_than_a_terminal(
    is_terminal: bool, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(10, unit="image", done=4) as bar:
        bar.update(6)
        assert (bar.n, bar.total, bar.mininterval) == (10, 10, seconds)
    assert "10/10" in stream.getvalue()


def test_json_lines_tell_the_beginning_the_middle_and_the_end():
    file = io.StringIO()
    with JsonProgress(4, done=1, interval_seconds=0, file=file) as progress:
        progress.update(megapixels=2.0, failed=0)
        progress.update(megapixels=2.0, failed=1)
    first, second, third, last = (json.loads(line) for line in file.getvalue().splitlines())
    assert (first["images"], first["total"], first["eta_seconds"]) == (1, 4, None)
    assert (second["images"], second["megapixels"], second["failed"]) == (2, 2.0, 0)
    assert (third["images"], third["failed"]) == (3, 1)
    assert last["images"] == 3 and last["eta_seconds"] >= 0


def test_json_lines_are_as_rare_as_their_interval():
    file = io.StringIO()
    with JsonProgress(100, interval_seconds=3600, file=file) as progress:
        for _ in range(50):
            progress.update(megapixels=1.0, failed=0)
    assert len(file.getvalue().splitlines()) == 2
