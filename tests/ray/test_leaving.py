"""What a driver that is told to stop makes of it, before any worker hears."""

import signal

import pytest
from ray.train.torch import TorchTrainer

from cluster.leaving import SAVING, ListeningTrainer, Stop


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, SAVING), (signal.SIGTERM, "")])
def test_the_first_signal_asks_and_the_second_ends_the_waiting(
    number: signal.Signals, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    stop = Stop()
    assert not stop.is_told()
    stop.hear(number, None)
    assert stop.is_told() and stop.is_by_hand == (number == signal.SIGINT)
    assert capfd.readouterr().err == said
    with pytest.raises(KeyboardInterrupt):
        stop.hear(signal.SIGINT, None)
    assert stop.is_by_hand == (number == signal.SIGINT)


def test_it_is_rays_own_handler_of_ctrl_c_that_is_left_out() -> None:
    """Else a newer Ray would take Ctrl-C again, by another name."""
    assert "_register_sigint_handler" in vars(TorchTrainer.__mro__[1])
    assert ListeningTrainer._register_sigint_handler is not TorchTrainer._register_sigint_handler
