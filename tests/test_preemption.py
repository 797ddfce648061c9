import signal
from types import SimpleNamespace

import pytest

from runner.preemption import Preemption, heeding


def step(callback, number, *, epoch=0.5):
    """End an optimizer step; returns what was asked of the trainer."""
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    args = SimpleNamespace(save_only_model=True, eval_strategy="no", logging_strategy="steps")
    callback.on_step_end(args, SimpleNamespace(global_step=number, epoch=epoch), control)
    return control


@pytest.fixture
def training():
    callback = Preemption(None)
    callback.on_train_begin(None, None, None)
    return callback


def test_a_signal_lets_the_step_end_and_asks_for_a_checkpoint(training):
    assert not step(training, 1).should_training_stop
    training.handle(signal.SIGTERM, None)
    control = step(training, 2)
    assert control.should_training_stop
    assert control.should_save
    assert training.cause == "stopped by SIGTERM"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_the_same_signal_again_ends_at_once(training, number, code):
    training.handle(number, None)
    with pytest.raises(SystemExit) as ended:
        training.handle(number, None)
    assert ended.value.code == code


def test_a_warning_before_the_end_is_not_the_end(training):
    training.handle(signal.SIGUSR1, None)  # Slurm's warning, then its SIGTERM
    training.handle(signal.SIGTERM, None)
    assert step(training, 1).should_training_stop
    assert training.cause == "stopped by SIGUSR1"


def test_outside_of_training_a_signal_ends_at_once():
    with pytest.raises(SystemExit):
        Preemption(None).handle(signal.SIGTERM, None)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with heeding(None) as callback:
        assert signal.getsignal(signal.SIGTERM) == callback.handle
    assert signal.getsignal(signal.SIGTERM) == before
