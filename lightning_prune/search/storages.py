"""Where Optuna keeps studies: memory, an SQLite file, a journal file, a database server."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import re
import sqlite3
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_prune.search.locks import lockable
from lightning_prune.search.workers import retry

if TYPE_CHECKING:
    from optuna.storages import BaseStorage, RDBStorage

__all__ = ["open_storage"]

_JOURNALS = (".journal", ".log")
_DRIVERS = {
    "postgresql": (("psycopg", "psycopg"), ("psycopg2", "psycopg2")),
    "mysql": (("MySQLdb", "mysqldb"), ("pymysql", "pymysql")),
}
"""Dialect -> modules and what SQLAlchemy calls them, the first that is installed is used."""

_CONNECT_TIMEOUT_S = 10
_BUSY_TIMEOUT_S = 60
_ATTEMPTS = 8
_LOCK_GRACE_S = 10


def open_storage(storage: str | Path | BaseStorage | None, heartbeat_s: int = 30) -> BaseStorage:
    """A storage of Optuna, reached and ready.

    ==================================  ==================================================================
    `None`                              in memory: gone with the process
    `study.db`, `sqlite:///study.db`    an SQLite file, for workers on one machine
    `study.journal`, `study.log`,       a journal file, for workers that share a folder, over NFS too
    `journal:///study`
    `postgresql://user:word@host/name`  a server, for workers anywhere; `mysql://` likewise
    ==================================  ==================================================================

    As in SQLAlchemy's URLs, three slashes begin a relative path and four an absolute one. Folders of files are created.
    On servers, a trial whose worker has not been heard of for four heartbeats counts as dead. Workers that share an
    SQLite file lock one beside it instead; where the system or the folder has no locks, they have heartbeats, too.

    Args:
        storage: as in the table, or one of Optuna's own, which is used as it is.
        heartbeat_s: seconds between heartbeats.

    Raises:
        ValueError: it is no storage, the file is none, or the URL has no meaning.
        ConnectionError: the server or file cannot be reached; passwords are not shown.
        ImportError: the database's driver is not installed.

    >>> type(open_storage(None)).__name__
    'InMemoryStorage'
    """
    from optuna.storages import BaseStorage, InMemoryStorage

    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    if not isinstance(storage, str | Path) or not str(storage).strip():
        raise ValueError(
            "a storage is a path, an URL such as postgresql://user@host/name, or one of optuna.storages; got "
            f"{storage!r}"
        )
    # A Path would have made one slash of two.
    kind, separator, rest = str(storage).partition("://")
    if not separator:
        path = Path(storage)
        return _journal(path) if path.suffix in _JOURNALS else _sqlite(f"sqlite:///{path}", heartbeat_s)
    if kind == "journal":
        if not rest.startswith("/") or not rest.strip("/"):
            raise ValueError(
                f"{storage!r} names no file; write journal:///folder/study.journal, with four slashes for an absolute "
                "path"
            )
        return _journal(Path(rest[1:]))
    if kind.startswith("redis"):
        raise ValueError(
            f"{shown(str(storage))} is a Redis server; build "
            "optuna.storages.JournalStorage(JournalRedisBackend(url)) and give that as the storage"
        )
    return _sqlite(str(storage), heartbeat_s) if kind.startswith("sqlite") else _server(str(storage), heartbeat_s)


def version(storage: BaseStorage) -> tuple[int, int] | None:
    """What is another as soon as somebody else has written to an SQLite file; None of other storages.

    Somebody else is whoever has another storage object, in this process or in others. Asking takes a hundredth of what
    reading trials takes.

    Source: SQLite, PRAGMA data_version.
    """
    from optuna.storages import RDBStorage

    if not isinstance(storage, RDBStorage) or storage.engine.dialect.name != "sqlite":
        return None
    with storage.engine.connect() as connection:
        count = int(connection.exec_driver_sql("PRAGMA data_version").scalar_one())
        return id(connection.connection.driver_connection), count  # each connection counts for itself


def release(storage: BaseStorage) -> None:
    """Give connections to a database back; it can still be used, and opens new ones."""
    from optuna.storages import RDBStorage

    storage.remove_session()
    if isinstance(storage, RDBStorage):
        storage.engine.dispose()


def shown(url: str) -> str:
    """An URL without its passwords.

    >>> shown("postgresql://ann:secret@db.example/search?password=secret")
    'postgresql://ann:***@db.example/search?password=***'
    """
    hidden = re.sub(r"(://[^/?#]*?:)[^/]*(@)", r"\1***\2", url)
    return re.sub(r"((?:password|passwd|pwd|passfile|sslpassword)=)[^&]*", r"\1***", hidden, flags=re.IGNORECASE)


def _journal(path: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    # The lock is a link to the file; a relative one would point nowhere, and a dead worker's lock would never expire.
    path = _made(path)
    try:
        return JournalStorage(JournalFileBackend(str(path), JournalFileSymlinkLock(str(path), _LOCK_GRACE_S)))
    except OSError as error:
        raise ConnectionError(f"the journal {path} cannot be opened: {error}; give another --storage") from None
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is no journal of Optuna, or a damaged one ({error}); give another file") from None


def _sqlite(url: str, heartbeat_s: int) -> BaseStorage:
    from sqlalchemy import event

    file = url.partition("://")[2].partition("?")[0][1:]
    pulse: int | None = heartbeat_s
    ahead = False
    if file and not file.startswith(":") and not file.startswith("file:"):
        path = _made(Path(file))
        url = url.replace(f"/{file}", f"/{path}", 1)
        if path.exists() and path.stat().st_size and not path.read_bytes()[:16].startswith(b"SQLite format 3"):
            raise ValueError(f"{path} is not an SQLite file; give another --storage, or remove it")
        # A heartbeat takes a thread and four statements per trial, a seventh of all that a trial takes.
        pulse = None if lockable(path.parent) else heartbeat_s
        ahead = _writes_ahead(path)
    options: dict[str, Any] = {"connect_args": {"timeout": _BUSY_TIMEOUT_S}}
    if not ahead:
        return _database(url, options, pulse)
    # In this mode no commit fails half way, so that connections need not be reset when they are given back.
    storage = _database(url, {**options, "pool_reset_on_return": None}, pulse)

    # Killed processes lose nothing, and a power cut only the last trials; the disk is not waited for 20 times a trial.
    def fast(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous = NORMAL")

    storage.engine.dispose()
    event.listen(storage.engine, "connect", fast)
    return storage


def _writes_ahead(path: Path) -> bool:
    """Let an SQLite file keep a write-ahead log, from now on; whether it does. Some file systems do not allow it."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S)) as connection:
            return bool(connection.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",))
    except sqlite3.Error:  # whoever opens it next says why
        return False


def _server(url: str, heartbeat_s: int) -> BaseStorage:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        parsed = make_url(url)
        dialect, _, driver = parsed.drivername.partition("+")
        dialect = "postgresql" if dialect == "postgres" else dialect
        if not driver:
            names = _DRIVERS.get(dialect, ())
            driver = next((name for module, name in names if importlib.util.find_spec(module)), "")
        parsed = parsed.set(drivername=f"{dialect}+{driver}" if driver else dialect)
        parsed.get_dialect()
    except ImportError:
        raise _driver_error(url) from None
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise ValueError(
            f"{shown(url)} is no storage; give a path, sqlite:///file, journal:///file, "
            "postgresql://user:password@host/name or mysql://user:password@host/name"
        ) from None
    options: dict[str, Any] = {"pool_pre_ping": True}  # an evaluation may take longer than a server keeps connections
    if driver in ("psycopg", "psycopg2", "mysqldb", "pymysql") and "connect_timeout" not in parsed.query:
        options["connect_args"] = {"connect_timeout": _CONNECT_TIMEOUT_S}
    return _database(parsed.render_as_string(hide_password=False), options, heartbeat_s)


def _database(url: str, options: dict[str, Any], heartbeat_s: int | None) -> RDBStorage:
    from optuna.exceptions import ExperimentalWarning, StorageInternalError
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    said = ""
    for attempt in range(_ATTEMPTS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                return RDBStorage(
                    url,
                    options,
                    heartbeat_interval=heartbeat_s,
                    grace_period=None if heartbeat_s is None else 4 * heartbeat_s,
                    heartbeat_stale_trial_callback=retry,
                )
        except ImportError:
            raise _driver_error(url) from None
        except ArgumentError as error:
            raise ValueError(f"{shown(url)} is no URL of a database: {shown(str(error))}") from None
        except RuntimeError as error:  # written by another version of Optuna
            raise ValueError(f"the storage {shown(url)} does not fit this version of Optuna: {error}") from None
        except (SQLAlchemyError, StorageInternalError, OSError) as error:
            said = reason(error)
            # Workers that begin together create the same tables.
            if not re.search(r"already exists|duplicate|unique|locked|deadlock", said, flags=re.IGNORECASE):
                break
            time.sleep(random.uniform(0.05, 0.2) * (attempt + 1))
    raise ConnectionError(
        f"the storage {shown(url)} cannot be reached: {shown(said)}; start the server, or correct host, user, password "
        "or path"
    )


def reason(error: BaseException) -> str:
    """The first line of what the driver says."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _driver_error(url: str) -> ImportError:
    dialect = re.split(r"[+:]", url, maxsplit=1)[0]
    packages = {"postgresql": "psycopg[binary]", "postgres": "psycopg[binary]", "mysql": "pymysql"}
    remedy = f"pip install '{packages[dialect]}'" if dialect in packages else "install the one that the URL names"
    return ImportError(f"the driver for {shown(url)} is not installed; {remedy}")


def _made(path: Path) -> Path:
    """The absolute path of a file, in a folder that exists."""
    path = path.expanduser().absolute()
    if path.is_dir():
        raise ValueError(f"the storage {path} is a folder; name a file in it, such as {path / 'study.db'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConnectionError(f"the storage's folder {path.parent} cannot be made: {error}; give another") from None
    return path
