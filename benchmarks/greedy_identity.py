"""Compares greedy EESD with plain decoding on the built-in model, token by token, in float32: every controller, length and batch size.

    python benchmarks/greedy_identity.py --prompts=questions.jsonl,functions.jsonl --output_dir=identity --report=identity.md

Two exit branches draft, both untrained: `random`, whose drafts are hardly ever right, and `zero`, the target's head on the output of block
N. `beta` answers the first turn of all prompts, in batches of 8; then every controller answers 20 of them, with at most 1, 4,
8 and 16 drafts, in batches of 8 and one by one. Texts do not end at an EOS, so that every one of them is compared over its whole length.

A text that differs is excused where plain decoding's own two best logits, after the part that is the same, are closer than passes of
different widths agree in float32. The report lists all differences, excused or not. Finished work is kept in OUTPUT_DIR/identity.jsonl:
the same command, started again, goes on where it stopped, and --norun reports on what there is.
"""

import hashlib
import itertools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

import eesd_jax
from eesd_jax import cli, files
from eesd_jax.bench import report, run
from eesd_jax.bench.record import Answer, Journal, Run
from eesd_jax.config import DecodeConfig, DraftConfig
from eesd_jax.decode.controllers import PLAIN, Calibration, Setup, build_controller, parse_controller
from eesd_jax.decode.costs import RoundCosts
from eesd_jax.engine.drafter import Drafter
from eesd_jax.engine.engine import Engine
from eesd_jax.engine.generation import Generation, Rounds
from eesd_jax.engine.prompts import read_prompts
from eesd_jax.engine.timing import code_fingerprint
from eesd_jax.errors import UserError
from eesd_jax.model import llama
from eesd_jax.model.config import ModelConfig
from eesd_jax.model.exit_branch import ExitBranch, init_exit_branch

FLAGS = flags.FLAGS
flags.DEFINE_list("prompts", None, "Files of prompts, of which the first turns are answered.")
flags.DEFINE_string("output_dir", None, "Folder for identity.jsonl.")
flags.DEFINE_string("report", None, "File for the summary (Markdown).")
flags.DEFINE_boolean("run", True, "Do what is not done yet.")
flags.DEFINE_integer("new_tokens", 128, "Tokens generated from each prompt.")

ALL, GRID = "all prompts", "grid"
BRANCHES = ("random", "zero")
CONTROLLERS = ("beta", "threshold:0.3", "cost_aware", "calibrated", "beta:plain", "fixed:max_draft")
GRID_PROMPTS = 20
# Early and with few tokens to draft, so that rounds are quick: what they draft is mostly wrong anyway.
EXIT_LAYER = 2
DRAFT_VOCAB = 8192
# Cost of a round with k drafts, for `cost_aware`: cheap drafts, so that it drafts although few are accepted.
COST_PER_DRAFT = 0.02
# One capacity for all but the longest prompts: few programs to compile.
MIN_CAPACITY = 384


class Prompts(NamedTuple):
    """ids: of the records. tokens: token ids of each, sorted by length."""

    ids: list[str]
    tokens: list[list[int]]

    def batches(self, size: int) -> "list[Prompts]":
        """Splits into batches of `size`; the last one holds the rest."""
        return [Prompts(self.ids[i : i + size], self.tokens[i : i + size]) for i in range(0, len(self.ids), size)]

    def sample(self, count: int, longest: int) -> "Prompts":
        """Chooses `count` prompts of at most `longest` tokens, of all lengths."""
        fitting = [place for place, tokens in enumerate(self.tokens) if len(tokens) <= longest]
        places = [fitting[place] for place in np.linspace(0, len(fitting) - 1, min(count, len(fitting))).round().astype(int)]
        return Prompts([self.ids[place] for place in places], [self.tokens[place] for place in places])


class Cell(NamedTuple):
    """Answers that share a program. prompts: ALL or GRID. controller: its name; `fixed:max_draft` stands for the longest drafts."""

    prompts: str
    controller: str
    max_draft: int
    batch_size: int


def all_cells() -> list[Cell]:
    """Lists the cells in the order in which they are run: those that say most come first."""
    cells = [Cell(ALL, "beta", DraftConfig.max_draft, 8)]
    grid = [Cell(GRID, name, draft, batch) for batch in (8, 1) for draft in (4, 8, 1, 16) for name in CONTROLLERS]
    return cells + sorted(grid, key=lambda cell: cell.controller == "beta:plain")


