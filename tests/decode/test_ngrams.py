"""Drafts from a table of n-grams: what is counted, what is foretold, the text that comes out, and the file."""

import collections

import commands
import experiments
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

import eesd_jax
from eesd_jax.config import DecodeConfig, DraftConfig
from eesd_jax.decode.controllers import Calibration
from eesd_jax.decode.sources import ngrams
from eesd_jax.decode.sources.bandit import Arms
from eesd_jax.decode.sources.lookup import Lookup
from eesd_jax.distill import examples
from eesd_jax.engine.drafter import Drafter
from eesd_jax.engine.engine import Engine
from eesd_jax.errors import UserError
from eesd_jax.weights import ngram_file
from eesd_jax.weights.load import load_text

RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(0, 9, size=size).tolist() for size in (0, 1, 2, 5, 300, 300)]
ROOMY = 2**16  # so large that no n-gram is lost


def by_hand(texts: list[list[int]], ends: list[int]) -> tuple[int, float, int]:
    """What follows the longest n-gram at the end that was seen, how often of all times (one more), and its order."""
    for order in range(min(ngrams.ORDER, len(ends)), 0, -1):
        seen = collections.Counter()
        for text in texts:
            seen.update(text[i + order] for i in range(len(text) - order) if text[i : i + order] == ends[-order:])
        if seen:
            token = min(seen, key=lambda token: (-seen[token], token))
            return token, seen[token] / (seen.total() + 1), order
    return 0, 0.0, 0


def drafts_by_hand(texts: list[list[int]], text: list[int], most: int) -> list[int]:
    sure, drafts = 1.0, []
    while len(drafts) < most:
        token, here, _ = by_hand(texts, text + drafts)
        sure *= max(1, round(15 * here)) / 15 if here else 0
        if sure < 0.15:
            break
        drafts.append(token)
    return drafts


@pytest.mark.parametrize("max_draft", [2, 6])
def test_drafts_are_what_counting_by_hand_gives(max_draft):
    entries = ngrams.build(TEXTS, ROOMY)
    texts = [RNG.integers(0, 11, size=size).tolist() for size in [1, 2, 3] * 5 + [12] * 60]
    padded = np.array([text + [1] * (16 - len(text)) for text in texts], np.int32)  # what lies behind is garbage
    found = jax.jit(ngrams.look_up, static_argnums=3)(entries, padded, np.array([len(text) for text in texts], np.int32), max_draft)
    assert found.tokens.shape == (len(texts), max_draft)
    counts = set()
    for i, text in enumerate(texts):
        drafts = drafts_by_hand(TEXTS, text, min(max_draft, 4))
        assert found.tokens[i, : found.count[i]].tolist() == drafts
        if drafts:
            np.testing.assert_allclose(found.chance[i, 0], ngrams._TRUST * max(1, round(15 * by_hand(TEXTS, text)[1])) / 15, rtol=1e-6)
        counts.add(len(drafts))
    assert {0, 1, 2} <= counts


def test_the_order_of_the_texts_does_not_matter():
    np.testing.assert_array_equal(ngrams.build(TEXTS, ROOMY), ngrams.build(TEXTS[::-1], ROOMY))
    np.testing.assert_array_equal(ngrams.build(TEXTS, 64), ngrams.build(TEXTS[::-1], 64))


def test_a_small_table_keeps_what_is_right_most_often():
    often, seldom = [[1, 2]] * 50, [[token, 3] for token in range(100, 900)]
    entries = ngrams.build(seldom + often, 64)
    assert np.count_nonzero(entries) > 48
    found = ngrams.look_up(entries, jnp.array([[7, 1]]), jnp.array([2]), 1)
    assert (found.tokens[0, 0], found.count[0]) == (2, 1)


def test_an_empty_table_knows_nothing():
    found = ngrams.look_up(ngrams.build([], 16), jnp.array([[7, 0]]), jnp.array([2]), 3)
    assert found.count[0] == 0


def test_share_of_foretold_tokens():
    entries, texts = ngrams.build(TEXTS, ROOMY), TEXTS[3:]
    right = [by_hand(TEXTS, text[:i])[0] == text[i] for text in texts for i in range(1, len(text))]
    assert ngrams.foretold(entries, texts) == pytest.approx(np.mean(right))
    assert ngrams.foretold(entries, [[5]]) == 0


def test_of_text_and_table_the_more_promising_is_taken():
    entries = ngrams.build([[1, 2]] * 9, 64)  # 2 follows 1 in 9 of 10 cases
    text = jnp.array([[4, 1]] * 4)
    found = Lookup(jnp.full((4, 2), 8), jnp.array([2, 2, 1, 0]), jnp.array([[0.6, 0.9], [0.2, 0.9], [0.5, 0.9], [0.9, 0.9]]))
    filled = ngrams.fill_in(found, entries, text, jnp.full(4, 2))
    assert filled.tokens[:, 0].tolist() == [8, 2, 2, 2]
    assert filled.count.tolist() == [2, 1, 1, 1]
    np.testing.assert_allclose(filled.chance[:, 0], [0.6, *[ngrams._TRUST * 14 / 15] * 3], rtol=1e-6)
    unknown = ngrams.fill_in(found, entries, text.at[:, 1].set(6), jnp.full(4, 2))
    assert unknown.count.tolist() == found.count.tolist()
    np.testing.assert_array_equal(unknown.tokens, found.tokens)


