"""What every command does around its work: exit codes, one-line errors, warnings.

Standard output carries results only. Errors that a user can cause are one line on
standard error that names the thing, its value and the remedy; `--debug` adds the
traceback.
"""

import argparse
import contextlib
import gc
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from types import FrameType
from typing import NoReturn, TextIO

from actionclip import __version__
from actionclip.errors import ActionClipError, OutputError, TooManyBadError, one_line


class ExitCode(IntEnum):
    """The exit codes of every command."""

    DONE = 0
    BUG = 1
    WRONG_INPUT = 2
    SOME_FAILED = 3
    TOO_MANY_BAD = 4
    CANNOT_WRITE = 5
    STALLED = 6
    INTERRUPTED = 130
    TERMINATED = 143


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints fit on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.WRONG_INPUT, f"{self.prog}: {one_line(message)}; see {self.prog} -h\n")


def build_parser(prog: str, description: str) -> OneLineParser:
    """Return a parser with the options that every command has."""
    parser = OneLineParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"actionclip {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(
    parser: OneLineParser,
    work: Callable[[argparse.Namespace], ExitCode],
    argv: Sequence[str] | None,
) -> int:
    """Parse the arguments, do the work, and turn whatever happens into an exit code."""
    if sys.stderr is None:  # closed by the caller; what it would have heard goes nowhere
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        args = parser.parse_args(argv)
    except SystemExit as exit_:  # --help, --version, or a wrong argument
        return int(exit_.code or 0)
    with _plain_warnings(parser.prog), _termination_as_exception():
        try:
            return work(args)
        except OutputError as error:
            _drop_output()
            return _fail(parser, args, ExitCode.CANNOT_WRITE, str(error))
        except TooManyBadError as error:
            return _fail(parser, args, ExitCode.TOO_MANY_BAD, str(error))
        except ActionClipError as error:
            return _fail(parser, args, ExitCode.WRONG_INPUT, str(error))
        except BrokenPipeError:
            _drop_output()
            return ExitCode.CANNOT_WRITE
        except (Exception, KeyboardInterrupt, _TerminatedError) as error:
            match _interruption(error):
                case KeyboardInterrupt():
                    return _fail(parser, args, ExitCode.INTERRUPTED, "interrupted")
                case _TerminatedError():
                    return _fail(parser, args, ExitCode.TERMINATED, "terminated")
            text = f"internal error, please report it: {type(error).__name__}: {error}"
            return _fail(parser, args, ExitCode.BUG, f"{text} (--debug shows where)")


def _interruption(error: BaseException | None) -> BaseException | None:
    """Return the signal behind an error: clean-up that it breaks off, and imports, hide it."""
    while error is not None and not isinstance(error, KeyboardInterrupt | _TerminatedError):
        error = error.__cause__ or error.__context__
    return error


def _drop_output() -> None:
    """Let what Python would still flush at its exit go nowhere, as nobody can take it."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or no real stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import without a search for garbage, which takes a fifth of PyTorch's import.

    Imports leave next to no garbage; what they leave is not looked at again, either. In a program
    that has imported PyTorch before, such as a notebook, this changes nothing.
    """
    if "torch" in sys.modules:
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with _signals_wait():
            yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Deliver signals afterwards: PyTorch drops what its attempt to import NumPy raises."""
    waiting: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, lambda n, _: waiting.append(n)) for number in numbers]
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])


def say(prog: str, text: str) -> None:
    """Write one line to standard error."""
    print(f"{prog}: {one_line(text)}", file=sys.stderr, flush=True)


def _fail(
    parser: OneLineParser, args: argparse.Namespace, code: ExitCode, message: str
) -> ExitCode:
    if args.debug:
        traceback.print_exc()
    say(parser.prog, message)
    return code


class _TerminatedError(BaseException):
    """SIGTERM arrived."""


@contextlib.contextmanager
def _termination_as_exception() -> Iterator[None]:
    """Let SIGTERM unwind the stack like Ctrl-C does, so that files are closed."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _TerminatedError

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: the caller's handlers stay
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _plain_warnings(prog: str) -> Iterator[None]:
    """Print warnings as one line each, ours always and others' never.

    PyTorch and PyAV warn about deprecations that the user of a command cannot act on.
    """

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        say(prog, f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"actionclip\b")
        warnings.showwarning = show
        yield
