"""Files that survive what ends a run: those that appear only when they are whole, and a journal, whose finished lines are there.

with files.replaced(path) as partial: save(partial)          # for libraries that write by name
with files.whole_file(path) as file: file.write(text)

Nothing here needs JAX. Windows has no locks of this kind; there, whoever writes the same file twice at once is not found out.
"""

import contextlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import IO, Any, TextIO

from eesd_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Path = pathlib.Path | os.PathLike
_LONGEST_NAME = 60  # of a file's name as part of another's: 4 bytes a character at most, and a file system takes 255


def expand(path: str | os.PathLike) -> pathlib.Path:
    """A path of this machine, with `~` as shells take it: what is no user's name is left as it is.

    Raises:
      UserError: no file can have that name.
    """
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise UserError(f"{path!r} holds half a character; expected a path") from None
    if "\0" in os.fspath(path):
        raise UserError(f"{path!r} holds a NUL; expected a path")
    return pathlib.Path(os.path.expanduser(path))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is an address such as gs://bucket/file."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Any]:
    """Gives a name beside `path` to write to. What is written there replaces `path` when the block ends, and is gone when it fails.

    Where a link points to, not the link, is replaced. Files are as readable as others that are made here, whatever the writer thinks.

    Args:
      path: of the file; of pathlib, or of etils, also remote.
    """
    if is_remote(path):
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        partial.write_bytes(b"")
        yield partial  # an object of a bucket appears whole, but may be written in several steps
        partial.replace(path)
        return
    target = pathlib.Path(os.path.realpath(path))
    partial, ours = _reserve(target)
    with ours:
        mode = os.fstat(ours.fileno()).st_mode
        try:
            yield partial
            os.chmod(partial, mode)
            _sync(partial)
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def _reserve(target: pathlib.Path) -> tuple[pathlib.Path, IO[bytes]]:
    """An empty file beside the target, locked by us: always the same one, so that a kill leaves no more than that, if nobody has it."""
    name = target.name[:_LONGEST_NAME]
    for extra in ("", f".{secrets.token_hex(4)}"):
        partial = target.with_name(f".{name}{extra}.partial")
        try:
            file = open(partial, "ab")  # noqa: SIM115  the caller closes it; not emptied before it is ours
        except PermissionError:
            if extra:
                raise
            continue
        with contextlib.suppress(OSError):
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):  # nobody has moved it away meanwhile
                file.truncate(0)
                return partial, file
        file.close()
    raise OSError(None, f"{partial.name!r} cannot be locked")


