"""Files that threads and processes share: each is one writer's whole, and sets of files change together."""

import os
import subprocess
import sys
import threading

import pytest

from hsa_tl import files
from hsa_tl.files import InUse, atomic_files, locked, write_atomic


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_threads_write_whole_files(tmp_path):
    """With a temporary name for each process, most of these writes failed or mixed."""
    path, errors = tmp_path / "x", []

    def write(letter: str):
        try:
            for _ in range(20):
                write_atomic(path, letter * 5000)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        text = path.read_text() if path.exists() else ""
        assert text in ("", *(letter * 5000 for letter in "abcd"))
        threads[0].join(0.001)
    assert not errors and names(tmp_path) == ["x"]


def test_containers_with_one_pid_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with files.atomic_file(tmp_path / "x") as a, files.atomic_file(tmp_path / "x") as b:
        a.write(b"first")
        b.write(b"second, longer")
    assert (tmp_path / "x").read_bytes() == b"first"


def test_permissions_links_and_folders_are_kept(tmp_path):
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    write_atomic(target, "old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_atomic(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and target.stat().st_mode & 0o777 == 0o640
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "fresh", "")
    finally:
        os.umask(before)
    assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o640
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "far", "")
    assert names(tmp_path) == ["far", "fresh", "link"]


@pytest.mark.parametrize("broken", range(6))
def test_files_change_together_or_not_at_all(tmp_path, monkeypatch, broken):
    """Whichever move of the six fails: two old files aside, three new ones in place, and none."""
    paths = [tmp_path / n for n in "abc"]
    for path in paths[::2]:
        write_atomic(path, f"old {path.name}")
    calls = []

    def counting(real):
        def move(source, target):
            calls.append(target)
            if len(calls) == broken + 1:
                raise OSError("no space")
            real(source, target)

        return move

    monkeypatch.setattr(os, "rename", counting(os.rename))
    monkeypatch.setattr(os, "replace", counting(os.replace))

    def write():
        with atomic_files(*paths) as out:
            for file, path in zip(out, paths, strict=True):
                file.write(f"new {path.name}".encode())

    if broken == 5:
        write()
        assert len(calls) == 5 and [p.read_text() for p in paths] == ["new a", "new b", "new c"]
        return
    with pytest.raises(OSError, match="no space"):
        write()
    assert names(tmp_path) == ["a", "c"] and [p.read_text() for p in paths[::2]] == ["old a", "old c"]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), atomic_files(tmp_path / "a", tmp_path / "b") as (a, _):
        a.write(b"half")
        raise RuntimeError("mine")
    assert names(tmp_path) == []


def test_one_holder_at_a_time(tmp_path):
    """Of one process and of two; what a dead process held is free."""
    path = tmp_path / "lock"
    with locked(path, wait=False):
        with pytest.raises(InUse, match="lock must be free, got one that another process holds"), locked(path, False):
            pass
        code = f"from pathlib import Path; from hsa_tl.files import locked\nwith locked(Path({str(path)!r}), False): 0"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 1 and "InUse" in run.stderr
    with locked(path, wait=False), locked(tmp_path, wait=False):
        pass


def test_a_file_system_without_locks_warns(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available.: use it from one"), locked(tmp_path):
        pass


def test_a_user_without_a_home_gets_no_folder_of_that_name(tmp_path, monkeypatch):
    """A container's user that no list of users holds: expanduser leaves ~ as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(files.os.path, "expanduser", lambda path: path)
    with pytest.warns(UserWarning, match="there is no home folder.*set XDG_CACHE_HOME"):
        assert files.cache_folder().is_absolute()
    assert not (tmp_path / "~").exists()
