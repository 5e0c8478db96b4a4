"""Settings of the process that several threads need at the same time."""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Together:
    """A context of the whole process, which the last thread to leave undoes.

    A thread that sets and restores such a setting on its own restores, if it
    comes second and leaves last, what the first one has set: for good.

    Args:
        make: function that returns the context to enter.
    """

    def __init__(
        self, make: Callable[[], contextlib.AbstractContextManager[object]]
    ):
        self._make = make
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                # In a thread of its own: threadpoolctl lets the one thread
                # that has set a limit restore it.
                self._keeper = ThreadPoolExecutor(1)
                self._undo = contextlib.ExitStack()
                self._keeper.submit(
                    lambda: self._undo.enter_context(self._make())
                ).result()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._keeper.submit(self._undo.close).result()
                self._keeper.shutdown()
