"""Runs the same prompts and weights through this project and its peers, plain and with each one's own speculation: greedy, batch 1.

    pip install -e ".[peers]"
    python benchmarks/peers.py
    python benchmarks/peers.py --prompts=questions.jsonl --limit=8 --peers=transformers,eesd_jax --json=peers.json

Peers are transformers + PyTorch (plain, prompt lookup, early exit) and llama.cpp (plain, prompt lookup), each with float32 weights made of
the file's, and llama.cpp also with bfloat16 ones and with those that the file stores. They take turns prompt by prompt, in an order that
rotates, so that a drift of the machine's speed favours none. Time is from prompt to last token, on all cores, without loading, compilation
and a warm-up. All get the same token ids, stop at the same EOS ids and count that EOS.

Speculation must not change greedy text: every text is compared with that of the same peer without speculation, and with that of
transformers without. A peer whose package is missing is left out, and so is speculation that fails.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import flags
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from eesd_jax import cli, files
from eesd_jax.engine.prompts import Conversation, read_prompts
from eesd_jax.errors import UserError
from eesd_jax.model import stored
from eesd_jax.weights import hub

FLAGS = flags.FLAGS
PEERS = ("transformers", "llama.cpp", "llama.cpp-bf16", "llama.cpp-stored", "eesd_jax", "eesd_jax-float32")
flags.DEFINE_list("peers", list(PEERS), "Who answers.")
flags.DEFINE_string("model", hub.DEMO_NAME, "demo (built in) or a GGUF file of a Llama; for this project alone also a folder or a hub id.")
flags.DEFINE_string("exit_branch", "auto", "This project's exit branch: a folder, none, or auto: the one that comes with the model.")
flags.DEFINE_string("prompts", None, "File of prompts, of which the first turns are answered; default: four that are built in.")
flags.DEFINE_integer("limit", None, "Only the first so many prompts; default: all.")
flags.DEFINE_integer("max_new_tokens", 128, "Budget of each answer, in tokens.")
flags.DEFINE_integer("lookup_tokens", 4, "Drafts of the peers' prompt lookup.")
flags.DEFINE_integer("early_exit", 8, "Blocks after which transformers' early exit drafts.")
flags.DEFINE_string("json", None, "File to write the result to.")

PLAIN, LOOKUP, EARLY_EXIT, EESD = "plain", "prompt lookup", "early exit", "EESD"
REFERENCE = ("transformers", PLAIN)
PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper.",
    "Rewrite with every verb in the past tense: I wake up, make coffee, read the news, and walk to work while the city wakes up.",
    "List the steps to bake sourdough bread.",
)
WARM_UP_TOKENS = 16
ATTEMPTS = 3

Answer = Callable[[list[int], int], list[int]]  # prompt and budget -> new tokens, the EOS that ends them included


class Way(NamedTuple):
    """One way in which a peer answers. kind: PLAIN or its speculation. arithmetic: of its products, weights x activations."""

    peer: str
    kind: str
    arithmetic: str
    answer: Answer


class Timing(NamedTuple):
    """One answer of one way: seconds from prompt to last token."""

    token_ids: list[int]
    seconds: float


class Work(NamedTuple):
    """Input of all peers. engine: this project's. file: the GGUF file. context: tokens of the longest text. folder: for temporary files."""

    engine: Any
    file: pathlib.Path
    context: int
    folder: pathlib.Path


def transformers_ways(work: Work) -> Iterator[Way]:
    """Lists the ways of transformers + PyTorch, in float32."""
    import torch
    import torch_reference

    torch.set_num_threads(os.cpu_count())
    model = torch_reference.load_model(work.file)

    def answer(**speculation: int) -> Answer:
        return lambda ids, budget: torch_reference.answer(model, ids, budget, work.engine.model.eos_ids, **speculation)

    arithmetic = "float32 x float32"
    yield Way("transformers", PLAIN, arithmetic, answer())
    yield Way("transformers", LOOKUP, arithmetic, answer(prompt_lookup_num_tokens=FLAGS.lookup_tokens))
    yield Way("transformers", EARLY_EXIT, arithmetic, answer(assistant_early_exit=FLAGS.early_exit))


