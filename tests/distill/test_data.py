"""Input: datasets and chats, what is refused, packing, and batches that are the same for any number of processes."""

import json
import warnings

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny

from eesd_jax.config import DataConfig
from eesd_jax.distill import data, examples
from eesd_jax.errors import UserError
from eesd_jax.weights.branch_folder import config_hash

LENGTH = 48
CHATS = [
    [
        {"role": "user", "content": f"the quick brown fox {number}"},
        {"role": "assistant", "content": "jumps over"},
        {"role": "user", "content": "and then?"},
        {"role": "assistant", "content": f"the lazy dog {number}"},
    ]
    for number in range(12)
]


@pytest.fixture(scope="module")
def model():
    return tiny.loaded_model()


def random_example(rng, shortest=2, longest=60):
    tokens = rng.integers(3, 300, rng.integers(shortest, longest)).astype(np.int32)
    return data.Example(tokens, np.arange(len(tokens)) >= rng.integers(1, len(tokens)))


def rows_of(some, model, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return data.Rows(examples.Source("some", some, {}), DataConfig(sequence_length=LENGTH, **config), model)


@pytest.fixture(scope="module")
def some():
    rng = np.random.default_rng(0)
    return [random_example(rng) for _ in range(40)]


def provenance_of(model, **changes):
    return {
        "model": "tiny",
        "vocab_size": model.config.vocab_size,
        "tokenizer_hash": examples.tokenizer_hash(model.tokenizer),
        "target_config_hash": config_hash(model.config),
    } | changes


def write(folder, some, provenance, split="train"):
    records = (
        {"tokens": e.tokens, "response": e.response, "index": i, "temperature": 0.0, "prompt_id": str(i)} for i, e in enumerate(some)
    )
    examples.write_dataset(folder, {split: records}, provenance)
    return folder


def test_packing_puts_every_item_into_one_bin_and_overfills_none():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 101, 500)
    bins = data.pack(lengths, 100)
    assert sorted(item for items in bins for item in items) == list(range(500))
    loads = [lengths[items].sum() for items in bins]
    assert max(loads) <= 100
    # Best fit is never far from what the sum of lengths asks for.
    assert len(bins) <= 1.25 * np.ceil(lengths.sum() / 100)
    assert data.pack(lengths, 100) == bins
    assert data.pack(np.array([100, 50, 50, 100]), 100) == [[0], [3], [1, 2]]


def test_rows_hold_every_example_once_with_its_own_positions(some, model):
    rows = rows_of(some, model)
    found = []
    for index in range(len(rows)):
        row = rows[index]
        assert row.row == index
        assert {field.shape for field in row[:4]} == {(LENGTH,)}
        for segment in range(1, row.segments.max() + 1):
            (place,) = np.nonzero(row.segments == segment)
            assert np.array_equal(row.positions[place], np.arange(len(place)))
            assert np.array_equal(place, np.arange(place[0], place[0] + len(place)))
            found.append(tuple(row.tokens[place]))
        padding = row.segments == 0
        assert not row.tokens[padding].any()
        assert not row.loss_mask[padding].any()
    kept = [example for example in some if example.response[1:LENGTH].any()]
    assert sorted(found) == sorted(tuple(example.tokens[:LENGTH]) for example in kept)
    assert rows.num_tokens == sum(min(len(example.tokens), LENGTH) for example in kept)
    assert rows.num_dropped == len(some) - len(kept)
    assert len(rows) < len(some) / 1.3


@pytest.mark.parametrize("pack", [True, False])
def test_a_loss_is_taken_where_the_next_token_of_the_example_is_a_response(some, model, pack):
    rows = rows_of(some, model, pack=pack)
    by_tokens = {tuple(example.tokens[:LENGTH]): example for example in some}
    total = 0
    for row in rows:
        for t in range(LENGTH):
            same = t + 1 < LENGTH and row.segments[t] and row.segments[t + 1] == row.segments[t]
            if not same:
                assert not row.loss_mask[t]
                continue
            example = by_tokens[tuple(row.tokens[row.segments == row.segments[t]])]
            assert row.loss_mask[t] == example.response[row.positions[t] + 1]
            total += row.loss_mask[t]
    assert rows.num_response_tokens == total
    counts = data.token_counts(rows, model.config.vocab_size)
    assert counts.dtype == np.int64
    assert counts.shape == (model.config.vocab_size,)
    assert counts.sum() == total


