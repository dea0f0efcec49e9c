"""Locks tell which workers of a file live."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from lightning_prune.search import locks
from lightning_prune.search.locks import Locks, lockable
from lightning_prune.search.storages import open_storage, release

pytest.importorskip("fcntl", reason="this system has no flock: workers have heartbeats")

ONE, OTHER = "0123456789ab", "ba9876543210"
HOLDER = """
import sys, time
from pathlib import Path
from lightning_prune.search.locks import Locks
with Locks(Path(sys.argv[1])).held(sys.argv[2]) as held:
    print(held, flush=True)
    time.sleep(300)
"""


def test_a_lock_is_free_as_soon_as_its_process_is_killed(tmp_path: Path) -> None:
    database = tmp_path / "a[study].db"
    here = Locks(database)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(database), ONE], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "True\n"
        assert not here.free(ONE)
        with here.held(OTHER):  # which clears away what nobody holds
            assert (tmp_path / f"a[study].db-worker-{ONE}").exists()
    finally:
        process.kill()
        process.communicate()
    left = tmp_path / f"a[study].db-worker-{ONE}"
    assert left.exists()
    with here.held(OTHER):
        assert not left.exists()
        assert here.free(ONE)
    assert list(tmp_path.iterdir()) == []


def test_searches_of_one_process_have_locks_of_their_own(tmp_path: Path) -> None:
    here = Locks(tmp_path / "study.db")
    with here.held(ONE) as one:
        with here.held(OTHER) as other:
            assert one
            assert other
            assert not here.free(ONE)
            assert not here.free(OTHER)
        assert here.free(OTHER)
        assert not here.free(ONE)


@pytest.mark.parametrize("token", [None, 5, "", "../../../etc", "0123456789abc", "0123456789AB"])
def test_what_is_no_token_is_nobodys_end(tmp_path: Path, token: Any) -> None:
    assert not Locks(tmp_path / "study.db").free(token)


def test_a_file_that_was_cleared_away_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, lock, cleared = Locks(tmp_path / "study.db"), locks._lock, [True, True]

    def late(descriptor: int, wait: bool = False) -> None:
        if wait and cleared:
            cleared.pop()
            assert here.free(ONE)
        lock(descriptor, wait)

    monkeypatch.setattr(locks, "_lock", late)
    with here.held(ONE) as held:
        assert held
        assert not cleared
        assert not here.free(ONE)


@pytest.mark.parametrize("way", ["no flock", "refused"])
def test_without_locks_there_are_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    def heartbeat() -> int | None:
        storage = open_storage(tmp_path / "study.db", heartbeat_s=7)
        assert isinstance(storage, optuna.storages.RDBStorage)
        release(storage)
        return storage.get_heartbeat_interval()

    assert lockable(tmp_path)
    assert heartbeat() is None
    before = sorted(tmp_path.iterdir())
    if way == "no flock":
        monkeypatch.setattr(locks, "fcntl", None)
    else:

        def refuse(descriptor: int, how: int) -> None:
            raise OSError(95, os.strerror(95))

        monkeypatch.setattr("fcntl.flock", refuse)
    assert not lockable(tmp_path)
    assert heartbeat() == 7
    here = Locks(tmp_path / "study.db")
    with here.held(ONE) as held:
        assert not held
    assert sorted(tmp_path.iterdir()) == before


def test_which_storages_have_locks(tmp_path: Path) -> None:
    file = open_storage(tmp_path / "study.db")
    found = Locks.beside(file)
    assert found is not None
    assert found.database == (tmp_path / "study.db").resolve()
    release(file)
    for storage in (open_storage(None), open_storage(tmp_path / "a.journal"), open_storage("sqlite:///:memory:")):
        assert Locks.beside(storage) is None
        release(storage)


def test_one_file_has_the_same_locks_under_all_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "real")
    own = optuna.storages.RDBStorage("sqlite:///study.db")
    monkeypatch.chdir(tmp_path)  # as Hydra does
    linked = open_storage(tmp_path / "link" / "study.db")
    found = [Locks.beside(storage) for storage in (own, linked)]
    assert [None if each is None else each.database for each in found] == [
        (tmp_path / "real" / "study.db").resolve()
    ] * 2
    release(own)
    release(linked)


def test_a_forked_child_leaves_its_parents_lock_alone(tmp_path: Path) -> None:
    here = Locks(tmp_path / "study.db")
    with pytest.MonkeyPatch.context() as patch, here.held(ONE):
        patch.setattr(os, "getpid", lambda: -1)  # a child that leaves by `sys.exit` ends the `with` as well
    assert (tmp_path / f"study.db-worker-{ONE}").exists()


def test_what_may_only_be_read_is_tested_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, open_as_is = Locks(tmp_path / "study.db"), Path.open

    def refuse(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode == "r+b":
            raise PermissionError(13, os.strerror(13))
        return open_as_is(self, mode, *args, **options)

    def keep(self: Path, *args: Any, **options: Any) -> None:
        raise PermissionError(1, os.strerror(1))

    with here.held(ONE):
        monkeypatch.setattr(Path, "open", refuse)
        assert not here.free(ONE)
    (tmp_path / f"study.db-worker-{ONE}").touch()
    monkeypatch.setattr(Path, "unlink", keep)
    assert here.free(ONE)