def llama_cpp_ways(peer: str, work: Work) -> Iterator[Way]:
    """Lists the ways of llama.cpp: with float32 weights and cache, with bfloat16 weights, or with the file as it is."""
    import dequantized
    import gguf
    import llama_cpp_reference

    kinds = {"llama.cpp": gguf.GGMLQuantizationType.F32, "llama.cpp-bf16": gguf.GGMLQuantizationType.BF16}
    arithmetic = {"llama.cpp": "float32 x float32", "llama.cpp-bf16": "bfloat16 x bfloat16", "llama.cpp-stored": "as stored x 8 bits"}
    file = work.file
    if peer in kinds:
        file = work.folder / f"{peer}.gguf"
        dequantized.write(work.file, file, kinds[peer])
    for kind, drafts in ((PLAIN, None), (LOOKUP, FLAGS.lookup_tokens)):
        context = work.context + (drafts or 0)
        model = llama_cpp_reference.load_model(file, context, float32_cache=peer == "llama.cpp", lookup_tokens=drafts)

        def answer(ids: list[int], budget: int, model: Any = model) -> list[int]:
            return llama_cpp_reference.answer(model, ids, budget, work.engine.model.eos_ids)

        yield Way(peer, kind, arithmetic[peer], answer)


def eesd_jax_ways(peer: str, work: Work) -> Iterator[Way]:
    """Lists the ways of this project: with weights as the file stores them, or with float32 weights."""
    engine = work.engine
    if peer == "eesd_jax-float32":
        engine = type(engine)(engine.model._replace(params=stored.dense(engine.params)), engine.decode_config, engine.drafter)
    arithmetic = "as stored x float32" if stored.has_codes(engine.params) else "float32 x float32"

    def answer(controller: Any) -> Answer:
        return lambda ids, budget: engine.generate_ids([ids], seeds=[0], max_new_tokens=budget, controller=controller)[0].token_ids

    yield Way(peer, PLAIN, arithmetic, answer(None))
    if engine.drafter is not None:
        yield Way(peer, EESD, arithmetic, answer(engine.controller("auto")))


def open_peers(names: Sequence[str], work: Work) -> tuple[list[Way], dict[str, str]]:
    """Opens all peers: returns the ways to answer, and why others were left out, by peer."""
    ways, left_out = [], {}
    for name in names:
        try:
            match name.split("-")[0]:
                case "transformers":
                    ways += list(transformers_ways(work))
                case "llama.cpp":
                    ways += list(llama_cpp_ways(name, work))
                case _:
                    ways += list(eesd_jax_ways(name, work))
        except ModuleNotFoundError as error:
            left_out[name] = f"package {error.name!r} is missing; pip install -e '.[peers]' installs it"
        except Exception as error:
            left_out[name] = failure(name, error)
    return ways, left_out


def failure(peer: str, error: Exception) -> str:
    """Puts a peer's error into one line; an error of this project is raised."""
    if peer.startswith("eesd_jax"):
        raise error
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def measure(
    ways: Sequence[Way], prompts: Sequence[list[int]], budget: int, progress: Callable[[], None]
) -> tuple[list[Way], list[dict[Way, Timing]], dict[str, str]]:
    """Times all ways prompt by prompt, without compilation: returns those that work, their timings, and why others do not work."""
    from eesd_jax.bench.run import watch_compilation

    working, failed = [], {}
    for way in ways:
        try:
            way.answer(prompts[0], min(budget, WARM_UP_TOKENS))
            working.append(way)
        except Exception as error:
            failed[f"{way.peer}, {way.kind}"] = failure(way.peer, error)
    timings: list[dict[Way, Timing]] = []
    with watch_compilation() as compilations:
        for place, prompt in enumerate(prompts):
            shift = place % max(len(working), 1)
            timings.append({})
            for way in working[shift:] + working[:shift]:
                for _ in range(ATTEMPTS):
                    before, start = len(compilations), time.perf_counter()
                    token_ids = way.answer(prompt, budget)
                    timings[-1][way] = Timing(token_ids, time.perf_counter() - start)
                    if len(compilations) == before:
                        break
                else:
                    raise AssertionError(
                        f"{ATTEMPTS} runs of the same shapes, and each of them compiled something: {compilations[before:]}"
                    )
                progress()
    return working, timings, failed


