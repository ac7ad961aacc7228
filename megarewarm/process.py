"""How every command of megarewarm ends: one line and an exit code, also after Ctrl-C, a closed pipe, or a full disk or memory.

Imports no other packages, so that it works while those are still being imported.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
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
    **dict.fromkeys(("rensa", "sklearn"), "select"),
    "huggingface_hub": "hub",
    "transformers": "hub",
    "wandb": "wandb",
}
"""Optional packages, by the extra of pyproject.toml that installs them."""

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_CLOSED_PIPE = 128 + signal.SIGPIPE


def begin() -> None:
    """A command calls it before it imports anything large. Ctrl-C then ends it with one line, and it can print any text.

    Opens closed standard streams on /dev/null, so that no file of the run gets their numbers.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    codecs.register_error("shown", _shown)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="shown")
    _place_caches()
    sys.unraisablehook = _unraisable
    _on_interrupt(_end_at_once)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, the C library keeps freed memory for later allocations, of any size.

    glibc returns pieces of more than 32 MiB to the system at once, and others at the end of its heap; their next use costs a
    page fault for every 4 KiB. Afterwards it returns them again. Does nothing with another C library.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h
    try:
        library = ctypes.CDLL(None)
        mallopt, malloc_trim = library.mallopt, library.malloc_trim
    except (AttributeError, OSError):
        yield
        return
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)
    try:
        yield
    finally:
        # where glibc's own thresholds end, which don't move any more once one was set
        for name, value in ((trim_threshold, 64 << 20), (mmap_threshold, 32 << 20), (mmap_max, 65536)):
            mallopt(name, value)
        malloc_trim(0)


def run(main: Callable[[], int | None], *, stopped: str = "stopped") -> NoReturn:
    """Call ``main`` and end the process with its exit code (None: 0), or with that of the exception that ended it.

    Prints one line on stderr for a ``UserError``, an ``OSError`` or memory exhaustion, and ``stopped`` after Ctrl-C. An
    ``OSError`` that ``main`` does not handle counts as bad input: a path that can't be read or written.
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
            code = EXIT_CLOSED_PIPE  # as with 'head'
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
    """For imports of large packages within ``main``: Ctrl-C exits at once, because they may catch an exception."""
    _on_interrupt(_end_at_once)
    try:
        yield
    finally:
        _on_interrupt(signal.default_int_handler)


def say(line: str) -> None:
    """Print one line on stderr; do nothing if it is closed."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error`` or its cause is memory exhaustion, of the host or of a GPU as torch reports it."""
    while error is not None:
        words = str(error).lower()
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, RuntimeError) and ("out of memory" in words or "t allocate memory" in words):
            return True
        error = error.__cause__
    return False


def first_line(error: BaseException) -> str:
    """The first line of the message of ``error``, or its type if it has no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def in_main_thread() -> bool:
    """Whether signal handlers can be set from here."""
    return threading.current_thread() is threading.main_thread()


def _on_interrupt(handler: Callable[[int, FrameType | None], Any]) -> None:
    # a shell's background job and its children ignore SIGINT, and a program that embeds megarewarm may have its own handler
    ours = (signal.default_int_handler, _end_at_once)
    if in_main_thread() and signal.getsignal(signal.SIGINT) in ours:
        signal.signal(signal.SIGINT, handler)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """Exit without an exception, because an import may catch one or be left half done."""
    say("stopped")
    os._exit(EXIT_INTERRUPTED)


def _unraisable(told: sys.UnraisableHookArgs) -> None:
    if isinstance(told.exc_value, KeyboardInterrupt):  # raised in a finalizer
        _end_at_once(signal.SIGINT, None)
    if not isinstance(told.exc_value, BrokenPipeError):
        sys.__unraisablehook__(told)


def _shown(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that the terminal lacks, and bytes of file names that are not text."""
    assert isinstance(error, UnicodeEncodeError)
    wrong = error.object[error.start : error.end]
    return "".join(f"\\x{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) < 0xDD00 else "?" for c in wrong), error.end


def _place_caches() -> None:
    """For a user without a name or a home, as in containers: packages that need them would fail, or make a folder '~'.

    The cache of sample orders has its own handling (data/array_cache.py).
    """
    user = os.getuid()
    try:
        pwd.getpwuid(user)
    except KeyError:
        os.environ.setdefault("LOGNAME", f"user{user}")  # torch's compiler uses it in a folder name
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
    """Flush the output now, because the interpreter would print a failure at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
