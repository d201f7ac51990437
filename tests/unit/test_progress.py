"""One bar for all long work."""

import io
import sys

import pytest

from kdsr.progress import LOG_SECONDS, TERMINAL_SECONDS, progress_bar


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