def test_greedy_text_is_that_of_plain_decoding():
    model = tiny.loaded_model()._replace(eos_ids=())
    options = DecodeConfig(max_new_tokens=24, prompt_buckets=(16,), min_capacity=32)
    prompts = [[5, 9, 200, 31], [7, 7], [11, 12, 13], [250, 3]]
    plain = [text.token_ids for text in Engine(model, options).generate_ids(prompts, seeds=[0] * 4, controller=None)]
    draft = DraftConfig(0, 3, (2,), longest_match=2)
    # Half of it right: the model's own answers, and noise.
    known = [*plain[:2], RNG.integers(0, 300, size=400).tolist()]
    lm = Engine(model, options, Drafter(None, draft, Calibration(), trained=False, ngrams=ngrams.build(known, ROOMY)))
    prior = {"prior_alpha": 1.0, "prior_beta": 1.0, "discount": 1.0, "idle_discount": 1.0}
    arms = Arms(None, exit_cost=(1.0,) * 4, look_cost=(1.0, 1.01, 1.02, 1.03), **prior)
    generations = lm.generate_ids(prompts, seeds=[0] * 4, controller=arms)
    assert [text.token_ids for text in generations] == plain
    # Texts that it knows take few rounds from the first token on.
    without = Engine(model, options, lm.drafter._replace(ngrams=None))
    same = Arms(None, exit_cost=(1.0,) * 4, look_cost=(1.0, 1.01, 1.02, 1.03), **prior)
    before = without.generate_ids(prompts[:2], seeds=[0] * 2, controller=same)
    assert sum(text.rounds for text in generations[:2]) < sum(text.rounds for text in before)


def test_a_file_gives_back_the_table(tmp_path):
    entries = ngrams.build(TEXTS, 64)
    ngram_file.save_ngrams(tmp_path / "new" / "ngrams.safetensors", entries, 320, {"tokens": "608"})
    np.testing.assert_array_equal(ngram_file.load_ngrams(tmp_path / "new" / "ngrams.safetensors").entries, entries)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["ngrams.safetensors"]


def test_files_that_are_no_tables_of_this_model(tmp_path):
    path = tmp_path / "ngrams.safetensors"
    with pytest.raises(UserError, match="no such file; expected one that train"):
        ngram_file.load_ngrams(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot be read"):
        ngram_file.load_ngrams(path)
    save_file({"other": np.zeros(4)}, path)
    with pytest.raises(UserError, match="cannot be read"):
        ngram_file.load_ngrams(path)
    ngram_file.save_ngrams(path, np.zeros(48, np.uint32), 320, {})
    with pytest.raises(UserError, match="is no n-gram table"):
        ngram_file.load_ngrams(path)
    ngram_file.save_ngrams(path, np.zeros(64, np.uint32), 320, {})
    with pytest.raises(UserError, match="of text in 320 tokens, and the model has 321"):
        ngram_file.check_ngrams(ngram_file.load_ngrams(path), 321)


def test_loading_a_model_with_a_table(tmp_path):
    path = tmp_path / "ngrams.safetensors"
    vocab_size = eesd_jax.load("tiny", exit_branch="none", ngrams="none").model.config.vocab_size
    ngram_file.save_ngrams(path, ngrams.build(TEXTS, 64), vocab_size, {})
    lm = eesd_jax.load("tiny", exit_branch="none", ngrams=str(path))
    np.testing.assert_array_equal(lm.drafter.ngrams, ngrams.build(TEXTS, 64))
    assert eesd_jax.load("tiny", exit_branch="none", ngrams=str(path), arms=["exit"]).drafter is None
    greedy = lm.generate("hello", chat=False, max_new_tokens=12, controller="fixed:2")
    assert greedy.token_ids == lm.generate("hello", chat=False, max_new_tokens=12, controller="plain").token_ids
    assert greedy.drafted > 0


def test_the_command_counts_what_the_model_wrote(tmp_path):
    dataset = experiments.write_dataset(tmp_path / "dataset")
    config = f"--config={commands.ROOT / 'configs' / 'tiny.py'}", f"--config.output_dir={tmp_path / 'run'}", f"--config.data.path={dataset}"
    with commands.loaded("train/ngrams.py") as command:
        result = commands.run(command, *config, "--entries_log2=14")
        assert (result.code, result.err) == (0, "")
        assert commands.run(command, *config, "--entries_log2=0").code == 2
    model = load_text("tiny")
    texts = [example.tokens[example.response].tolist() for example in examples.open_source(dataset, "train", model, 0).examples]
    table = ngram_file.load_ngrams(tmp_path / "run" / "ngrams.safetensors")
    ngram_file.check_ngrams(table, model.config.vocab_size)
    entries = table.entries
    np.testing.assert_array_equal(entries, ngrams.build(texts, 2**14))
    assert f"{np.count_nonzero(entries)} n-grams of {sum(map(len, texts))} tokens in 40 responses are in" in result.out
    assert "of held-out tokens they foretell 0." in result.out