def test_token_counts_are_of_response_tokens(model):
    rows = rows_of([data.Example(np.array([5, 6, 7, 7], np.int32), np.array([False, False, True, True]))], model)
    assert np.flatnonzero(data.token_counts(rows, 320)).tolist() == [7]
    assert data.token_counts(rows, 320)[7] == 2


def test_examples_whose_response_is_cut_away_are_left_out_with_a_warning(model):
    long = data.Example(np.full(LENGTH + 9, 5, np.int32), np.arange(LENGTH + 9) >= LENGTH)
    short = data.Example(np.array([4, 5], np.int32), np.array([False, True]))
    with pytest.warns(UserWarning, match=f"1 of 2 examples are left out.*first {LENGTH} tokens"):
        rows = data.Rows(examples.Source("some", [long, short], {}), DataConfig(sequence_length=LENGTH), model)
    assert (len(rows), rows.num_tokens, len(rows.examples)) == (1, 2, 2)
    assert rows.examples[1].prompt.tolist() == [4]


@pytest.mark.parametrize("pack", [True, False])
def test_global_batches_are_the_same_for_any_number_of_processes(some, model, pack):
    rows = rows_of(some, model, pack=pack)

    def batches(process_count, steps=12):
        loaders = [data.make_loader(rows, 4, 7, process, process_count) for process in range(process_count)]
        for _ in range(steps):
            parts = [next(loader) for loader in loaders]
            assert all(part.row.shape == (4 // process_count,) for part in parts)
            yield data.Batch(*(np.concatenate(field) for field in zip(*parts, strict=True)))

    one = list(batches(1))
    for count in (2, 4):
        for ours, theirs in zip(one, batches(count), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    seen = np.concatenate([batch.row for batch in one])
    first, second = seen[: len(rows)], seen[len(rows) : 2 * len(rows)]
    assert sorted(first) == list(range(len(rows)))
    if len(second) == len(rows):
        assert sorted(second) == list(range(len(rows)))
        assert first.tolist() != second.tolist()
    for batch in one:
        for i, row in enumerate(batch.row):
            assert np.array_equal(batch.tokens[i], rows[row].tokens[: batch.tokens.shape[1]])


def test_a_process_reads_only_its_own_rows(some, model, monkeypatch):
    monkeypatch.setattr(data, "_READING", grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    rows = rows_of(some, model, pack=False)
    read = []

    class Watched(data.Rows):
        def __init__(self):
            self.__dict__ = rows.__dict__

        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    loader = data.make_loader(Watched(), 8, 0, 1, 2)
    own = np.concatenate([next(loader).row for _ in range(3)])
    assert read == own.tolist()


def test_the_state_of_a_loader_is_its_place(some, model):
    rows = rows_of(some, model)
    loader = data.make_loader(rows, 4, 3, 0, 1)
    for _ in range(5):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    rest = [next(loader) for _ in range(9)]
    again = data.make_loader(rows, 4, 3, 0, 1)
    again.set_state(state)
    for ours in rest:
        assert all(np.array_equal(a, b) for a, b in zip(ours, next(again), strict=True))


def test_other_seeds_shuffle_otherwise_and_few_rows_are_repeated(some, model):
    rows = rows_of(some, model)
    first, second = (
        np.concatenate([next(loader).row for _ in range(3)]) for loader in (data.make_loader(rows, 8, s, 0, 1) for s in (0, 1))
    )
    assert first.tolist() != second.tolist()
    few = rows_of(some[:1] * 2, model, pack=False)
    assert sorted(next(data.make_loader(few, 4, 0, 0, 1)).row) == [0, 0, 1, 1]


def test_padded_batches_are_cut_to_what_the_global_batch_needs(model):
    short = [data.Example(np.full(9, 5, np.int32), np.arange(9) > 2)] * 4
    rows = rows_of(short, model, pack=False)
    assert next(data.make_loader(rows, 4, 0, 0, 2)).tokens.shape == (2, 12)  # a quarter of 48
    assert rows_of(short, model, pack=True)[0].tokens.shape == (LENGTH,)


def test_batch_sizes_that_cannot_be_divided_are_refused(some, model):
    rows = rows_of(some, model)
    with pytest.raises(UserError, match="batch_size is 6; expected a multiple of 4"):
        data.make_loader(rows, 6, 0, 0, 4)
    with pytest.raises(UserError, match="batch_size is 0"):
        data.make_loader(rows, 0, 0, 0, 1)
    with pytest.raises(UserError, match="no text to train on"):
        data.make_loader(rows_of([], model), 4, 0, 0, 1)


def test_a_dataset_is_read_back_and_by_tfds_alone(tmp_path, some, model):
    folder = write(tmp_path / "dataset", some, provenance_of(model))
    source = tfds.builder_from_directory(str(folder)).as_data_source("train")
    assert len(source) == len(some)
    assert all(np.array_equal(source[i]["tokens"], example.tokens) for i, example in enumerate(some))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rows = data.open_split(DataConfig(sequence_length=LENGTH), folder, "train", model)
        held_out = data.open_split(DataConfig(sequence_length=LENGTH), folder, "validation", model)
        first = data.open_split(DataConfig(sequence_length=LENGTH, max_examples=5), folder, "train", model)
    assert rows.provenance == provenance_of(model)
    assert rows.fingerprint == rows_of(some, model).fingerprint
    assert (len(held_out), len(held_out.examples), len(first.examples)) == (0, 0, 5)
    for ours, theirs in zip(some, rows.examples, strict=True):
        assert np.array_equal(ours.tokens, theirs.tokens)
        assert np.array_equal(ours.response, theirs.response)
        assert theirs.response.dtype == bool


def test_the_fingerprint_follows_content_and_packing(some, model):
    rows = rows_of(some, model)
    changed = [some[0]._replace(tokens=some[0].tokens + 1), *some[1:]]
    moved = [some[0]._replace(response=np.ones_like(some[0].response)), *some[1:]]
    others = [rows_of(changed, model), rows_of(moved, model), rows_of(some[1:], model), rows_of(some, model, pack=False)]
    assert len({rows.fingerprint, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 999}, r"a vocabulary of 999 tokens; expected 320.*an example is '"),
        ({"tokenizer_hash": "0"}, r"another tokenizer.*an example is '"),
    ],
)
def test_a_dataset_of_another_vocabulary_is_refused(tmp_path, some, model, changes, message):
    folder = write(tmp_path / "dataset", some, provenance_of(model, **changes))
    with pytest.raises(UserError, match=message):
        data.open_split(DataConfig(), folder, "train", model)


def test_a_dataset_of_another_model_is_warned_of(tmp_path, some, model):
    folder = write(tmp_path / "dataset", some, provenance_of(model, target_config_hash="0"))
    with pytest.warns(UserWarning, match="written by model 'tiny', which has another shape"):
        data.open_split(DataConfig(sequence_length=80), folder, "train", model)


@pytest.mark.parametrize(
    ("tokens", "response", "message"),
    [
        ([70, 320, 71], [0, 1, 1], r"example 1: token id 320 is outside the vocabulary; expected 0 to 319; it reads '"),
        ([70, -1, 71], [0, 1, 1], r"token id -1 is outside the vocabulary"),
        ([70, 71, 72], [0, 0, 0], r"example 1: its response mask is empty.*it reads '"),
    ],
)
def test_an_example_that_cannot_be_trained_on_is_shown(tmp_path, some, model, tokens, response, message):
    bad = data.Example(np.array(tokens, np.int32), np.array(response, bool))
    folder = write(tmp_path / "dataset", [some[0], bad], provenance_of(model))
    with pytest.raises(UserError, match=message) as error:
        data.open_split(DataConfig(), folder, "train", model)
    assert repr(model.tokenizer.decode([70]))[1:-1] in str(error.value)


def test_what_is_no_dataset_is_refused(tmp_path, some, model):
    with pytest.raises(UserError, match=r"no such folder; expected one that train/self_generate\.py has written"):
        data.open_split(DataConfig(), tmp_path / "nothing", "train", model)
    with pytest.raises(UserError, match="this folder holds no dataset"):
        data.open_split(DataConfig(path=str(tmp_path)), "unused", "train", model)
    folder = write(tmp_path / "dataset", some, provenance_of(model))
    (folder / "metadata.json").unlink()
    with pytest.raises(UserError, match=r"was not written by train/self_generate\.py"):
        data.open_split(DataConfig(), folder, "train", model)
    for file in folder.glob("*array_record*"):
        file.write_bytes(b"")
    (folder / "metadata.json").write_text(json.dumps({"provenance": provenance_of(model)}))
    with pytest.raises(UserError, match="cannot be read"):
        data.open_split(DataConfig(), folder, "train", model)
    (folder / "features.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        data.open_split(DataConfig(), folder, "train", model)
    with pytest.raises(UserError, match="sequence_length is 1"):
        data.open_split(DataConfig(sequence_length=1, path=str(write_chats(tmp_path / "chats.jsonl", CHATS))), "", "train", model)
    with pytest.raises(UserError, match="validation_share is 1"):
        data.open_split(DataConfig(validation_share=1.0), folder, "train", model)


def write_chats(path, chats):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path


def test_chats_are_masked_where_the_assistant_speaks(tmp_path, model):
    path = write_chats(tmp_path / "chats.jsonl", CHATS)
    config = DataConfig(path=str(path), sequence_length=200, validation_share=0.25)
    train, held_out = (data.open_split(config, "unused", split, model) for split in ("train", "validation"))
    assert len(train.examples) + len(held_out.examples) == len(CHATS)
    assert len(held_out.examples) >= 1
    everyone = [*train.examples, *held_out.examples]
    texts = {model.tokenizer.decode(example.tokens): example for example in everyone}
    for number, messages in enumerate(CHATS):
        # The template as a whole, and of the second turn the prompt just as the model is given it when it generates.
        example = texts[model.tokenizer.apply_chat_template(messages, tokenize=False)]
        written = model.tokenizer.decode(example.tokens[example.response])
        assert written == f"jumps over{tiny.TURN_END}the lazy dog {number}{tiny.TURN_END}"
        prompt = model.tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        assert example.prompt.tolist() == model.tokenizer(prompt, add_special_tokens=False).input_ids


def test_the_validation_split_follows_the_prompt_alone(model):
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 300, 9).tolist() for _ in range(2000)]
    share = np.mean([examples.held_out(prompt, 0.1) for prompt in prompts])
    assert 0.07 < share < 0.13
    assert examples.assign_splits(prompts, 0.1) == [examples.SPLITS[examples.held_out(prompt, 0.1)] for prompt in prompts]
    # Neither split is empty where there is a share of each, and a prompt that comes twice is on one side.
    assert sorted(examples.assign_splits(prompts[:2] * 2, 1e-6)) == ["train", "train", "validation", "validation"]
    assert set(examples.assign_splits(prompts[:2], 1 - 1e-6)) == {"train", "validation"}
    assert examples.assign_splits(prompts[:1], 0.5) == [examples.SPLITS[examples.held_out(prompts[0], 0.5)]]
    assert set(examples.assign_splits(prompts, 0.0)) == {"train"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "is empty"),
        ("{", "line 1: not valid JSON"),
        ("[]", "line 1: no messages"),
        ('{"messages": []}', "line 1: no messages"),
        ('{"messages": [{"role": "user"}]}', "line 1: a message is"),
        ('{"messages": [{"role": "user", "content": "hello there"}]}', "response mask is empty; it reads 'hello there'"),
    ],
)
def test_lines_that_are_no_chats_are_refused(tmp_path, model, line, message):
    path = tmp_path / "chats.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=message):
        data.open_split(DataConfig(path=str(path)), "unused", "train", model)


def test_chats_need_a_template(tmp_path, model):
    path = write_chats(tmp_path / "chats.jsonl", CHATS)
    plain = type(model.tokenizer)(tokenizer_object=model.tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="need a chat template"):
        data.open_split(DataConfig(path=str(path)), "unused", "train", model._replace(tokenizer=plain))
