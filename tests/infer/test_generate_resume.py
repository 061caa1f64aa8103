"""`infer/generate.py --output`: answers survive whatever ends the command, and the same command goes on behind them, doing none twice.

Most cases stop the command in this process; those marked slow kill a process of its own at random moments.
"""

import errno
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import commands
import pytest
from commands import assert_refused
from generate_command import CONTEXT, read_output, write_prompts

from eesd_jax import files
from eesd_jax.engine.engine import Engine

SCRIPT = commands.ROOT / "infer" / "generate.py"
RECORDS = [{"id": i, "turns": ["hello", "there"][: 1 + i % 2]} for i in range(4)]
PLACES = [(i, turn) for i in range(4) for turn in range(1 + i % 2)]
OUTPUT, PARTIAL = "out.jsonl", "out.jsonl.partial"


def arguments(models: dict[str, str], *more: str) -> list[str]:
    return [f"--model={models['whole']}", f"--prompts={write_prompts(RECORDS)}", f"--output={OUTPUT}", "--max_new_tokens=4", *more]


def lines(name: str = OUTPUT) -> list[dict]:
    return read_output(pathlib.Path(name).read_text())


def without_clock(found: list[dict]) -> list[dict]:
    return [line | {"seconds": 0} for line in found]


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Prompts that were generated for, in each call; a call behind the `limit`-th is interrupted."""
    generate_ids, rows = Engine.generate_ids, Rows()

    def watched(engine, prompts, **options):
        if len(rows) == rows.limit:
            raise rows.error
        rows.append(len(prompts))
        return generate_ids(engine, prompts, **options)

    monkeypatch.setattr(Engine, "generate_ids", watched)
    return rows


class Rows(list):
    """limit: how many calls succeed. error: of the next one."""

    limit: int = 1000
    error: BaseException = KeyboardInterrupt()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("finished", [0, 1, 2, 3])
def test_interrupted_anywhere_the_same_command_goes_on(run, models, asked, size, finished):
    command = arguments(models, f"--batch_size={size}", "--temperature=0.9")
    assert run(*command).code == 0
    whole, calls = lines(), len(asked)
    os.remove(OUTPUT)
    asked.clear()
    asked.limit = min(finished, calls - 1)
    result = run(*command)
    assert (result.code, result.out) == (130, "")
    if not asked:
        assert (result.err, os.listdir()) == ("", ["prompts.jsonl"])
    else:
        assert result.err == f"[{sum(asked)} of 6 turns are kept in '{PARTIAL}'; the same command goes on]\n"
        assert sorted(os.listdir()) == [PARTIAL, "prompts.jsonl"]
    before = sum(asked)
    asked.limit = 1000
    result = run(*command)
    assert result.code == 0
    assert sum(asked) == 6
    assert f"[{6 - before} turns, " in result.err
    assert (f"[goes on: {before} of 6 turns" in result.err) == (before > 0)
    assert without_clock(lines()) == without_clock(whole)
    assert sorted(os.listdir()) == [OUTPUT, "prompts.jsonl"]


def test_a_line_that_a_kill_has_cut_off_is_answered_again(run, models, asked):
    asked.limit = 3
    run(*arguments(models))
    content = pathlib.Path(PARTIAL).read_bytes()
    kept = content[: content.rfind(b"\n", 0, -1) + 9]
    pathlib.Path(PARTIAL).write_bytes(kept)
    asked.limit = 1000
    assert run(*arguments(models)).code == 0
    assert len(asked) == 3 + 4
    assert [(line["id"], line["turn"]) for line in lines()] == PLACES


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("--temperature=0.5", "temperature 0.0, and now temperature is 0.5"),
        ("--max_new_tokens=5", "max_new_tokens 4, and now max_new_tokens is 5"),
        ("--seed=1", "seed 0, and now"),
        ("--stop=x", "stop [], and now"),
        ("--nochat", "chat None, and now chat is False"),
        ("--controller=plain", "controller None, and now controller is 'plain'"),
        ("--model={folder}", "model '"),
        ("--prompts=other.jsonl", "prompts_sha256 '"),
    ],
)
def test_answers_of_other_settings_are_never_mixed(run, models, asked, monkeypatch, changed, named):
    asked.limit = 2
    run(*arguments(models))
    pathlib.Path("other.jsonl").write_text(json.dumps(RECORDS[0]))
    before = pathlib.Path(PARTIAL).read_bytes()
    monkeypatch.setattr("eesd_jax.engine.engine.load", lambda *_, **__: pytest.fail("the model was loaded"))
    result = run(*arguments(models), changed.format(folder=models["folder"]))
    assert_refused(result, f"'{PARTIAL}' holds a run with {named}", "expected the same settings, or another --output")
    assert pathlib.Path(PARTIAL).read_bytes() == before


def test_weights_that_have_changed_meanwhile_are_found(run, models, asked, monkeypatch):
    asked.limit = 2
    run(*arguments(models))
    monkeypatch.setattr("eesd_jax.engine.describe.fingerprint", lambda params: "another")
    assert_refused(run(*arguments(models)), "holds a run with loaded weights '", "and now loaded weights is 'another'")


@pytest.mark.parametrize(
    "content", ["", '{"settings": {"temp', "{}\n", '{"settings": 1}\n', "[]\n", "\0\n", '{"settings": {}}\n{"a": 1}\n', "[[["]
)
def test_a_partial_file_of_somebody_else_is_left_alone(run, models, content):
    pathlib.Path(PARTIAL).write_text(content)
    result = run(*arguments(models))
    if not content:
        assert result.code == 0
    else:
        assert_refused(result, PARTIAL, "expected")
        assert pathlib.Path(PARTIAL).read_text() == content


def test_a_second_process_is_kept_away(run, models, asked):
    asked.limit = 1
    run(*arguments(models))
    lock = f"import fcntl, sys; file = open({PARTIAL!r}, 'ab'); fcntl.lockf(file, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert_refused(run(*arguments(models)), PARTIAL, "is being written by another process")
        other.stdin.close()
    asked.limit = 1000
    assert run(*arguments(models)).code == 0


@pytest.mark.parametrize("written", [0, 1, 3, 6])
def test_a_full_disk_keeps_the_answers_before(run, models, asked, monkeypatch, written):
    """At a line of the journal, or, behind the last one, at the file itself."""
    keep, kept = files.Journal.keep, []

    def full(journal, *entries):
        if len(kept) > written:  # the first entry is the settings
            journal._file.write(b'{"half a line')
            descriptor = journal._file

            class Full:
                def write(self, content):
                    raise OSError(errno.ENOSPC, "No space left on device")

                def fileno(self):
                    return descriptor.fileno()

                def close(self):
                    descriptor.close()

            journal._file = Full()
        kept.extend(entries)
        keep(journal, *entries)

    with monkeypatch.context() as patch:
        patch.setattr(files.Journal, "keep", full)
        if written == 6:
            patch.setattr(files, "_sync", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        result = run(*arguments(models))
    assert_refused(result, "cannot write", "No space left on device", "the same command goes on")
    assert sorted(os.listdir()) == ([PARTIAL, "prompts.jsonl"] if written else ["prompts.jsonl"])
    asked.clear()
    assert run(*arguments(models)).code == 0
    assert len(asked) == 6 - written
    assert [(line["id"], line["turn"]) for line in lines()] == PLACES


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug of ours")])
def test_an_older_output_stays_until_the_new_one_is_whole(run, models, asked, error):
    pathlib.Path(OUTPUT).write_text("old\n")
    asked.limit, asked.error = 3, error
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError):
            run(*arguments(models))
    else:
        run(*arguments(models))
    assert pathlib.Path(OUTPUT).read_text() == "old\n"
    asked.limit = 1000
    assert run(*arguments(models)).code == 0
    assert len(asked) == len(lines()) == 6


def test_a_turn_without_room_is_kept_as_one(run, models, asked):
    records = [{"turns": ["a", "9" * (CONTEXT // 2), "9" * (CONTEXT // 2), "b"]}, {"turns": ["a", "b"]}]
    pathlib.Path("long.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [*arguments(models), "--prompts=long.jsonl"]
    run(*command)
    whole, count = lines(), len(asked)
    asked.clear()
    asked.limit = count - 1
    assert run(*command).code == 130
    asked.limit = 1000
    assert run(*command).code == 0
    assert len(asked) == count
    assert without_clock(lines()) == without_clock(whole)


@pytest.mark.parametrize("end", ["/exit\n", "", "a\udcff\n"], ids=["exit", "end_of_input", "no_text"])
def test_however_a_chat_ends_what_was_said_is_kept(run, models, end):
    model = [f"--model={models['whole']}", "--max_new_tokens=2", f"--output={OUTPUT}"]
    run(*model, stdin=f"hello\nthere\n{end}")
    assert [(line["id"], line["turn"]) for line in lines()] == [("chat-1", 0), ("chat-1", 1)]
    assert os.listdir() == [OUTPUT]


def test_a_chat_that_was_killed_is_followed_by_the_next(run, models, monkeypatch):
    model = [f"--model={models['whole']}", "--max_new_tokens=2", f"--output={OUTPUT}"]
    with monkeypatch.context() as patch:
        patch.setattr("eesd_jax.engine.answer_file.AnswerFile.finish", lambda answers: None)  # as if there had been no time
        run(*model, stdin="hello\n/reset\nhello\n")
    assert os.listdir() == [PARTIAL]
    result = run(*model, stdin="there\n")
    assert "[2 answers of chats that were killed are kept; this one is chat-3]" in result.err
    assert [line["id"] for line in lines()] == ["chat-1", "chat-2", "chat-3"]


def test_lines_on_stdout_come_as_soon_as_all_before_them_are_there(run, models, asked):
    asked.limit = 2
    command = [argument for argument in arguments(models, "--batch_size=2") if "--output" not in argument]
    result = run(*command)
    assert (result.code, [(line["id"], line["turn"]) for line in read_output(result.out)]) == (130, PLACES[:3])


# In a process of its own -------------------------------------------------------------------------------------------------------------

MANY = [{"id": f"prompt {i}", "turns": [f"say {i}", "and again"][: 1 + i % 2]} for i in range(50)]


def start(folder: pathlib.Path, *more: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"EESD_JAX_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    given = [
        "--model=tiny",
        "--prompts=many.jsonl",
        f"--output={OUTPUT}",
        "--max_new_tokens=64",
        "--exit_branch=none",
        "--controller=plain",
    ]
    return subprocess.Popen(
        [sys.executable, SCRIPT, *given, *more], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kept(folder: pathlib.Path) -> dict[tuple, dict]:
    """Answers that are on disk, by id and turn; none of them twice."""
    for name in (OUTPUT, PARTIAL):
        if (folder / name).exists():
            content = (folder / name).read_bytes()
            found = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
            found = [{key: value for key, value in line.items() if key != "place"} for line in found if "settings" not in line]
            places = {(line["id"], line["turn"]): line for line in found}
            assert len(places) == len(found)
            return places
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGINT], [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]])
def test_killed_at_twenty_random_moments_nothing_is_lost_and_nothing_done_twice(tmp_path, heeds_sigint, signals):
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(record) + "\n" for record in MANY))
    with start(tmp_path) as process:  # compiled once, and what is to be found in the end
        assert process.wait() == 0, process.stderr.read()
    whole = kept(tmp_path)
    (tmp_path / OUTPUT).unlink()
    rng, before = random.Random(len(signals)), {}
    for kill in range(20):
        with start(tmp_path) as process:
            deadline = time.monotonic() + 60
            wanted = len(before) + rng.randrange(-2, 4)  # answers to wait for; in some runs none, and the kill falls into the start
            while process.poll() is None and len(kept(tmp_path)) < wanted and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(rng.random() * (2.0 if wanted <= len(before) else 0.05))
            process.send_signal(rng.choice(signals))
            process.wait()
        after = kept(tmp_path)
        assert {place: after.get(place) for place in before} == before, kill  # byte for byte, its seconds included: none was done again
        before = after
        if (tmp_path / OUTPUT).exists():  # done, and the same command would begin anew
            break
    else:
        with start(tmp_path) as process:
            out, err = process.communicate()
            assert (process.returncode, out) == (0, ""), err
        assert f"[goes on: {len(before)} of 75 turns" in err or not before
    last = kept(tmp_path)
    assert {place: last[place] for place in before} == before
    assert [line | {"seconds": 0} for line in last.values()] == [line | {"seconds": 0} for line in whole.values()]
    assert list(last) == [(record["id"], turn) for record in MANY for turn in range(len(record["turns"]))]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["many.jsonl", OUTPUT]


@pytest.mark.slow
@pytest.mark.parametrize("room", [600, 2_000, 10_000])
def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path, room):
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(record) + "\n" for record in MANY[:20]))
    with start(tmp_path) as process:
        assert process.wait() == 0
    whole = kept(tmp_path)
    (tmp_path / OUTPUT).unlink()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        process = start(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, ""), err
    assert "File too large" in err.splitlines()[-1]
    assert "Traceback" not in err
    before = kept(tmp_path)
    with start(tmp_path) as process:
        assert process.wait() == 0
    assert {place: kept(tmp_path)[place] for place in before} == before
    assert set(kept(tmp_path)) == set(whole)
