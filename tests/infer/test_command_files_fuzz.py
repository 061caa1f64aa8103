"""Files of commands (prompts, answers so far, a benchmark's runs), changed under our hands: refused in one line, or read."""

import json
import os
import pathlib

import numpy as np
import pytest
from mutations import Reader, try_all

from eesd_jax.bench import record
from eesd_jax.engine import answer_file
from eesd_jax.engine.generation import Generation, Rounds
from eesd_jax.engine.prompts import prompts_sha256, read_prompts

SETTINGS = {"model": "tiny", "seed": 0}
PLACES = [(0, 0), (0, 1), (1, 0)]
ROUNDS = Rounds(*(np.array([2, 1]) for _ in range(3)), np.array([0.5, np.nan]))
RECORDS = [
    {"id": "a", "category": "x", "turns": ["one", "two"]},
    {"prompt": "three", "question_id": 3},
    {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "four"}]},
]


def make_prompts(folder: pathlib.Path) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (folder / "prompt.json").write_text(json.dumps(RECORDS[2]))


def read_files(folder: pathlib.Path) -> None:
    for name in ("prompts.jsonl", "prompt.json"):
        conversations = read_prompts(folder / name)
        prompts_sha256(conversations)
        for conversation in conversations:  # what is echoed can be written
            generation = Generation("text", [5], 1, "length", Rounds.plain(1), 0.1, 0.1)
            for turn, prompt in enumerate(conversation.turns):
                answer_file.to_text(answer_file.record(conversation.id, turn, prompt, generation)).encode()


def make_answers(folder: pathlib.Path) -> None:
    answers = answer_file.AnswerFile(str(folder / "out"), SETTINGS, PLACES)
    generation = Generation("text", [5, 6, 7], 4, "length", ROUNDS, 0.1, 0.1)
    for place in PLACES[:2]:
        answers.add({place: answer_file.record("a", place[1], "one", generation)})
    answers.close()


def read_answers(folder: pathlib.Path) -> None:
    output = str(folder / "out")
    answer_file.check(output, SETTINGS)
    answers = answer_file.AnswerFile(output, SETTINGS, PLACES)
    try:
        assert set(answers.texts) <= set(PLACES)
        answers.finish()
        found = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
        assert len(found) == len(answers.texts)
    finally:
        answers.close()
        if not os.path.exists(f"{output}.partial"):
            make_answers(folder)


def make_runs(folder: pathlib.Path) -> None:
    journal = record.Journal(folder / "runs.jsonl", SETTINGS)
    journal.append("costs", record.Costs(1.0, (1.0, 2.0))._asdict())
    journal.append("run", record.Run(0, 0, "plain", "x", 0.5, [record.Answer("a", [1, 2, 3], "text", "eos", ROUNDS)]).to_json())
    found = [vars(record.Divergence("beta", "x", "a", 0, 2, 0.5, False))]
    journal.append("divergences", {"batch": 0, "turn": 0, "found": found})
    journal.close()


def read_runs(folder: pathlib.Path) -> None:
    for journal in (record.Journal.read(folder / "runs.jsonl"), record.Journal(folder / "runs.jsonl", SETTINGS)):
        assert all(isinstance(run, record.Run) for run in journal.runs())
        assert len(journal.divergences()) >= 0
        assert all(isinstance(number, int) for place in journal.compared() for number in place)
        assert journal.costs is None or journal.costs.plain is not None


READERS = {
    "prompts": Reader(make_prompts, ("prompts.jsonl", "prompt.json"), read_files),
    "answers": Reader(make_answers, ("out.partial",), read_answers),
    "runs": Reader(make_runs, ("runs.jsonl",), read_runs),
}


@pytest.mark.parametrize("name", READERS)
def test_a_few_dozen_mutations(tmp_path, name):
    try_all(READERS[name], tmp_path, range(60))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_two_thousand_mutations(tmp_path, name):
    found = try_all(READERS[name], tmp_path, range(2000))
    print(f"| {name} | {found['refused']:,} | {found['read']:,} |")
