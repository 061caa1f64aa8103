"""Generates text: one prompt, a file of prompts, or a chat.

python infer/generate.py --prompt="Why is the sky blue?"
python infer/generate.py --prompt="Why is the sky blue?" --compare        # with and without speculation, and what it gained
python infer/generate.py --model=meta-llama/Llama-3.2-1B-Instruct --prompts=questions.jsonl --output=answers.jsonl --batch_size=8
python infer/generate.py                                  # a chat with the built-in model

A model that fits no single host: start the command on every host, with --mesh over all their devices. TPU pods and SLURM are
recognised, elsewhere --coordinator_address, --num_processes and --process_id say who is who. Process 0 prints and writes.
"""

import contextlib
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from rich.console import Console
from rich.progress import Progress

from eesd_jax import cli
from eesd_jax.config import DEFAULT_CONTROLLER
from eesd_jax.decode import control
from eesd_jax.engine.conversations import check_prompts, encode
from eesd_jax.engine.generation import Generation, Rounds
from eesd_jax.engine.prompts import Conversation, is_text, read_prompts
from eesd_jax.errors import UserError

if TYPE_CHECKING:  # see cli.py
    from eesd_jax.decode.controllers import Controller
    from eesd_jax.engine.engine import Engine, Messages

FLAGS = flags.FLAGS
flags.DEFINE_string("prompt", None, "A single prompt. Without --prompt and --prompts, a chat is opened.")
cli.define_generation_flags()
cli.define_model_flags()
cli.define_distributed_flags()
flags.DEFINE_bool("stream", None, "Show an answer as it comes; default: if stdout is a terminal.")
flags.DEFINE_string("output", None, "File to write, one JSON object a turn.")
flags.DEFINE_bool(
    "compare",
    False,
    "Answer --prompt with plain decoding too, and print both speeds (of short answers medians of three) and whether they are identical.",
)

Write = Callable[[dict[str, Any]], None]

# --compare times so many more answers of each decoder, if the first of each took less than so many seconds together.
MORE_PAIRS, SHORT = 2, 30.0
# The answer to a turn for which the turns before it left no room.
NO_ROOM = Generation("", [], prompt_tokens=0, finish_reason="length", log=Rounds.plain(0), seconds=0.0, first_token_seconds=0.0)


def main(argv: Sequence[str]) -> None:
    del argv
    check_flags()
    conversations = None if FLAGS.prompts is None else read_prompts(FLAGS.prompts)
    asked = hashlib.sha256(repr(conversations).encode("utf-8", "backslashreplace")).hexdigest()[:8]
    cli.start_distributed(cli.settings_from_flags(sys.modules[__name__]) | {"hash of the prompts": asked})
    if cli.several_processes() and FLAGS.prompt is None and conversations is None:
        raise UserError("several processes are started without --prompt or --prompts; expected one of them: a chat is for one process")
    with contextlib.ExitStack() as stack:
        if not cli.is_first():  # it computes its part, and keeps quiet
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        write = stack.enter_context(output_lines())
        engine = cli.load_from_flags()
        if conversations is not None:
            answer_file(engine, conversations, write)
        elif FLAGS.compare:
            write(record("prompt", 0, FLAGS.prompt, compare(engine, FLAGS.prompt)))
        elif FLAGS.prompt is not None:
            write(record("prompt", 0, FLAGS.prompt, show(engine, FLAGS.prompt, cli.controller_from_flags(engine, batch=1))))
        else:
            chat(engine, write)


def check_flags() -> None:
    """Finds what is wrong with the flags before anything slow is started."""
    cli.check_generation_flags()
    if FLAGS.prompt is not None and FLAGS.prompts is not None:
        raise UserError(f"--prompt is {FLAGS.prompt!r} and --prompts is {FLAGS.prompts!r}; expected only one of them")
    if FLAGS.prompt is not None and not is_text(FLAGS.prompt):
        raise UserError(f"--prompt is {FLAGS.prompt!r}; expected a text that is not blank")
    if FLAGS.prompt is None and FLAGS.prompts is None and FLAGS.chat is False:
        raise UserError("--nochat is given without --prompt or --prompts; expected one of them, or a chat")
    if FLAGS.output and FLAGS.prompts and os.path.realpath(FLAGS.output) == os.path.realpath(FLAGS.prompts):
        raise UserError(f"--output is {FLAGS.output!r}, the file of prompts; expected another file")
    if FLAGS.compare:
        if FLAGS.prompt is None:
            raise UserError("--compare is given without --prompt; expected --prompt, whose answers it compares")
        if FLAGS.controller == control.PLAIN:
            raise UserError(f"--compare is given with --controller={control.PLAIN}; expected a controller that drafts")
        cli.check_controller(FLAGS.controller or DEFAULT_CONTROLLER, "--controller")


