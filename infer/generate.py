"""Generates text: one prompt, a file of prompts, or a chat.

python infer/generate.py --prompt="Why is the sky blue?"
python infer/generate.py --model=meta-llama/Llama-3.2-1B-Instruct --prompts=questions.jsonl --output=answers.jsonl --batch_size=8
python infer/generate.py                                  # a chat with the built-in model
"""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from rich.progress import Progress

from eesd_jax import cli
from eesd_jax.engine import Engine, Generation, Messages
from eesd_jax.errors import UserError
from eesd_jax.prompts import Conversation, read_prompts

FLAGS = flags.FLAGS
cli.define_model_flags()
cli.define_generation_flags()
flags.DEFINE_string("prompt", None, "A single prompt. Without --prompt and --prompts, a chat is opened.")
flags.DEFINE_bool("stream", None, "Show text as it comes; default: if stdout is a terminal.")
flags.DEFINE_string("output", None, "File to write, one JSON object a turn.")


def main(argv: Sequence[str]) -> None:
    del argv
    cli.check_generation_flags()
    if FLAGS.prompt is not None and FLAGS.prompts is not None:
        raise UserError("--prompt and --prompts are both given; expected one of them")
    if FLAGS.prompt is not None and not FLAGS.prompt:
        raise UserError("--prompt is empty; expected some text")
    if FLAGS.prompts is not None:
        conversations = read_prompts(FLAGS.prompts)
        answer_file(cli.load_from_flags(), conversations)
    elif FLAGS.prompt is not None:
        answer_prompt(cli.load_from_flags(), FLAGS.prompt)
    else:
        chat(cli.load_from_flags())


def answer_prompt(engine: Engine, prompt: str) -> None:
    """Answers one prompt on stdout, streaming in a terminal."""
    with output_lines() as write:
        generation = show(engine, prompt)
        write(record("prompt", 0, prompt, generation))


def show(engine: Engine, prompt: str | Messages) -> Generation:
    """Generates on stdout, with one line of statistics on stderr."""
    stream = FLAGS.stream if FLAGS.stream is not None else sys.stdout.isatty()
    options = {"sampling": cli.sampling_from_flags(), "stop": FLAGS.stop, "chat": FLAGS.chat, "seed": FLAGS.seed}
    if stream:
        generation = yield_all(engine.stream(prompt, **options))
        print()
    else:
        generation = engine.generate(prompt, **options)
        print(generation.text, flush=True)
    print(statistics(generation), file=sys.stderr)
    return generation


def yield_all(pieces: Iterator[str]) -> Generation:
    """Prints the pieces as they come and returns what the stream returns at its end."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            return end.value


def statistics(generation: Generation) -> str:
    return (
        f"[{len(generation.token_ids)} tokens in {generation.seconds:.2f} s, {generation.tokens_per_second:.1f} tokens/s; "
        f"first token after {generation.first_token_seconds:.2f} s; ended by {generation.finish_reason}]"
    )


def chat(engine: Engine) -> None:
    """Reads messages from stdin and answers each with the conversation in view."""
    if FLAGS.chat is False or not engine.has_chat_template:
        raise UserError("a chat needs a model with a chat template, and --chat; for plain text give --prompt")
    print("Chat with the model. /reset starts again, /exit or end of input leaves.", file=sys.stderr)
    history: list[dict[str, str]] = []
    with output_lines() as write:
        for turn in itertools.count():
            try:
                message = input("> ").strip()
            except EOFError:
                return
            if message == "/exit":
                return
            if message == "/reset":
                history.clear()
            elif message:
                try:
                    generation = show(engine, [*history, {"role": "user", "content": message}])
                except UserError as error:
                    print(f"error: {error}; /reset starts again", file=sys.stderr)
                    continue
                history += [{"role": "user", "content": message}, {"role": "assistant", "content": generation.text}]
                write(record("chat", turn, message, generation))


def answer_file(engine: Engine, conversations: list[Conversation]) -> None:
    """Answers every turn of every conversation, a batch of conversations at a time; JSON lines on stdout where there is no --output."""
    turns = sum(len(conversation.turns) for conversation in conversations)
    use_chat = engine.has_chat_template if FLAGS.chat is None else FLAGS.chat
    tokens, seconds = 0, 0.0
    with output_lines() as write, Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("generating", total=turns)
        for first in range(0, len(conversations), FLAGS.batch_size):
            batch = list(enumerate(conversations))[first : first + FLAGS.batch_size]
            histories = {index: list(conversation.history) for index, conversation in batch}
            for turn in range(max(len(conversation.turns) for _, conversation in batch)):
                rows = [(index, conversation) for index, conversation in batch if turn < len(conversation.turns)]
                for index, conversation in rows:
                    histories[index].append({"role": "user", "content": conversation.turns[turn]})
                generations = engine.generate_batch(
                    [histories[index] if use_chat else plain_text(histories[index]) for index, _ in rows],
                    seeds=[FLAGS.seed + index for index, _ in rows],
                    chat=use_chat,
                    sampling=cli.sampling_from_flags(),
                    stop=FLAGS.stop,
                    batch_size=FLAGS.batch_size,
                )
                for (index, conversation), generation in zip(rows, generations, strict=True):
                    histories[index].append({"role": "assistant", "content": generation.text})
                    write(record(conversation.id, turn, conversation.turns[turn], generation))
                tokens += sum(len(generation.token_ids) for generation in generations)
                seconds += max(generation.seconds for generation in generations)
                progress.advance(task, len(rows))
    print(f"[{turns} turns, {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s]", file=sys.stderr)


def plain_text(history: list[dict[str, str]]) -> str:
    """A conversation without a chat template: its texts, one after the other."""
    return "\n".join(message["content"] for message in history)


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
        "drafted": 0,
        "accepted": 0,
        "tokens_per_round": len(generation.token_ids) / generation.rounds,
        "seconds": round(generation.seconds, 4),
        "finish_reason": generation.finish_reason,
    }


@contextlib.contextmanager
def output_lines() -> Iterator[Any]:
    """A function that writes one record: to --output, to stdout for a prompt file without it, else nowhere."""
    if FLAGS.output:
        with cli.whole_file(FLAGS.output) as file:
            yield lambda line: print(json.dumps(line, ensure_ascii=False), file=file)
    elif FLAGS.prompts:
        yield lambda line: print(json.dumps(line, ensure_ascii=False), flush=True)
    else:
        yield lambda line: None


if __name__ == "__main__":
    cli.run(main)
