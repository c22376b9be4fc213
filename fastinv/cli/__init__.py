"""The command line: `fastinv demo | train | invert | audit | reproduce | info | bench`, one file each.

Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong usage, 3 finished but for some rows or files of a
log, or some experiments, 130 interrupted, or ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import fastinv
from fastinv.cli import audit, bench, demo, info, invert, reproduce, train
from fastinv.errors import FastinvError

COMMANDS = (demo, train, invert, audit, reproduce, info, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    _prepare_streams()
    args = parser().parse_args(argv)
    try:
        with _termination_as_interruption():
            code = args.run(args) or 0
        sys.stdout.flush()
    except KeyboardInterrupt as stopped:
        print(f"fastinv {args.command}: {str(stopped) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FastinvError, OSError) as error:
        print(f"fastinv {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return int(code)


def _prepare_streams() -> None:
    """What is printed goes nowhere where there is no stdout or stderr, as in a daemon; and what a terminal has no
    letters for is shown as something else."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (until the process ends)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def _termination_as_interruption() -> Iterator[None]:
    """What a scheduler ends keeps what is done, as after Ctrl-C."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # others cannot
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="fastinv",
        description="Recover the inputs of a split neural network from its features. Use it only on systems "
        "that you own or may test.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 finished with failures, 130 interrupted.",
    )
    top.add_argument("--version", action="version", version=f"fastinv {fastinv.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=Help)
        module.add_arguments(command)
        command.set_defaults(run=module.run, misused=command.error)
    return top