def show(engine: "Engine", prompt: "str | Messages", controller: "Controller | None") -> Generation:
    """Generates on stdout, with one line of statistics on stderr."""
    if streams():
        generation = consume(engine.stream(prompt, controller=controller, **options()), print_piece)
    else:
        generation = engine.generate(prompt, controller=controller, **options())
        print(generation.text, end="")
    print(flush=True)
    speculation = f"; {speculation_of(generation.log)}" if controller is not None else ""
    note(
        f"[{len(generation.token_ids)} tokens in {generation.seconds:.2f} s, {generation.tokens_per_second:.1f} tokens/s{speculation}; "
        f"first token after {generation.first_token_seconds:.2f} s; ended by {generation.finish_reason}]"
    )
    return generation


def note(text: str) -> None:
    """One line of statistics on stderr."""
    if cli.is_first():
        print(text, file=sys.stderr)


def streams() -> bool:
    """The same on all processes, whose programs take turns with each other."""
    return FLAGS.stream if FLAGS.stream is not None else sys.stdout.isatty() and not cli.several_processes()


def options() -> dict[str, Any]:
    """How a single answer is generated."""
    return {"sampling": cli.sampling_from_flags(), "stop": FLAGS.stop, "chat": FLAGS.chat, "seed": FLAGS.seed}


def print_piece(piece: str) -> None:
    print(piece, end="", flush=True)


def ignore(piece: str) -> None:
    """Takes a piece that is not to be shown."""


def consume(pieces: Iterator[str], take: Callable[[str], None]) -> Generation:
    """Gives `take` the pieces as they come, and returns what the stream returns at its end."""
    while True:
        try:
            take(next(pieces))
        except StopIteration as end:
            return end.value


def speculation_of(rounds: Rounds) -> str:
    """What speculation gave, in a few words."""
    passes, drafted, accepted = len(rounds.committed), int(rounds.tested.sum()), int(rounds.accepted.sum())
    per_round = rounds.committed.sum() / passes if passes else 0.0
    share = f" ({accepted / drafted:.0%})" if drafted else ""
    return f"{passes} rounds, {per_round:.2f} tokens per round, {accepted} of {drafted} drafts accepted{share}"


def compare(engine: "Engine", prompt: str) -> Generation:
    """Answers by plain decoding, which is shown, then by speculation, and says how they compare; both are streamed, and compiled before.

    Of one short answer a moment's load on the machine would decide, so both answer again, in turns, and the medians are printed.
    """

    def answer(controller: "Controller | None", show: Callable[[str], None] = ignore) -> Generation:
        return consume(engine.stream(prompt, controller=controller, **options()), show)

    def compiled_answer(controller: "Controller | None", show: Callable[[str], None] = ignore) -> Generation:
        with cli.notice("compiling ..."):
            next(engine.stream(prompt, controller=controller, **options()), None)
        return answer(controller, show)

    plain = [compiled_answer(None, print_piece if streams() else ignore)]
    print("" if streams() else plain[0].text, flush=True)  # before anything that speculation needs is compiled or timed
    controller = cli.build_controller(engine, FLAGS.controller or DEFAULT_CONTROLLER, batch=1)
    eesd = [compiled_answer(controller)]
    # Several processes would have to agree on how long it took.
    if plain[0].seconds + eesd[0].seconds < SHORT and not cli.several_processes():
        for _ in range(MORE_PAIRS):
            plain.append(answer(None))
            eesd.append(answer(controller))
    plain_speed, eesd_speed = (statistics.median(one.tokens_per_second for one in answers) for answers in (plain, eesd))
    identical = all(one.token_ids == plain[0].token_ids for one in eesd)
    different = "no (sampled: the same distribution, another draw)" if FLAGS.temperature > 0 else "no"
    print()
    print(f"plain: {plain_speed:.1f} tokens/s")
    print(f"eesd:  {eesd_speed:.1f} tokens/s")
    print(f"ratio: {eesd_speed / plain_speed:.2f}")
    print(f"tokens per round: {eesd[0].tokens_per_round:.2f}")
    print(f"identical: {'yes' if identical else different}")
    if engine.drafter.branch is not None and not engine.drafter.trained:
        print(cli.UNTRAINED)
    sys.stdout.flush()
    return eesd[0]


