"""A run that is asked to stop writes a checkpoint first, and resumes bit by bit."""

import os
import signal

import pytest
import torch
from torch import nn

from kdfast import Distiller
from kdfast._interrupts import Interrupts
from support.distillers import loader, quick, states_equal, student, teacher


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch):
    quick(monkeypatch)


class Ended(Exception):
    pass


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """A shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def ended_by_term():
    """A handler of the user's own, in place of the default that ends the process."""

    def end(number, frame):
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    yield
    assert signal.getsignal(signal.SIGTERM) is end
    signal.signal(signal.SIGTERM, before)


def fit(folder, number=None, at=4, epochs=2, times=1, **options):
    """A run to which ``number`` is sent in the student's call ``at``."""
    torch.manual_seed(0)
    model, calls = student(), []

    def send(*_):
        calls.append(1)
        if number is not None and at <= len(calls) < at + times and model.training:
            os.kill(os.getpid(), number)

    model.register_forward_pre_hook(send)
    torch.manual_seed(0)
    distiller = Distiller(model, teacher(), folder=folder, schedule="cosine")
    distiller.fit(loader(), epochs=epochs, progress=False, **options)
    return model, len(calls)


@pytest.mark.parametrize("at", [1, 4, 6, 7, 12])
def test_an_interrupt_leaves_a_checkpoint_of_its_step(tmp_path, at, capsys):
    whole, calls = fit(tmp_path / "whole")
    assert calls == 12
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "part", signal.SIGINT, at)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    error = capsys.readouterr().err
    assert "SIGINT: " in error
    assert f"stopped: the last checkpoint is {tmp_path}/part/last.pt, from which the same call resumes" in error
    again, rest = fit(tmp_path / "part")
    assert rest == 12 - at
    states_equal(whole.state_dict(), again.state_dict())


def test_a_sigterm_leaves_one_and_then_does_what_it_did(tmp_path, ended_by_term):
    with pytest.raises(Ended):
        fit(tmp_path, signal.SIGTERM)
    assert fit(tmp_path)[1] == 12 - 4


def test_a_handler_that_returns_lets_the_run_go_on(tmp_path):
    noted = []
    before = signal.signal(signal.SIGTERM, lambda *_: noted.append(1))
    try:
        assert fit(tmp_path, signal.SIGTERM, times=3)[1] == 12
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(noted) == 3


def test_the_second_interrupt_is_at_once(tmp_path):
    class Twice(nn.Linear):
        def forward(self, x):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        Distiller(Twice(6, 4), folder=tmp_path).fit(loader(), epochs=1, progress=False)
    assert not (tmp_path / "last.pt").exists()


def test_an_interrupt_during_an_evaluation_waits_for_its_epoch(tmp_path):
    def measure(distiller, _):
        os.kill(os.getpid(), signal.SIGINT)
        return {"accuracy": 0.5}

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, eval_loader=[0], metrics=measure)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["train_state"]["epoch"] == 1


def test_a_loader_that_an_interrupt_ends_is_no_reason_to_lose_the_step(tmp_path):
    class Killed(list):
        def __iter__(self):
            yield from list.__iter__(self)
            if not (tmp_path / "last.pt").exists():
                os.kill(os.getpid(), signal.SIGINT)
                raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")

    batches = Killed(loader(shuffle=False))
    with pytest.raises(KeyboardInterrupt):
        Distiller(student(), folder=tmp_path).fit(batches, epochs=1, progress=False)
    assert len(Distiller(student(), folder=tmp_path).fit(batches, epochs=1, progress=False)) == 1


def test_without_a_folder_an_interrupt_is_at_once():
    with pytest.raises(KeyboardInterrupt):
        fit(None, signal.SIGINT)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts("it") as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.signal == 0
    finally:
        signal.signal(signal.SIGINT, before)
