"""Files appear whole or not at all, and a journal's finished lines survive kills, full disks and other writers."""

import errno
import fcntl
import json
import os
import pathlib
import stat
import subprocess
import sys

import pytest

from eesd_jax import files
from eesd_jax.errors import UserError

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def full(*arguments):
    raise FULL


# Files that are replaced -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), FULL, ValueError("a bug")])
def test_a_file_appears_whole_or_stays_as_it_was(error):
    path = pathlib.Path("file")
    path.write_text("old")
    try:
        with files.replaced(path) as partial:
            partial.write_text("ne")
            assert path.read_text() == "old"
            if error:
                raise error
            partial.write_text("new")
    except BaseException as raised:
        assert raised is error
    assert path.read_text() == ("old" if error else "new")
    assert os.listdir() == ["file"]


def test_files_are_as_readable_as_others_whatever_the_writer_does():
    mask = os.umask(0o027)
    try:
        with files.replaced(pathlib.Path("file")) as partial:
            partial.unlink()
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(os.stat("file").st_mode) == 0o640


def test_what_a_kill_has_left_is_taken_over_but_not_what_another_is_writing():
    pathlib.Path(".file.partial").write_text("left behind, and longer than what comes")
    files.write_whole(pathlib.Path("file"), "new")
    assert (pathlib.Path("file").read_text(), os.listdir()) == ("new", ["file"])
    with open(".file.partial", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"theirs")
        files.write_whole(pathlib.Path("file"), "newer")
    assert pathlib.Path("file").read_text() == "newer"
    assert pathlib.Path(".file.partial").read_text() == "theirs"


@pytest.mark.parametrize("name", ["x" * 255, "日" * 85, "a b\n", "-", "😀", "x.partial"])
def test_any_name_that_a_file_can_have(name):
    with files.whole_file(name) as file:
        file.write("text")
    assert (os.listdir(), pathlib.Path(name).read_text()) == ([name], "text")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nosuch/file", "No such file or directory"),
        (".", "it is a folder"),
        ("x" * 256, "File name too long"),
        ("loop/x", "symbolic links"),
        ("~nosuchuser/x", "No such file or directory"),
        ("/dev/full", "No space left on device"),
        ("/proc/nosuch", "No such file or directory"),
    ],
)
def test_what_cannot_be_written_is_one_line(path, reason):
    os.symlink("loop", "loop")
    with pytest.raises(UserError, match=reason) as error, files.whole_file(path) as file:
        file.write("text" * 10_000)
    assert "\n" not in str(error.value)
    assert "expected a file in a folder that can be written to" in str(error.value)
    if path != "/dev/full":
        with pytest.raises(UserError, match=reason):
            files.check_writable(path)
    assert os.listdir() == ["loop"]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(monkeypatch):
    pathlib.Path("file").write_text("old")
    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(UserError, match=r"cannot write 'file' \(No space left on device\)"), files.whole_file("file") as file:
        file.write("new")
    assert (os.listdir(), pathlib.Path("file").read_text()) == (["file"], "old")


def test_a_look_whether_a_file_can_be_written_leaves_nothing():
    files.check_writable("new")
    pathlib.Path("old").write_text("old")
    files.check_writable("old")
    os.mkfifo("pipe")
    files.check_writable("pipe")  # opening it would wait for a reader
    assert sorted(os.listdir()) == ["old", "pipe"]
    assert pathlib.Path("old").read_text() == "old"


# Journals ----------------------------------------------------------------------------------------------------------------------------

SETTINGS = {"model": "a", "seed": 1}


def begin(**settings) -> files.Journal:
    return files.Journal(pathlib.Path("journal"), SETTINGS | settings)


def content() -> list:
    return [json.loads(line) for line in pathlib.Path("journal").read_text().splitlines()]


def test_a_journal_goes_on_behind_its_last_whole_line():
    journal = begin()
    journal.keep({"a": 1}, {"b": "\ud83d"})
    journal.keep({"c": (1, 2)})
    journal.close()
    whole = pathlib.Path("journal").read_bytes()
    for size in range(len(whole) + 1):
        pathlib.Path("journal").write_bytes(whole[:size])
        again = begin()
        count = max(whole[:size].count(b"\n") - 1, 0)
        assert again.lines == [{"a": 1}, {"b": "\ud83d"}, {"c": [1, 2]}][:count]
        again.keep({"more": size})
        again.close()
        assert content() == [{"settings": SETTINGS}, *again.lines]


@pytest.mark.parametrize(("changed", "named"), [({"seed": 2}, "seed 1, and now seed is 2"), ({"new": 0}, "new None, and now new is 0")])
def test_other_settings_are_refused_by_name(changed, named):
    begin().keep({"a": 1})
    before = pathlib.Path("journal").read_bytes()
    with pytest.raises(UserError, match=named):
        begin(**changed)
    assert pathlib.Path("journal").read_bytes() == before


@pytest.mark.parametrize(
    "foreign", [b"text\n", b"\0\n", b"[]\n", b"[" * 100_000 + b"\n", b"{}\n", b'{"settings": 3}\n', b"\xff\xfe\n", b"text"]
)
def test_what_is_no_journal_is_left_alone(foreign):
    pathlib.Path("journal").write_bytes(foreign)
    with pytest.raises(UserError, match="was not written by this run"):
        begin()
    assert pathlib.Path("journal").read_bytes() == foreign


def test_an_entry_that_does_not_fit_on_the_disk_is_no_entry(monkeypatch):
    journal = begin()
    journal.keep({"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)  # the line may lie there already
        with pytest.raises(
            UserError, match=r"No space left on device\); what was finished before is kept there, and the same command goes on"
        ):
            journal.keep({"b": 2})
    assert content() == [{"settings": SETTINGS}, {"a": 1}]
    journal.keep({"c": 3})
    assert content() == [{"settings": SETTINGS}, {"a": 1}, {"c": 3}]
    assert journal.lines == [{"a": 1}, {"c": 3}]


def test_two_processes_do_not_write_one_journal():
    begin().keep({"a": 1})
    program = f"""
import pathlib
from eesd_jax import files
try:
    files.Journal(pathlib.Path("journal"), {SETTINGS!r})
except ValueError as error:
    print(error)
"""
    journal = begin()
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "is being written by another process; expected another --output" in other.stdout
    journal.close()
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == ""


def test_reading_changes_nothing():
    begin().keep({"a": 1})
    with open("journal", "ab") as file:
        file.write(b'{"half')
    before = pathlib.Path("journal").read_bytes()
    assert files.Journal.read(pathlib.Path("journal")).lines == [{"a": 1}]
    assert pathlib.Path("journal").read_bytes() == before
    with pytest.raises(UserError, match="cannot read 'nosuch'"):
        files.Journal.read(pathlib.Path("nosuch"))
