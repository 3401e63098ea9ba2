"""What a user reads: lines on stdout from rank 0, and errors as one line on stderr, without a traceback."""

import os
import sys

from moco import distributed

WORKER_DIED = "a data-loading worker died (out of memory, or of /dev/shm?): try a smaller -j"


class UsageError(Exception):
    """The command line cannot work as given. Exit status 2."""

    status = 2


class RunError(Exception):
    """The command line is fine, but the run fails (a broken image, a full disk). Exit status 1."""

    status = 1


def say(text: str) -> None:
    """Prints a line on stdout, on rank 0 only. RunError: stdout is a closed pipe or a full disk."""
    if distributed.rank() != 0:
        return
    try:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)  # class and file names can be anything
    except OSError as error:
        # stdout becomes /dev/null, so that the flush at exit cannot fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise RunError(f"stdout cannot be written: {error.strerror}") from None


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def one_line(text: object) -> str:
    """The text with line breaks and other control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