def compare(engine: Any, prompts: Sequence[list[int]], expected: Sequence[list[int]], found: Sequence[list[int]]) -> dict[str, Any]:
    """Counts identical texts, and finds where others differ and whether float32 can tell the two tokens there apart."""
    from eesd_jax.bench import run
    from eesd_jax.bench.record import Answer, Run
    from eesd_jax.decode.controllers import PLAIN
    from eesd_jax.engine.generation import Rounds

    def as_run(name: str, texts: Sequence[list[int]]) -> Run:
        answers = [Answer(place, ids, "", "", Rounds.plain(0)) for place, ids in enumerate(texts)]
        return Run(0, 0, name, "", 0.0, answers)

    divergences = run.find_divergences(engine, prompts, {PLAIN: as_run("", expected), "peer": as_run("peer", found)})
    excused = sum(one.excused for one in divergences)
    return {
        "identical": len(prompts) - len(divergences),
        "excused": excused,
        "different": len(divergences) - excused,
        "found": [{"prompt": one.id, "position": one.position, "gap": one.gap, "excused": one.excused} for one in divergences],
    }


def result_rows(engine: Any, prompts: Sequence[list[int]], ways: Sequence[Way], timings: Sequence[dict[Way, Timing]]) -> list[dict]:
    """Makes a row for each way: speeds over all prompts, and which texts its own equal; None where there is nothing to compare with."""
    texts = {(way.peer, way.kind): [timing[way].token_ids for timing in timings] for way in ways}
    seconds = {(way.peer, way.kind): [timing[way].seconds for timing in timings] for way in ways}
    speed = {key: sum(map(len, texts[key])) / sum(seconds[key]) for key in texts}
    rows = []
    for way in ways:
        key, plain = (way.peer, way.kind), (way.peer, PLAIN)
        rows.append(
            {
                "peer": way.peer,
                "kind": way.kind,
                "arithmetic": way.arithmetic,
                "tokens_per_second": speed[key],
                "ratio_to_transformers": speed[key] / speed[REFERENCE] if REFERENCE in speed else None,
                "ratio_to_own_plain": speed[key] / speed[plain] if plain in speed else None,
                "like_own_plain": compare(engine, prompts, texts[plain], texts[key]) if plain in texts else None,
                "like_transformers": compare(engine, prompts, texts[REFERENCE], texts[key]) if REFERENCE in texts else None,
                "tokens": [len(ids) for ids in texts[key]],
                "seconds": [round(value, 4) for value in seconds[key]],
            }
        )
    return rows


