"""Holds Ctrl-C back while a model changes.

A model is changed within milliseconds, after everything that takes long was
computed. In a notebook a cell may be stopped at any moment; these moments must
not be among them.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Delays a Ctrl-C that comes within until the end.

    Only the main thread gets signals; in another one this does nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not callable(handler):
        yield
        return
    received: list[Any] = []
    signal.signal(signal.SIGINT, lambda *args: received.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])


def run_to_the_end(steps: list[Callable[[], None]]) -> None:
    """Runs steps in order; an interrupt is raised after the last one.

    A step that was interrupted runs again, so each must be repeatable. An error
    ends it at once; `steps` then holds what is left.
    """
    with interrupts_held():
        try:
            _run(steps)
        except Exception:
            raise
        except BaseException:
            _run(steps)
            raise


def _run(steps: list[Callable[[], None]]) -> None:
    while steps:
        steps[0]()
        del steps[0]