def chat(engine: "Engine", write: Write) -> None:
    """Reads messages from stdin and answers each with the conversation in view."""
    if not engine.has_chat_template:
        raise UserError(f"model {FLAGS.model!r} has no chat template, so there can be no chat; expected --prompt or --prompts")
    print(f"Chat with {FLAGS.model}. /reset starts again; /exit or end of input leaves.", file=sys.stderr, flush=True)
    sys.stdin.reconfigure(errors="surrogateescape")  # so that bytes which are no text come here and are named
    controller = cli.controller_from_flags(engine, batch=1)
    history: list[dict[str, str]] = []
    conversation = 1
    while (message := next_message()) not in (None, "/exit"):
        if message == "/reset":
            history, conversation = [], conversation + 1
        elif message:
            question = {"role": "user", "content": message}
            try:
                generation = show(engine, [*history, question], controller)
            except UserError as error:
                print(f"error: {error}; /reset starts again", file=sys.stderr, flush=True)
                continue
            write(record(f"chat-{conversation}", len(history) // 2, message, generation))
            history += [question, {"role": "assistant", "content": generation.text}]


def next_message() -> str | None:
    """The user's next line, or None at the end of input; only a terminal sees a prompt."""
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if in_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  arrow keys and history in input()
        print()
    try:
        message = input("> " if in_terminal else "").strip()
    except EOFError:
        if in_terminal:
            print()
        return None
    if message and not is_text(message):
        raise UserError(f"message {message!r}; expected UTF-8 text")
    return message


def answer_file(engine: "Engine", conversations: list[Conversation], write: Write) -> None:
    """Answers every turn of every conversation, a batch of conversations at a time; lines are written in the order of the file."""
    use_chat = engine.has_chat_template if FLAGS.chat is None else FLAGS.chat
    check_prompts(engine, conversations, use_chat, FLAGS.prompts)
    turns = sum(len(conversation.turns) for conversation in conversations)
    batch_size = min(FLAGS.batch_size, len(conversations))
    controller = cli.controller_from_flags(engine, batch_size)
    logs, started = [], time.perf_counter()
    # Lines that go to a terminal show themselves how far it is.
    hidden = not sys.stderr.isatty() or (not FLAGS.output and sys.stdout.isatty())
    with Progress(console=Console(stderr=True), redirect_stdout=False, transient=True, disable=hidden) as progress:
        task = progress.add_task("generating", total=turns)
        for first in range(0, len(conversations), batch_size):
            batch = dict(list(enumerate(conversations))[first : first + batch_size])
            answers = {}
            for index, turn, generation in answer_batch(engine, batch, batch_size, use_chat, controller):
                answers[index, turn] = generation
                logs.append(generation.log)
                progress.advance(task)
            for (index, turn), generation in sorted(answers.items(), key=lambda item: item[0]):
                write(record(batch[index].id, turn, batch[index].turns[turn], generation))
    seconds = time.perf_counter() - started
    rounds = Rounds.join(logs)
    tokens = rounds.committed.sum()
    speculation = f"; {speculation_of(rounds)}" if controller is not None else ""
    note(f"[{turns} turns, {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s{speculation}]")


def answer_batch(
    engine: "Engine", batch: dict[int, Conversation], batch_size: int, use_chat: bool, controller: "Controller | None"
) -> Iterator[tuple[int, int, Generation]]:
    """Answers some conversations side by side, turn by turn; yields (index in the file, turn, answer)."""
    histories = {index: list(conversation.history) for index, conversation in batch.items()}
    for turn in range(max(len(conversation.turns) for conversation in batch.values())):
        rows = {}
        for index, conversation in batch.items():
            if turn < len(conversation.turns):
                histories[index].append({"role": "user", "content": conversation.turns[turn]})
                try:
                    rows[index] = encode(engine, histories[index], use_chat)
                except UserError as error:  # the answers so far have made it too long
                    if cli.is_first():
                        cli.warn(f"{where(conversation)}, turn {turn + 1} is left without an answer: {error}")
                    yield index, turn, NO_ROOM
        generations = (
            engine.generate_ids(
                list(rows.values()),
                seeds=[FLAGS.seed + index for index in rows],
                sampling=cli.sampling_from_flags(),
                stop=FLAGS.stop,
                batch_size=batch_size,
                controller=controller,
            )
            if rows
            else []
        )
        for index, generation in zip(rows, generations, strict=True):
            histories[index].append({"role": "assistant", "content": generation.text})
            yield index, turn, generation


def where(conversation: Conversation) -> str:
    return f"prompt file {FLAGS.prompts!r}, line {conversation.line}"


def record(identity: str | int, turn: int, prompt: str, generation: Generation) -> dict[str, Any]:
    """One line of --output."""
    return {
        "id": identity,
        "turn": turn,
        "prompt": prompt,
        "text": generation.text,
        "token_ids": generation.token_ids,
        "new_tokens": len(generation.token_ids),
        "rounds": generation.rounds,
        "drafted": generation.drafted,
        "accepted": generation.accepted,
        "tokens_per_round": generation.tokens_per_round,
        "seconds": round(generation.seconds, 4),
        "finish_reason": generation.finish_reason,
    }


@contextlib.contextmanager
def output_lines() -> Iterator[Write]:
    """A function that writes one record: to --output, to stdout for a prompt file without it, else nowhere."""
    if FLAGS.output and cli.is_first():
        with cli.whole_file(FLAGS.output) as file:
            yield lambda line: print(json.dumps(line, ensure_ascii=False), file=file)
    elif FLAGS.prompts:
        yield lambda line: print(json.dumps(line, ensure_ascii=False), flush=True)
    else:
        yield lambda line: None


if __name__ == "__main__":
    cli.run(main)
