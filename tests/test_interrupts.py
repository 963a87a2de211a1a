"""Ctrl-C waits for the next safe point once, and not twice."""

from __future__ import annotations

import signal
import threading

import pytest

from reapkit.interrupts import Interrupted, deferred, heard, safe_point


def test_where_nothing_would_be_lost_a_signal_stops_at_once() -> None:
    told: list[str] = []
    with pytest.raises(Interrupted) as caught, heard(told.append):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.signum == signal.SIGTERM and told == []


def test_deferred_work_stops_at_its_next_safe_point_and_says_when() -> None:
    told: list[str] = []
    reached = False
    with pytest.raises(Interrupted) as caught, heard(told.append), deferred("it is done"):
        safe_point()
        signal.raise_signal(signal.SIGINT)
        reached = True
        safe_point()
    assert reached and caught.value.signum == signal.SIGINT and told == ["it is done"]


def test_the_second_signal_stops_deferred_work_at_once() -> None:
    told: list[str] = []
    reached = False
    with pytest.raises(Interrupted), heard(told.append), deferred("it is done"):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert not reached and told == ["it is done"]


def test_afterwards_signals_are_what_they_were_and_nothing_is_remembered() -> None:
    before = signal.getsignal(signal.SIGINT)
    with heard(lambda until: None), deferred("it is done"):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with heard(lambda until: None):
        safe_point()


def test_a_thread_that_no_signal_reaches_goes_on_without() -> None:
    done: list[bool] = []

    def work() -> None:
        with heard(lambda until: None):
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