def show(result: dict[str, Any]) -> None:
    """Prints a table, and what was left out."""
    table = Table(box=box.MARKDOWN)
    table.add_column("")
    for column in ("weights x activations", "tokens/s", "ratio", "own ratio", "like own plain", "like transformers"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        ratios = ("-" if row[name] is None else f"{row[name]:.2f}" for name in ("ratio_to_transformers", "ratio_to_own_plain"))
        counts = [
            "-" if same is None else f"{same['identical']} / {same['excused']} / {same['different']}"
            for same in (row["like_own_plain"], row["like_transformers"])
        ]
        table.add_row(f"{row['peer']}, {row['kind']}", row["arithmetic"], f"{row['tokens_per_second']:.1f}", *ratios, *counts)
    settings = result["settings"]
    # Not as wide as the terminal: a table that is cut says nothing.
    console = Console(width=200, soft_wrap=True)
    console.print(f"{result['model']}, greedy, batch 1, {settings['prompts']} prompts, {settings['max_new_tokens']} new tokens at most")
    console.print(table)
    console.print(f"EESD drafts from: {result['drafter']['arms']}")
    console.print("ratio: to transformers, plain. own ratio: to the same peer, plain. like ...: texts identical / excused / different;")
    console.print("excused: the logits of both tokens are closer than passes of different widths agree in float32.")


def versions() -> dict[str, str]:
    """Lists the versions of the compared packages that are installed."""
    found = {}
    for package in ("eesd-jax", "jax", "torch", "transformers", "llama-cpp-python"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def check_flags() -> list[str]:
    """Finds what is wrong with the flags before anything slow is started; returns the peers."""
    names = list(dict.fromkeys(name.strip() for name in FLAGS.peers))
    for name in names:
        if name not in PEERS:
            raise UserError(f"--peers names {name!r}; expected one or several of {', '.join(PEERS)}")
    if not names:
        raise UserError(f"--peers is empty; expected one or several of {', '.join(PEERS)}")
    for flag in ("limit", "max_new_tokens", "lookup_tokens", "early_exit"):
        if FLAGS[flag].value is not None and FLAGS[flag].value < 1:
            raise UserError(f"--{flag} is {FLAGS[flag].value}; expected an integer >= 1")
    return names


def read_conversations() -> list[Conversation]:
    """Reads the first turns, which are answered."""
    if not FLAGS.prompts:
        found = [Conversation(line, None, (), (prompt,), line) for line, prompt in enumerate(PROMPTS, start=1)]
    else:
        found = read_prompts(FLAGS.prompts)
    return [Conversation(one.id, one.category, one.history, one.turns[:1], one.line) for one in found[: FLAGS.limit]]


def main(argv: Sequence[str]) -> None:
    del argv
    names, conversations = check_flags(), read_conversations()
    file = hub.find_model(FLAGS.model) if FLAGS.model == hub.DEMO_NAME or FLAGS.model.endswith(".gguf") else None
    if file is None and (others := [name for name in names if not name.startswith("eesd_jax")]):
        raise UserError(f"--model is {FLAGS.model!r}, which is no GGUF file, and --peers names {others[0]}; expected demo or a .gguf file")

    import eesd_jax
    from eesd_jax.bench import run
    from eesd_jax.engine.conversations import check_prompts, encode
    from eesd_jax.engine.describe import describe_drafter

    config = eesd_jax.DecodeConfig(max_new_tokens=FLAGS.max_new_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no branch comes with the model: the result says what drafts
        engine = eesd_jax.load(FLAGS.model, dtype="float32", decode_config=config, exit_branch=FLAGS.exit_branch)
    if FLAGS.early_exit >= engine.model.config.num_layers:
        raise UserError(f"--early_exit is {FLAGS.early_exit}; expected less than the model's {engine.model.config.num_layers} blocks")
    chat = engine.has_chat_template
    check_prompts(engine, conversations, chat, FLAGS.prompts or "built in")
    prompts = [encode(engine, [*one.history, {"role": "user", "content": one.turns[0]}], chat) for one in conversations]
    context = min(max(map(len, prompts)) + FLAGS.max_new_tokens, engine.model.config.context_length)
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=Console(stderr=True), redirect_stdout=False, transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        ways, left_out = open_peers(names, Work(engine, file, context, pathlib.Path(folder)))
        task = progress.add_task("peers", total=len(ways) * len(prompts))
        ways, timings, failed = measure(ways, prompts, FLAGS.max_new_tokens, lambda: progress.advance(task))
    left_out |= failed
    for name, reason in left_out.items():
        cli.warn(f"{name} is left out: {reason}")
    if not ways:
        raise UserError(f"none of --peers={','.join(names)} can answer; expected one whose package is installed")
    result = {
        "machine": run.describe_machine(engine),
        "model": pathlib.Path(FLAGS.model).name,
        "versions": versions(),
        "drafter": describe_drafter(engine),
        "settings": {name: FLAGS[name].value for name in ("max_new_tokens", "lookup_tokens", "early_exit")} | {"prompts": len(prompts)},
        "rows": result_rows(engine, prompts, ways, timings),
        "left_out": left_out,
    }
    show(result)
    if FLAGS.json:
        with files.whole_file(FLAGS.json) as out:
            json.dump(result, out, indent=2)


if __name__ == "__main__":
    cli.run(main)
