"""What goes wrong in ways a user can mend: one line on stderr, never a traceback."""


class UsageError(Exception):
    """The command line asks for something impossible. Exit status 2."""

    status = 2


class RunError(Exception):
    """The command was sound, but the run cannot go on (a broken image, a full disk). Exit status 1."""

    status = 1

    def __init__(self, text, alone=False):
        """`alone`: perhaps only this process has met it, so it says so itself."""
        super().__init__(text)
        self.alone = alone


def one_line(text):
    """With line breaks and other control characters spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