def make_branch(config: ModelConfig, params: llama.Params, kind: str) -> ExitBranch:
    """Makes an untrained branch after block N: `zero`, or `random`, a block of random matrices before the target's own norm and head."""
    ids = np.arange(min(DRAFT_VOCAB, config.vocab_size))  # the most frequent ones of a byte-pair vocabulary
    if kind == "zero":
        return init_exit_branch(config, params, EXIT_LAYER, "zero", ids)
    branch = init_exit_branch(config, params, EXIT_LAYER, "next", ids)
    rng = np.random.default_rng(0)

    def draw(weight: jax.Array) -> jax.Array:
        return weight if weight.ndim == 1 else jax.device_put(rng.standard_normal(weight.shape, np.float32) * weight.shape[1] ** -0.5)

    return branch._replace(block=jax.tree.map(draw, branch.block))


def decode(engine: Engine, branch: ExitBranch, cell: Cell, prompts: Prompts) -> list[Generation]:
    """Answers a batch of prompts; `plain` is a controller too."""
    name = cell.controller.replace("max_draft", str(cell.max_draft))
    costs = RoundCosts(exit=tuple(1 + COST_PER_DRAFT * drafts for drafts in range(cell.max_draft + 1)), look_up=())
    spec = parse_controller(name, cell.max_draft)
    controller = build_controller(spec, Setup(calibration=Calibration(), costs=costs))
    drafter = Drafter(branch, DraftConfig(EXIT_LAYER, cell.max_draft), Calibration(), trained=False)
    drafting = Engine(engine.model, engine.decode_config, drafter)
    return drafting.generate_ids(prompts.tokens, seeds=range(len(prompts.ids)), batch_size=cell.batch_size, controller=controller)


def compare(engine: Engine, prompts: Prompts, cell: Cell, plain: Sequence[Sequence[int]], ours: Sequence[Generation]) -> dict[str, Any]:
    """Counts how often the texts are plain decoding's, lists where they are not, and sums up the rounds."""

    def as_run(token_ids: Sequence[Sequence[int]]) -> Run:
        answers = [Answer(i, list(ids), "", "length", Rounds.plain(0)) for i, ids in zip(prompts.ids, token_ids, strict=True)]
        return Run(0, 0, cell.controller, cell.prompts, 0.0, answers)

    runs = {PLAIN: as_run(plain), cell.controller: as_run([generation.token_ids for generation in ours])}
    found = run.find_divergences(engine, prompts.tokens, runs)
    rounds = Rounds.join([generation.log for generation in ours])
    return {
        "texts": len(prompts.ids),
        "tokens": sum(len(ids) for ids in plain),
        "rounds": len(rounds.drafted),
        "drafted": int(rounds.drafted.sum()),
        "accepted": int(rounds.accepted.sum()),
        "found": [vars(divergence) for divergence in found],
    }


def run_cell(engine: Engine, branches: dict[str, ExitBranch], cell: Cell, prompts: Prompts, journal: Journal) -> None:
    """Runs what the journal lacks of a cell, plain decoding included."""
    plain = {tuple(entry["key"]): entry["token_ids"] for entry in journal.entries("plain")}
    done = {tuple(entry["key"]) for entry in journal.entries("compared")}
    for branch, (index, batch) in itertools.product(branches, enumerate(prompts.batches(cell.batch_size))):
        plain_key, key = (cell.prompts, cell.batch_size, index), (*cell, branch, index)
        if plain_key not in plain:
            generations = decode(engine, branches[branch], cell._replace(controller=PLAIN), batch)
            plain[plain_key] = [generation.token_ids for generation in generations]
            journal.append("plain", {"key": plain_key, "token_ids": plain[plain_key]})
        if key not in done:
            generations = decode(engine, branches[branch], cell, batch)
            journal.append("compared", {"key": key} | compare(engine, batch, cell, plain[plain_key], generations))


def tallies(journal: Journal) -> dict[tuple[Cell, str], dict[str, Any]]:
    """Sums up each cell with each branch, over all its batches."""
    sums: dict[tuple[Cell, str], dict[str, Any]] = {}
    for entry in journal.entries("compared"):
        *cell, branch, _ = entry["key"]
        values = {name: value for name, value in entry.items() if name != "key"}
        values |= {"excused": sum(one["excused"] for one in entry["found"]), "different": sum(not one["excused"] for one in entry["found"])}
        total = sums.setdefault((Cell(*cell), branch), dict.fromkeys(values, 0) | {"found": []})
        for name, value in values.items():
            total[name] = total[name] + value
    return sums


