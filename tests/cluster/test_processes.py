"""What several processes of one run say to each other: that they are alike, see the same disk, and that one has ended.

In one process; `test_generate_processes.py` and `test_distill_processes.py` start real ones.
"""

import pathlib
import re
import threading

import pytest
from etils import epath

import eesd_jax
from eesd_jax import UserError, cli
from eesd_jax.cluster import lifeline, processes
from eesd_jax.cluster.lifeline import GONE, Lifeline
from eesd_jax.cluster.processes import Facts, check_devices, check_same, check_shared, flatten, source_hashes
from eesd_jax.config import ExperimentConfig, LifelineConfig
from eesd_jax.distill import experiment

FACTS = Facts("a", {"eesd_jax/x.py": "01", "eesd_jax/y.py": "02"}, {"jax": "0.10.2"}, {"seed": 0, "mesh.data": 2})


# Alike ------------------------------------------------------------------------------------------------------------------------------------


def test_processes_that_are_alike_are_let_through():
    check_same([FACTS, FACTS._replace(host="b"), FACTS])
    check_devices([("a", 4, "cpu"), ("b", 4, "cpu")])
    check_same([FACTS])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"code": {"eesd_jax/x.py": "01", "eesd_jax/y.py": "03"}}, ["other code", "eesd_jax/y.py (hash 03, there 02)", "same version"]),
        ({"code": {"eesd_jax/x.py": "01"}}, ["other code", "eesd_jax/y.py (hash of none, there 02)"]),
        ({"code": {}}, ["other code", "eesd_jax/x.py and 1 more files"]),
        ({"versions": {"jax": "0.10.1"}}, ["other libraries", "jax 0.10.1, there 0.10.2", "same versions"]),
        ({"versions": {"jax": "0.10.2", "libtpu": "1"}}, ["other libraries", "libtpu 1, there None"]),
        ({"settings": {"seed": 1, "mesh.data": 4}}, ["other settings", "mesh.data is 4, there 2; seed is 1, there 0", "the same ones"]),
    ],
)
def test_what_differs_is_named_with_both_processes_and_both_values(changes, named):
    with pytest.raises(UserError, match=r"^process 2 \(c\) has other .* than process 0 \(a\): .*; expected ") as found:
        check_same([FACTS, FACTS._replace(host="b"), FACTS._replace(host="c", **changes)])
    for text in named:
        assert text in str(found.value)


def test_devices_that_differ():
    with pytest.raises(UserError, match=r"process 1 \(b\) has 3 devices \(TPU v4\), process 0 \(a\) has 4 \(TPU v4\); expected as many"):
        check_devices([("a", 4, "TPU v4"), ("b", 3, "TPU v4")])


def test_every_field_of_a_config_and_every_file_of_the_package_count():
    settings = flatten(experiment.to_dict(ExperimentConfig()))
    assert settings["optimizer.learning_rate"] == ExperimentConfig().optimizer.learning_rate
    assert not any(isinstance(value, dict) for value in settings.values())
    package = pathlib.Path(eesd_jax.__file__).parent
    assert set(source_hashes()) == {path.relative_to(package.parent).as_posix() for path in package.rglob("*.py")}


def test_alone_there_is_nothing_to_say():
    assert not processes.joined()
    assert processes.is_first()
    assert processes.exchange({"a": (1, 2)}) == [{"a": [1, 2]}]
    processes.leave()
    processes.wait_for_news()
    processes.fail("nothing", 2, "nothing")


