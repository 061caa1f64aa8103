"""Generates text: one prompt, a file of prompts, or a chat.

python infer/generate.py --prompt="Why is the sky blue?"
python infer/generate.py --prompt="Why is the sky blue?" --compare        # with and without speculation, and what it gained
python infer/generate.py --model=meta-llama/Llama-3.2-1B-Instruct --prompts=questions.jsonl --output=answers.jsonl --batch_size=8
python infer/generate.py                                  # a chat with the built-in model

A model that fits no single host: start the command on every host, with --mesh over all their devices. TPU pods and SLURM are
recognised, elsewhere --coordinator_address, --num_processes and --process_id say who is who. Process 0 prints and writes.
"""

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from rich.console import Console
from rich.progress import Progress

from eesd_jax import cli, files
from eesd_jax.config import DEFAULT_CONTROLLER
from eesd_jax.decode.controllers import PLAIN
from eesd_jax.engine import answer_file
from eesd_jax.engine.conversations import Options, answer_batch, check_prompts, places
from eesd_jax.engine.generation import Generation, Rounds
from eesd_jax.engine.prompts import Conversation, is_text, prompts_sha256, read_prompts
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
flags.DEFINE_string(
    "output",
    None,
    "File to write, one JSON object a turn. It appears when all are there; until then OUTPUT.partial keeps those that are, and the same "
    "command goes on behind them.",
)
flags.DEFINE_bool(
    "compare",
    False,
    "Answer --prompt with plain decoding too, and print both speeds (of short answers medians of three) and whether they are identical.",
)

Answers = answer_file.AnswerFile | answer_file.AnswerLines

# --compare times so many more answers of each decoder, if the first of each took less than so many seconds together.
MORE_PAIRS, SHORT = 2, 30.0
# Flags of this command that change no answer, or are told apart otherwise (prompts by their content).
NO_SETTINGS = ("prompt", "prompts", "stream", "output", "compare", "num_processes", "join_timeout")


def main(argv: Sequence[str]) -> None:
    del argv
    check_flags()
    conversations = None if FLAGS.prompts is None else read_prompts(FLAGS.prompts)
    given = cli.settings_from_flags(sys.modules[__name__])
    asked = {"prompts_sha256": prompts_sha256(conversations)} if conversations is not None else {}
    cli.start_distributed(given | asked)
    if cli.several_processes() and FLAGS.prompt is None and conversations is None:
        raise UserError("several processes are started without --prompt or --prompts; expected one of them: a chat is for one process")
    settings = {name.removeprefix("--"): value for name, value in given.items() if name.removeprefix("--") not in NO_SETTINGS} | asked
    with contextlib.ExitStack() as stack:
        if not cli.is_first():  # it computes its part, and keeps quiet
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        check_output(settings)
        engine = cli.load_from_flags()
        if conversations is not None:
            answer_prompts(engine, conversations, settings)
        elif FLAGS.compare:
            write_one(compare(engine, FLAGS.prompt))
        elif FLAGS.prompt is not None:
            write_one(show(engine, FLAGS.prompt, cli.controller_from_flags(engine, batch=1)))
        else:
            chat(engine, settings)


def check_flags() -> None:
    """Finds what is wrong with the flags before anything slow is started."""
    cli.check_generation_flags()
    if FLAGS.prompt is not None and FLAGS.prompts is not None:
        raise UserError(f"--prompt is {FLAGS.prompt!r} and --prompts is {FLAGS.prompts!r}; expected only one of them")
    if FLAGS.prompt is not None and not is_text(FLAGS.prompt):
        raise UserError(f"--prompt is {FLAGS.prompt!r}; expected a text that is not blank")
    if FLAGS.prompt is None and FLAGS.prompts is None and FLAGS.chat is False:
        raise UserError("--nochat is given without --prompt or --prompts; expected one of them, or a chat")
    if cli.stdout_is_closed() and not FLAGS.output:
        raise UserError("stdout is closed, and --output is not given; expected one of them, for the answers")
    if FLAGS.output and FLAGS.prompts and os.path.realpath(FLAGS.output) == os.path.realpath(FLAGS.prompts):
        raise UserError(f"--output is {FLAGS.output!r}, the file of prompts; expected another file")
    if FLAGS.compare:
        if FLAGS.prompt is None:
            raise UserError("--compare is given without --prompt; expected --prompt, whose answers it compares")
        if FLAGS.controller == PLAIN:
            raise UserError(f"--compare is given with --controller={PLAIN}; expected a controller that drafts")
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
    cli.note(
        f"[{len(generation.token_ids)} tokens in {generation.seconds:.2f} s, {generation.tokens_per_second:.1f} tokens/s{speculation}; "
        f"first token after {generation.first_token_seconds:.2f} s; ended by {generation.finish_reason}]"
    )
    return generation


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


def chat(engine: "Engine", settings: dict[str, Any]) -> None:
    """Reads messages from stdin and answers each with the conversation in view. However it ends, what was said is in --output."""
    if not engine.has_chat_template:
        raise UserError(f"model {FLAGS.model!r} has no chat template, so there can be no chat; expected --prompt or --prompts")
    cli.say(f"Chat with {FLAGS.model}. /reset starts again; /exit or end of input leaves.")
    sys.stdin.reconfigure(errors="surrogateescape")  # so that bytes which are no text come here and are named
    controller = cli.controller_from_flags(engine, batch=1)
    with open_answers(engine, settings) as answers:
        history: list[dict[str, str]] = []
        conversation = 1 + max((earlier for earlier, _ in answers.texts), default=0)
        if conversation > 1:
            cli.note(f"[{len(answers.texts)} answers of chats that were killed are kept; this one is chat-{conversation}]")
        while (message := next_message()) not in (None, "/exit"):
            if message == "/reset":
                history, conversation = [], conversation + 1
            elif message:
                question = {"role": "user", "content": message}
                try:
                    generation = show(engine, [*history, question], controller)
                except UserError as error:
                    cli.say(f"error: {error}; /reset starts again")
                    continue
                turn = len(history) // 2
                answers.add({(conversation, turn): answer_file.record(f"chat-{conversation}", turn, message, generation)})
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


