"""Output files of the scripts: checked before the work, and never half-written."""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moco.errors import RunError, UsageError


def check_output(path: Path, force: bool, suffixes: Collection[str] = ()) -> None:
    """Checks before the work that a program's output can be written, and has one of the suffixes, if given.

    Raises:
        UsageError: it exists or is a folder, its folder does not exist, or it has another suffix. RunError: a full or
            read-only disk.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"unknown suffix of '{path}': use one of {', '.join(sorted(suffixes))}")
    if path.exists() and not (force and path.is_file()):
        how = "choose another name, or add --force" if path.is_file() else "it is not a file"
        raise UsageError(f"'{path}' exists: {how}")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder '{path.parent}' for '{path.name}'")
    with writing(path), tempfile.TemporaryFile(dir=path.parent) as file:
        file.write(bytes(4096))


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yields a temporary path, which becomes `path` in the end. RunError: full or read-only disk.

    After an error nothing is left behind, and an earlier `path` is intact.
    """
    tmp = path.with_name(f".{os.getpid()}{path.name}")
    try:
        yield tmp
        if tmp.exists():
            os.replace(tmp, path)
    except OSError as error:
        raise RunError(f"'{path}' cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)  # a folder
        with suppress(OSError):
            tmp.unlink()