def _sync(path: pathlib.Path) -> None:
    """Puts a file on disk, so that a machine that loses its power does not keep the new name of an empty file."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that appears under its name only when it is complete; OSError where it cannot be written."""
    with replaced(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def _cannot_write(path: Any, error: OSError) -> UserError:
    return UserError(f"cannot write {str(path)!r} ({error.strerror or error}); expected a file in a folder that can be written to")


def is_plain(path: str | os.PathLike) -> bool:
    """Whether a path is, or will be, a plain file: not a pipe, a device or a folder, which cannot be replaced."""
    return not os.path.exists(path) or os.path.isfile(path)


def check_writable(path: str | pathlib.Path) -> None:
    """Raises UserError where `whole_file` would for what can be known before; what is no plain file is not touched."""
    target = expand(path)
    try:
        if target.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if is_plain(target):
            partial, file = _reserve(pathlib.Path(os.path.realpath(target)))
            file.close()
            partial.unlink()
    except OSError as error:
        raise _cannot_write(path, error) from None


@contextlib.contextmanager
def whole_file(path: str | pathlib.Path) -> Iterator[TextIO]:
    """Opens a text file that appears under its name only when it is complete; raises UserError where it cannot be written.

    What is no plain file (/dev/null, a pipe) is written to as it is. In the block nothing but writing is to be done.
    """
    target = expand(path)
    try:
        if target.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if not is_plain(target):
            with open(target, "w", encoding="utf-8") as file:
                yield file
            return
        with replaced(target) as partial, open(partial, "w", encoding="utf-8") as file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from None


class Journal:
    """What a long run has done so far: a file of one JSON object a line, the first of them the run's settings.

    A line counts when it is whole, and is on disk when `keep` returns. What a kill or a full disk has cut off is taken away.

    Args:
      path: of the file, made if need be.
      settings: all that the results depend on; must be those that the file was begun with.

    Raises:
      UserError: the file was begun with other settings, cannot be used, or another process is writing it.
    """

    KIND = "run"
    FLAG = "--output"
    ELSE = "another file"  # than the one with other settings

    def __init__(self, path: pathlib.Path, settings: dict[str, Any]):
        self._path = path
        settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  kept, as the lock is
            self._lock()
            self._file.seek(0)  # read by this one: closing another would end the lock
            content = self._file.read()
            self._entries, self._size = self._parse(content)
            if self._entries:
                self.check(settings)
            elif not _line({"settings": settings}).startswith(content):
                raise self._foreign()
            if self._size != len(content):
                self._file.truncate(self._size)
        except OSError as error:
            where = "expected a file in a folder that can be written to"
            raise UserError(f"cannot use {str(path)!r} ({error.strerror or error}); {where}") from None
        if not self._entries:
            self.keep({"settings": settings})

    def _lock(self) -> None:
        """Of this process, which may open its own journal again."""
        if fcntl is None:
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{str(self._path)!r} is being written by another process; expected another {self.FLAG}, or its end") from None
        except OSError:  # a disk without locks
            pass

    @classmethod
    def read(cls, path: pathlib.Path) -> "Journal":
        """What a run has written there so far, with whatever settings; nothing is changed, and nothing can be added.

        Raises:
          UserError: there is no such file, or it is none of these.
        """
        journal = cls.__new__(cls)
        journal._path = path
        try:
            journal._entries, journal._size = journal._parse(path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {str(path)!r} ({error.strerror}); expected that of a {cls.KIND} that was begun") from None
        if not journal._entries or not isinstance(journal.settings, dict):
            raise journal._foreign()
        return journal

    def _parse(self, content: bytes) -> tuple[list[dict[str, Any]], int]:
        """Whole lines, and how many bytes they take."""
        size = content.rfind(b"\n") + 1
        entries = []
        for number, line in enumerate(content[:size].splitlines(), start=1):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if not isinstance(entry, dict):
                raise self._foreign(f", line {number},")
            entries.append(entry)
        return entries, size

    def _foreign(self, where: str = "") -> UserError:
        return UserError(f"{str(self._path)!r}{where} was not written by this {self.KIND}; expected another {self.FLAG}")

    def check(self, settings: dict[str, Any], names: set[str] | None = None) -> None:
        """Raises UserError where the file was begun with other settings than these; names: of those to compare, by default all."""
        begun_with = self.settings
        if not isinstance(begun_with, dict):
            raise self._foreign()
        for name in (settings | begun_with) if names is None else sorted(names):
            old, new = begun_with.get(name), settings.get(name)
            if old != new:
                raise UserError(
                    f"{self._where} holds a {self.KIND} with {name} {old!r}, and now {name} is {new!r}; "
                    f"expected the same settings, or {self.ELSE}"
                )

    @property
    def _where(self) -> str:
        return repr(str(self._path))

    @property
    def settings(self) -> Any:
        return self._entries[0].get("settings")

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Everything that was kept, in order."""
        return self._entries[1:]

    def keep(self, *entries: dict[str, Any]) -> None:
        """Keeps what is done, on disk when this returns.

        Raises:
          UserError: it cannot be written, and nothing of it was; what was kept before is as it was.
        """
        content = b"".join(map(_line, entries))
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self._size)
            raise UserError(
                f"cannot write {str(self._path)!r} ({error.strerror}); what was finished before is kept there, and the same command goes on"
            ) from None
        self._size += len(content)
        self._entries += [json.loads(_line(entry)) for entry in entries]

    def close(self) -> None:
        """Lets others have the file."""
        self._file.close()


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