def answer_prompts(engine: "Engine", conversations: list[Conversation], settings: dict[str, Any]) -> None:
    """Answers every turn of every conversation, a batch of conversations at a time; lines are written in the order of the file."""
    use_chat = engine.has_chat_template if FLAGS.chat is None else FLAGS.chat
    check_prompts(engine, conversations, use_chat, FLAGS.prompts)
    batch_size = min(FLAGS.batch_size, len(conversations))
    options = Options(cli.sampling_from_flags(), batch_size, FLAGS.seed, tuple(FLAGS.stop), use_chat)
    with open_answers(engine, settings, conversations) as answers:
        done = agreed(answers.texts)
        left, logs, started = places(conversations, done), [], time.perf_counter()
        if done and cli.is_first():
            cli.note(f"[goes on: {len(done)} of {len(done) + len(left)} turns are answered in {str(answers.partial)!r}]")
        controller = cli.controller_from_flags(engine, batch_size) if left else None
        # Lines that go to a terminal show themselves how far it is.
        hidden = not sys.stderr.isatty() or (not FLAGS.output and sys.stdout.isatty())
        with Progress(console=Console(stderr=True), redirect_stdout=False, transient=True, disable=hidden) as progress:
            task = progress.add_task("generating", total=len(done) + len(left), completed=len(done))
            for first in range(0, len(conversations), batch_size):
                batch = dict(list(enumerate(conversations))[first : first + batch_size])
                for found in answer_batch(engine, batch, done, options, controller, warn_of_line):
                    asked = {(index, turn): (batch[index].id, turn, batch[index].turns[turn]) for index, turn in found}
                    answers.add({place: answer_file.record(*asked[place], generation) for place, generation in found.items()})
                    logs += [generation.log for generation in found.values()]
                    progress.advance(task, len(found))
    seconds, rounds = time.perf_counter() - started, Rounds.join(logs)
    tokens = rounds.committed.sum()
    speculation = f"; {speculation_of(rounds)}" if controller is not None else ""
    cli.note(f"[{len(left)} turns, {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s{speculation}]")


def agreed(texts: dict[tuple[int, int], str | None]) -> dict[tuple[int, int], str | None]:
    """What is answered already, as the process that writes has it."""
    if not cli.several_processes():
        return texts
    from eesd_jax.cluster import processes

    return {(index, turn): text for (index, turn), text in processes.from_first(lambda: list(texts.items()))}


def warn_of_line(message: str) -> None:
    """One line about a conversation of the file, whose line it begins with."""
    if cli.is_first():
        cli.warn(f"prompt file {FLAGS.prompts!r}, {message}")


def check_output(settings: dict[str, Any]) -> None:
    """Finds before the model is loaded that --output cannot be written, or that answers of other settings are waiting there."""
    if FLAGS.output and cli.is_first():
        if FLAGS.prompt is None and files.is_plain(FLAGS.output):
            answer_file.check(FLAGS.output, settings)
        else:
            files.check_writable(FLAGS.output)


@contextlib.contextmanager
def open_answers(engine: "Engine", settings: dict[str, Any], conversations: Sequence[Conversation] = ()) -> Iterator[Answers]:
    """Where answers go: --output, or stdout for a prompt file without it, else nowhere.

    What is there when the block is interrupted is kept for the same command, and said; of a chat, which has no end, it is all.
    """
    from eesd_jax.engine.describe import describe_drafter

    is_chat, order = FLAGS.prompts is None, places(conversations)
    settings = settings | {"format_version": answer_file.FORMAT_VERSION}
    found = {"dtype": str(engine.model.params["final_norm"].dtype)} | describe_drafter(engine)
    settings = settings | {f"loaded {name}": value for name, value in found.items()}  # beside flags of the same name
    if not cli.is_first() or (is_chat and not FLAGS.output):
        answers = answer_file.AnswerLines()
    elif not FLAGS.output:
        answers = answer_file.AnswerLines(sys.stdout, "stdout", order)
    elif not files.is_plain(files.expand(FLAGS.output)):
        file = open(files.expand(FLAGS.output), "w", encoding="utf-8")  # noqa: SIM115  closed below
        try:
            yield answer_file.AnswerLines(file, repr(FLAGS.output), order)
        finally:
            with contextlib.suppress(OSError):  # every line is flushed; what could not be written has been said
                file.close()
        return
    else:
        answers = answer_file.AnswerFile(FLAGS.output, settings, order)
    try:
        yield answers
        answers.finish()
    except BaseException as error:
        if answers.texts and is_chat:
            answers.finish()
        elif answers.texts and isinstance(error, KeyboardInterrupt):
            cli.note(f"[{len(answers.texts)} of {len(order)} turns are kept in {str(answers.partial)!r}; the same command goes on]")
        raise
    finally:
        answers.close()


def write_one(generation: Generation) -> None:
    """The answer to --prompt in --output, if it is given."""
    if FLAGS.output and cli.is_first():
        with files.whole_file(FLAGS.output) as file:
            file.write(answer_file.to_text(answer_file.record("prompt", 0, FLAGS.prompt, generation)))


if __name__ == "__main__":
    cli.run(main)
