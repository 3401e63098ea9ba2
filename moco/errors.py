"""Errors that a user can fix: one line on stderr, never a traceback."""

WORKER_DIED = "a data-loading worker died (out of memory, or of /dev/shm?): try a smaller -j"


class UsageError(Exception):
    """The command line cannot work as given. Exit status 2."""

    status = 2


class RunError(Exception):
    """The command line is fine, but the run fails (a broken image, a full disk). Exit status 1."""

    status = 1

    def __init__(self, text: str, alone: bool = False):
        """`alone`: perhaps only this process has the error, so it prints it itself."""
        super().__init__(text)
        self.alone = alone


def one_line(text: object) -> str:
    """The text with line breaks and other control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
