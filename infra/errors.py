"""User errors: three lines (what happened, where, what to do) and an exit code."""

import re
from collections.abc import Sequence

PASSWORD = re.compile(r"://[^/@\s:]*:[^/@\s]+@")  # in an address


def without_passwords(text: str) -> str:
    """The text with user and password of each address in it left out."""
    return PASSWORD.sub("://***@", text)


def printable(text: str) -> str:
    """The text with what is not UTF-8 in it (parts of file names) escaped."""
    return text.encode(errors="backslashreplace").decode()


def line_of(error: BaseException, number: int = 0) -> str:
    """One line of an error's message (0: the first, -1: the last), at most 300 characters; its kind where the message
    is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[number][:300] if lines else type(error).__name__


def all_of(error: BaseException) -> str:
    """An error's whole message on one line, with those of its causes."""
    texts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        texts.append(" ".join(str(current).split()) or type(current).__name__)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "; because: ".join(dict.fromkeys(texts))


class CcsrError(Exception):
    """An error that a user can act on; shown as three lines, without a traceback.

    `what` happened, `where` (file, key, field), `todo`: what to do about it; `items`: a list below `what`.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str, todo: str, items: Sequence[str] = ()) -> None:
        super().__init__(what, where, todo)
        self.what, self.where, self.todo, self.items = what, where, todo, tuple(items)

    def __str__(self) -> str:
        parts = (self.what, *self.items, f"where: {self.where}", f"to do: {self.todo}")
        what, *items, where, todo = (" ".join(part.splitlines()) for part in parts)
        text = "\n".join([what, *(f"    {item}" for item in items), f"  {where}", f"  {todo}"])
        return printable(without_passwords(text))

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.what, self.where, self.todo), self.__dict__


def _rebuild(cls: type[CcsrError], what: str, where: str, todo: str) -> CcsrError:
    """Unpickle an error that crossed a process boundary (keyword arguments defeat the default)."""
    return cls(what, where=where, todo=todo)


class PartialResultError(CcsrError):
    """The job ended, but something is missing or was set aside. Exit code 1."""


class ConfigError(CcsrError):
    """A wrong key, type or value in a config or on the command line. Exit code 2."""

    exit_code = 2


class DataError(CcsrError):
    """An image, shard or array that cannot be used as asked. Exit code 3."""

    exit_code = 3


class ModelError(CcsrError):
    """A checkpoint, model directory or weight file that does not fit. Exit code 4."""

    exit_code = 4


class StorageError(CcsrError):
    """A place that cannot be read or written. Exit code 5."""

    exit_code = 5


class ClusterError(CcsrError):
    """Ray, a worker or a server that is missing or failed. Exit code 6."""

    exit_code = 6


class StoppedError(CcsrError):
    """The job was asked to stop (SIGTERM) and saved what it had. Exit code 143."""

    exit_code = 143