def to_markdown(journal: Journal) -> str:
    """Writes the summary: each cell, and every divergence."""
    sums, sections = tallies(journal), []
    expected = {(cell, branch): journal.settings["texts"][cell.prompts] for cell in all_cells() for branch in BRANCHES}
    missing = sum(sums[key]["texts"] < texts if key in sums else True for key, texts in expected.items())
    total = {name: sum(one[name] for one in sums.values()) for name in ("texts", "tokens", "excused", "different", "drafted", "accepted")}
    identical = total["texts"] - total["excused"] - total["different"]
    sections.append(
        f"{total['texts']} texts, {total['tokens']} tokens: {identical} texts identical, {total['excused']} excused, {total['different']} "
        f"different. {total['drafted']} tokens were drafted, {total['accepted']} accepted. Code {journal.settings['code']}. "
        + (f"Not complete: {missing} of {len(expected)} cells are missing, in part or altogether." if missing else "Complete.")
    )
    header = ("controller", "max_draft", "branch", "texts", "identical / excused / different", "drafts a round", "accepted")
    for title, prompts, batch in (("All prompts, batch 8", ALL, 8), ("Grid, batch 8", GRID, 8), ("Grid, batch 1", GRID, 1)):
        lines = []
        for (cell, branch), one in sums.items():
            if (cell.prompts, cell.batch_size) == (prompts, batch):
                counts = f"{one['texts'] - one['excused'] - one['different']} / {one['excused']} / {one['different']}"
                accepted = f"{one['accepted'] / max(one['drafted'], 1):.1%}"
                figures = (str(one["texts"]), counts, f"{one['drafted'] / one['rounds']:.2f}", accepted)
                lines.append((cell.controller, str(cell.max_draft), branch, *figures))
        if lines:
            sections += [f"### {title}", report.table(header, lines)]
    header = ("controller", "max_draft", "batch", "branch", "prompt", "same tokens", "plain's top-2 logit gap", "excused")
    lines = []
    for (cell, branch), one in sums.items():
        for found in one["found"]:
            where = (cell.controller, str(cell.max_draft), str(cell.batch_size), branch, str(found["id"]), str(found["position"]))
            lines.append((*where, f"{found['gap']:.1e}", "yes" if found["excused"] else "no"))
    return "\n\n".join([*sections, "### Divergences", report.table(header, lines) if lines else "None."]) + "\n"


def read(engine: Engine, files: Sequence[str]) -> Prompts:
    """Reads the first turns of all the files, sorted by length."""
    found = [(str(record.id), engine.encode(record.turns[0])) for file in files for record in read_prompts(file)]
    return Prompts(*map(list, zip(*sorted(found, key=lambda one: len(one[1])), strict=True)))


def main(argv: Sequence[str]) -> None:
    del argv
    for flag in ("prompts", "output_dir"):
        if not FLAGS[flag].value:
            raise UserError(f"--{flag} is missing; expected {'files of prompts' if flag == 'prompts' else 'a folder'}")
    model = eesd_jax.load("demo", dtype="float32").model._replace(eos_ids=())
    engine = Engine(model, DecodeConfig(max_new_tokens=FLAGS.new_tokens, min_capacity=MIN_CAPACITY))
    prompts = read(engine, FLAGS.prompts)
    longest = MIN_CAPACITY - FLAGS.new_tokens - (max(cell.max_draft for cell in all_cells()) + 1)
    chosen = {ALL: prompts, GRID: prompts.sample(GRID_PROMPTS, longest)}
    settings = {
        "code": code_fingerprint(),
        "new_tokens": FLAGS.new_tokens,
        "texts": {name: len(some.ids) for name, some in chosen.items()},
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
    }
    journal = Journal(pathlib.Path(FLAGS.output_dir).expanduser() / "identity.jsonl", settings)
    branches = {kind: make_branch(model.config, model.params, kind) for kind in BRANCHES}
    for cell in all_cells() if FLAGS.run else []:
        start = time.perf_counter()
        run_cell(engine, branches, cell, chosen[cell.prompts], journal)
        found = [tallies(journal)[cell, branch] for branch in BRANCHES]
        counts = ", ".join(f"{one['texts']} texts, {one['excused']} excused, {one['different']} different" for one in found)
        print(f"{' '.join(map(str, cell))}: {counts}; {time.perf_counter() - start:.0f} s", flush=True)
        jax.clear_caches()  # no other cell runs its programs
    summary = to_markdown(journal)
    print(summary)
    if FLAGS.report:
        with files.whole_file(FLAGS.report) as file:
            file.write(summary)


if __name__ == "__main__":
    cli.run(main)