# The same disk ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def together(monkeypatch):
    """Runs a function as several processes, which are threads here; gives what each raised, or None."""
    monkeypatch.setattr(processes.ProcessesConfig, "shared", 0.1)
    own = threading.local()

    def together(*work) -> list[UserError | None]:
        barrier, values, raised = threading.Barrier(len(work), timeout=20), [None] * len(work), [None] * len(work)

        def exchange(value):
            values[own.process] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        monkeypatch.setattr(processes, "joined", lambda: True)
        monkeypatch.setattr(processes, "is_first", lambda: own.process == 0)
        monkeypatch.setattr(processes, "exchange", exchange)

        def run(process: int) -> None:
            own.process = process
            try:
                work[process]()
            except UserError as error:
                raised[process] = error

        threads = [threading.Thread(target=run, args=(process,)) for process in range(len(work))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return raised

    return together


def see(folder: pathlib.Path):
    return lambda: check_shared(epath.Path(folder), "output_dir")


def test_a_shared_folder_is_left_as_it_was(together, tmp_path):
    assert together(*[see(tmp_path / "runs" / "new")] * 3) == [None] * 3
    assert not (tmp_path / "runs").exists()
    (tmp_path / "old").mkdir()
    assert together(*[see(tmp_path / "old")] * 3) == [None] * 3
    assert list((tmp_path / "old").iterdir()) == []


def test_a_folder_that_is_not_shared_is_refused_by_all(together, tmp_path):
    """Processes 1 and 3 look at disks of their own."""
    raised = together(*[see(tmp_path / disk / "run") for disk in ("a", "b", "a", "c")])
    wanted = r"output_dir is '.*/run', where process 1 \(.*\), process 3 \(.*\) cannot see what process 0 \(.*\) writes; expected a folder"
    for error in raised:
        assert re.match(wanted, str(error))
    assert not (tmp_path / "a" / "run").exists()


def test_a_folder_that_process_0_cannot_write_to(together, tmp_path):
    (tmp_path / "file").write_text("")
    raised = together(*[see(tmp_path / "file" / "run")] * 2)
    for error in raised:
        assert re.search(r"output_dir is '.*', which cannot be written to \(.*\); expected a folder to write to", str(error))


# Who has ended ----------------------------------------------------------------------------------------------------------------------------


class Ended(BaseException):
    """In place of the end of a process, by its main thread."""


class Recorded(Lifeline):
    """Notes how its process would have ended."""

    def __init__(self, process: int, count: int):
        super().__init__(process, [f"process {i} (host {i})" for i in range(count)], LifelineConfig(grace=0.2))
        self.code = None
        self.end = threading.Event()

    def _exit(self, code: int) -> None:
        self.code = code
        self.end.set()
        for line in self._lines.values():
            line.close()
        if threading.current_thread() is threading.main_thread():
            raise Ended


@pytest.fixture
def lines():
    """Three processes that are connected."""
    made = [Recorded(i, 3) for i in range(3)]
    port, token = made[0].listen()
    for line in made[1:]:
        line.connect("localhost", port, token)
    made[0].wait_for({1, 2})
    return made


def cut(line: Lifeline) -> None:
    """As the kernel does for a process that was killed, which hears of nothing any more."""
    line._ended = lambda *details, **more: None
    for connection in line._lines.values():
        connection.shutdown(lifeline.socket.SHUT_RDWR)


@pytest.mark.parametrize("killed", [0, 2])
def test_who_is_killed_is_named_by_all_others(lines, capfd, killed):
    cut(lines[killed])
    others = [line for line in lines if line is not lines[killed]]
    for line in others:
        assert line.end.wait(20)
        assert line.code == GONE
    said = capfd.readouterr().err
    assert said.count(f"error: process {killed} (host {killed}) is gone: it was killed") == said.count("error:") == len(others)


@pytest.mark.parametrize("failed", [0, 1])
def test_who_fails_says_so_and_all_others_say_why(lines, capfd, failed):
    with pytest.raises(Ended):
        lines[failed].fail("no such file", 2, "error: no such file")
    for line in lines:
        assert line.end.wait(20)
        assert line.code == 2
    said = capfd.readouterr().err.splitlines()
    assert sorted(said) == ["error: no such file"] + [f"error: process {failed} (host {failed}) ended: no such file"] * 2


def test_the_same_mistake_is_said_by_each_in_its_own_words(lines, capfd):
    for line in reversed(lines):
        with pytest.raises(Ended):
            line.fail("seed is 'x'", 2, "error: seed is 'x'")
    assert capfd.readouterr().err.splitlines() == ["error: seed is 'x'"] * 3


def test_nobody_wonders_about_who_has_left(lines, capfd):
    for line in lines:
        line.leave()
    for line in lines:
        cut(line)
    assert not any(line.end.wait(0.5) for line in lines)
    assert capfd.readouterr().err == ""


def test_commands_find_the_processes_that_run_together():
    # By a name in `sys.modules`, so that JAX is not imported for it; if that name were wrong, every process would write.
    assert cli._processes() is processes
