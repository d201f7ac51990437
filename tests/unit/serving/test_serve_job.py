"""What jobs/serve.py does with signals; Ray is played by functions that signal this process themselves."""

import os
import signal
import sys

import pytest

from cluster import serve
from jobs import serve as job
from kdsr.config import ServeConfig
from kdsr.errors import RequestError

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def played(monkeypatch):
    """What the server was asked for; each start does the next of `.then`."""

    class Played:
        def __init__(self):
            self.started, self.stopped, self.then = [], 0, []

        def start(self, config):
            self.started.append(config)
            if len(self.started) > 1:
                self.then.pop(0)()
            return "http://127.0.0.1:1"

        def stop(self):
            self.stopped += 1

    played = Played()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    monkeypatch.setattr(serve, "start", played.start)
    monkeypatch.setattr(serve, "stop", played.stop)
    monkeypatch.setattr(sys, "argv", ["serve.py", "--auth", "none"])
    yield played
    for number, handler in handlers.items():
        signal.signal(number, handler)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def run_with_a_first_hup(monkeypatch):
    """Serve as the job does; the first HUP comes as soon as it listens for signals."""
    listen = job.signals

    def listening():
        came = listen()
        send(signal.SIGHUP)
        return came

    monkeypatch.setattr(job, "signals", listening)
    return job.run(ServeConfig(auth="none"))


def test_a_signal_to_stop_that_comes_while_models_are_replaced_is_not_lost(played, monkeypatch):
    played.then = [lambda: send(signal.SIGTERM)]
    assert run_with_a_first_hup(monkeypatch) == 0
    assert (len(played.started), played.stopped) == (2, 1)


def test_models_are_replaced_once_more_when_that_is_asked_for_meanwhile(played, monkeypatch):
    played.then = [lambda: send(signal.SIGHUP), lambda: send(signal.SIGINT)]
    assert run_with_a_first_hup(monkeypatch) == 0
    assert (len(played.started), played.stopped) == (3, 1)


@pytest.mark.parametrize(
    "error", [RuntimeError("Deploying failed\nthe replica died"), RequestError("no model")]
)
def test_an_error_while_models_are_replaced_leaves_the_server_serving(played, monkeypatch, capsys, error):
    def fail():
        send(signal.SIGTERM)
        raise error

    played.then = [fail]
    assert run_with_a_first_hup(monkeypatch) == 0
    assert (len(played.started), played.stopped) == (2, 1)
    told = capsys.readouterr().err
    assert str(error).splitlines()[-1] in told and "Traceback" not in told
