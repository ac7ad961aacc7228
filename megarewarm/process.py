"""How every command of megarewarm ends: one line and an exit code, also where a key, a pipe, a disk or memory ends it.

Without other packages, so that it holds while those are still being imported.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import pwd
import select
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from megarewarm.errors import EXIT_BAD_INPUT, EXIT_OUT_OF_MEMORY, UserError

_EXTRAS = {
    **dict.fromkeys(("tiktoken", "sentencepiece", "zstandard", "pyarrow", "ftfy"), "data"),
    **dict.fromkeys(("matplotlib", "scipy"), "report"),
    "mpi4py": "mpi",
    "huggingface_hub": "hub",
    "transformers": "hub",
    "wandb": "wandb",
}
"""Packages that not everyone needs, by the extra of pyproject.toml that installs them."""

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_CLOSED_PIPE = 128 + signal.SIGPIPE


def begin() -> None:
    """Called by a command before it imports anything large: Ctrl-C ends it with one line, and its output takes every text.

    A standard stream that is closed is opened on /dev/null, so that no file of the run takes its number.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    codecs.register_error("shown", _shown)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="shown")
    _place_caches()
    sys.unraisablehook = _unraisable
    _on_interrupt(_end_at_once)


def run(main: Callable[[], int | None], *, stopped: str = "stopped") -> NoReturn:
    """Call ``main`` and end the process with what it returns (None: 0), or with the exit code of what ended it.

    A ``UserError``, an ``OSError`` and memory that is out are one line on stderr; ``stopped`` is the line after Ctrl-C. An
    ``OSError`` outside of ``main``'s own care is bad input: a place that can't be read or written.
    """
    try:
        try:
            _on_interrupt(signal.default_int_handler)
            code = main() or 0
        finally:
            _on_interrupt(_end_at_once)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        say(stopped)
    except UserError as error:
        code = error.exit_code
        say(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            code = EXIT_CLOSED_PIPE  # it has seen enough, as 'head' has
        else:
            code = EXIT_BAD_INPUT
            say(f"{error.filename or 'the output'}: {error.strerror or error}")
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _EXTRAS:
            raise
        code = EXIT_BAD_INPUT
        say(f"the package {name} is not installed; pip install 'megarewarm[{_EXTRAS[name]}]'")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code = EXIT_OUT_OF_MEMORY
        say(f"out of memory: {first_line(error)}")
    _flush()
    raise SystemExit(code)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports of large packages within ``main``: Ctrl-C ends the process at once, for they may catch an exception."""
    _on_interrupt(_end_at_once)
    try:
        yield
    finally:
        _on_interrupt(signal.default_int_handler)


def say(line: str) -> None:
    """One line on stderr; where that is closed, nothing."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error``, or what it came from, is memory that is out: of the host, or of a GPU as torch tells it."""
    while error is not None:
        words = str(error).lower()
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, RuntimeError) and ("out of memory" in words or "t allocate memory" in words):
            return True
        error = error.__cause__
    return False


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says, or its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def in_main_thread() -> bool:
    """Whether signals can be watched from here."""
    return threading.current_thread() is threading.main_thread()


def _on_interrupt(handler: Callable[[int, FrameType | None], Any]) -> None:
    # a shell's background job ignores it, and so do its children; who calls from elsewhere has a handler of his own
    ours = (signal.default_int_handler, _end_at_once)
    if in_main_thread() and signal.getsignal(signal.SIGINT) in ours:
        signal.signal(signal.SIGINT, handler)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """Not by an exception: an import may catch it, or be caught half done by the next one."""
    say("stopped")
    os._exit(EXIT_INTERRUPTED)


def _unraisable(told: sys.UnraisableHookArgs) -> None:
    if isinstance(told.exc_value, KeyboardInterrupt):  # it came while something was being removed
        _end_at_once(signal.SIGINT, None)
    if not isinstance(told.exc_value, BrokenPipeError):
        sys.__unraisablehook__(told)


def _shown(error: UnicodeError) -> tuple[str, int]:
    """A terminal need not know every character, and names of files need not be text."""
    assert isinstance(error, UnicodeEncodeError)
    wrong = error.object[error.start : error.end]
    return "".join(f"\\x{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) < 0xDD00 else "?" for c in wrong), error.end


def _place_caches() -> None:
    """For a user without a name and a home, as in containers: packages that ask for them would end, or make a folder '~'.

    The orders of samples have a cache with words of its own (data/array_cache.py).
    """
    user = os.getuid()
    try:
        pwd.getpwuid(user)
    except KeyError:
        os.environ.setdefault("LOGNAME", f"user{user}")  # torch's compiler names its folder so
        if os.environ.get("HOME"):
            return
        place = Path(tempfile.gettempdir()) / f"megarewarm-{user}"
        with contextlib.suppress(OSError):
            place.mkdir(mode=0o700, exist_ok=True)
            if place.lstat().st_uid == user and not place.lstat().st_mode & 0o022:
                os.environ.setdefault("HF_HOME", str(place / "huggingface"))
                os.environ.setdefault("TRITON_HOME", str(place))


def _reader_is_gone() -> bool:
    watch = select.poll()
    try:
        watch.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return True
    return any(events & select.POLLERR for _, events in watch.poll(0))


def _flush() -> None:
    """Nothing is left for the interpreter to write when it ends, where it would show what fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
