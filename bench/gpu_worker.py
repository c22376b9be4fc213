"""A process that may be lost: what it is given to do can crash it, or never end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Self

END = 10  # seconds that a process may take to end when it is killed: longer where its GPU is stuck


class Lost(Exception):
    """The process ended before it was done, or was ended."""


class Worker:
    """Calls functions in a process of its own, which begins with the first call, and anew after it was lost."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.end()

    def each(self, function: Callable[..., Iterable[Any]], *args: Any, seconds: float) -> Iterator[Any]:
        """What function(*args) gives, one by one, as it comes.

        Args:
            function: one that a new process can import.
            seconds: for all of it, and for the start of the process where it has to begin.

        Raises:
            Lost: it took longer, it raised something, or the process died; what came before has been given.
        """
        end = time.monotonic() + seconds
        try:
            if self._process is None:
                self._begin()
            self._pipe.send((function, args))
            while True:
                if not self._pipe.poll(max(0.0, end - time.monotonic())):
                    raise Lost(f"not done after {seconds:.0f} s")
                kind, value = self._pipe.recv()
                if kind == "done":
                    return
                if kind == "failed":
                    raise Lost(value)
                yield value
        except (EOFError, ConnectionError):
            self._process.join(END)
            code = self._process.exitcode
            self.end()
            raise Lost(f"the process died ({_name(code)})") from None
        except BaseException:
            self.end()
            raise

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there,))
        self._process.start()
        there.close()  # or its end would never be seen

    def end(self) -> None:
        """End the process, and all that it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join(END)
            self._pipe.close()
            self._process = self._pipe = None


def _serve(pipe: Connection) -> None:
    os.setsid()  # so that it can be ended with all that it starts
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    with contextlib.suppress(EOFError):  # whoever calls has ended
        while True:
            function, args = pipe.recv()
            try:
                for value in function(*args):
                    pipe.send(("value", value))
                pipe.send(("done", None))
            except Exception as reason:
                pipe.send(("failed", f"{type(reason).__name__}: {reason!s:.300}"))
                return


def _end_with_the_caller() -> None:
    """However that ends: a worker in the middle of a case would notice when it next has something to tell, and keep the
    GPU until then."""
    caller = multiprocessing.parent_process()
    assert caller is not None
    wait([caller.sentinel])
    os.killpg(0, signal.SIGKILL)


def _name(code: int | None) -> str:
    """Of an exit code, as in SIGSEGV."""
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
