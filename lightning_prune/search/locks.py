"""Locks on files that tell which workers live: the system gives them up, however a process ends."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

__all__ = ["Locks", "lockable"]

_NO_LOCKS = "this system has no flock"

_TOKEN = re.compile(r"[0-9a-f]{12}")


class Locks:
    """Files beside a database, each locked by one worker as long as it lives.

    Others see at once that it has ended, in other containers and after a reboot as well. What a child of the worker
    inherits, as those that load data do, is given up when the child ends.

    Args:
        database: file that the workers share.
    """

    def __init__(self, database: Path) -> None:
        self.database = database.resolve()  # the same file under another name has the same locks

    @classmethod
    def beside(cls, storage: BaseStorage) -> Locks | None:
        """Those of a storage that is an SQLite file; None of others."""
        from optuna.storages import RDBStorage

        if not isinstance(storage, RDBStorage) or storage.engine.dialect.name != "sqlite":
            return None
        with storage.engine.connect() as connection:  # which knows the file, wherever the process has gone since
            file = connection.exec_driver_sql("PRAGMA database_list").all()[0][2]
        return cls(Path(file)) if file else None

    @contextlib.contextmanager
    def held(self, token: str) -> Iterator[bool]:
        """Hold a worker's lock, and clear away those of workers that are gone.

        Args:
            token: of the worker, twelve hexadecimal digits.

        Returns:
            Whether the file system has locks.
        """
        for path in self.database.parent.glob(f"{glob.escape(self.database.name)}-worker-*"):
            self.free(path.name.rpartition("-")[2])
        path, holder = self._path(token), os.getpid()
        with contextlib.ExitStack() as stack:
            try:
                if fcntl is None:
                    raise OSError(_NO_LOCKS)
                while True:
                    file = stack.enter_context(path.open("wb"))
                    _lock(file.fileno(), wait=True)
                    # Others clear away what is not locked: this file, too, if they came between.
                    with contextlib.suppress(FileNotFoundError):
                        if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                            break
            except OSError:
                with contextlib.suppress(OSError):
                    path.unlink()
                yield False
                return
            try:
                yield True
            finally:
                if os.getpid() == holder:  # a child that was forked leaves it to its parent
                    path.unlink(missing_ok=True)

    def free(self, token: object) -> bool:
        """Whether the worker that held the lock of this token has ended; False where that cannot be known."""
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            return False
        path = self._path(token)
        try:
            with _opened(path) as file:
                _lock(file.fileno())
                with contextlib.suppress(OSError):
                    path.unlink()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def _path(self, token: str) -> Path:
        return self.database.with_name(f"{self.database.name}-worker-{token}")


def lockable(folder: Path) -> bool:
    """Whether files in a folder can be locked."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _lock(file.fileno())
    except OSError:
        return False
    return True


def _opened(path: Path) -> BinaryIO:
    """A file, for writing if that is allowed: over NFS others cannot be locked."""
    try:
        return path.open("r+b")
    except PermissionError:
        return path.open("rb")


def _lock(descriptor: int, wait: bool = False) -> None:
    """Lock an open file; others' locks are waited for, or an error.

    Raises:
        OSError: another has it, or the system or file system has no such locks.
    """
    if fcntl is None:
        raise OSError(_NO_LOCKS)
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
