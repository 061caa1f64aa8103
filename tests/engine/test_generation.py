"""What rounds did: cutting them where the text was cut, and statistics, against examples worked by hand."""

import json

import numpy as np
import pytest

from eesd_jax.engine.generation import Generation, Rounds

#   round      0  1  2  3
DRAFTED = (3, 2, 0, 4)
ACCEPTED = (3, 1, 0, 2)
COMMITTED = (4, 2, 1, 3)
ALPHA = (6.0, 7.0, 6.5, 6.5)  # of ten pseudo-counts
TOTAL = sum(COMMITTED)


def rounds(drafted=DRAFTED, accepted=ACCEPTED, committed=COMMITTED, alpha=ALPHA) -> Rounds:
    alpha = np.array(alpha)
    return Rounds(np.array(drafted), np.array(accepted), np.array(committed), alpha, 10 - alpha)


def columns(log: Rounds) -> list[list]:
    return [log.drafted.tolist(), log.accepted.tolist(), log.committed.tolist(), log.alpha.tolist(), log.beta.tolist()]


@pytest.mark.parametrize(
    ("num_tokens", "accepted", "committed", "tested"),
    [
        (10, (3, 1, 0, 2), (4, 2, 1, 3), (3, 2, 0, 4)),  # all of it
        (9, (3, 1, 0, 2), (4, 2, 1, 2), (3, 2, 0, 2)),  # ends with the last accepted draft: those behind it were not tested
        (8, (3, 1, 0, 1), (4, 2, 1, 1), (3, 2, 0, 1)),  # ends within the accepted drafts
        (7, (3, 1, 0), (4, 2, 1), (3, 2, 0)),  # ends between two rounds
        (6, (3, 1), (4, 2), (3, 2)),  # ends with the target's own token: the rejected draft before it counts
        (5, (3, 1), (4, 1), (3, 1)),
        (4, (3,), (4,), (3,)),
        (1, (1,), (1,), (1,)),
        (0, (), (), ()),
    ],
)
def test_cut_leaves_the_rounds_that_gave_the_tokens(num_tokens, accepted, committed, tested):
    cut = rounds().cut(num_tokens)
    size = len(accepted)
    assert columns(cut) == [
        list(DRAFTED[:size]),
        list(accepted),
        list(committed),
        list(ALPHA[:size]),
        [10 - alpha for alpha in ALPHA[:size]],
    ]
    assert cut.committed.sum() == num_tokens
    assert cut.tested.tolist() == list(tested)


def test_cut_changes_nothing_in_what_was_cut():
    log = rounds()
    log.cut(5)
    assert columns(log) == columns(rounds())


@pytest.mark.parametrize("num_tokens", range(TOTAL + 1))
def test_cutting_twice_is_cutting_once(num_tokens):
    for first in range(num_tokens, TOTAL + 1):
        assert columns(rounds().cut(first).cut(num_tokens)) == columns(rounds().cut(num_tokens))


def test_a_text_that_ends_with_an_accepted_draft_leaves_those_behind_it_out():
    # EOS was the second of five drafts: the loop itself logged two accepted and two committed.
    log = rounds((5,), (2,), (2,), (5.0,))
    assert log.tested.tolist() == [2]
    assert log.acceptance_by_position().tolist() == [1.0, 1.0]


def test_acceptance_by_position_is_the_share_of_those_tested_there():
    # Place 1: tested in rounds 0, 1, 3, accepted in all. Place 2: in the same, accepted in 0 and 3. Place 3: in 0 and 3, accepted in 0.
    # Place 4: in 3, and not accepted.
    assert rounds().acceptance_by_position() == pytest.approx([1, 2 / 3, 1 / 2, 0])


def test_accepted_lengths_count_every_round():
    assert rounds().accepted_lengths().tolist() == [1, 1, 1, 1]
    assert rounds().accepted_lengths().sum() == len(DRAFTED)
    assert rounds().cut(5).accepted_lengths().tolist() == [0, 1, 0, 1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("log", [Rounds.plain(0), rounds().cut(0), Rounds.join([])], ids=["plain", "cut", "joined"])
def test_no_rounds_have_no_statistics(log):
    assert columns(log) == [[], [], [], [], []]
    assert log.acceptance_by_position().tolist() == []
    assert log.accepted_lengths().sum() == 0
    assert log.cut(0).tested.tolist() == []


@pytest.mark.filterwarnings("error")
def test_plain_decoding_is_a_round_a_token():
    log = Rounds.plain(3)
    assert columns(log)[:3] == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert np.isnan(log.mean).all()
    assert log.acceptance_by_position().tolist() == []
    assert log.accepted_lengths().tolist() == [3]


def test_joined_statistics_are_those_of_all_rows():
    parts = [rounds().cut(5), Rounds.plain(2), rounds((1,), (0,), (1,), (5.0,))]
    joined = Rounds.join(parts)
    assert joined.committed.sum() == sum(part.committed.sum() for part in parts)
    assert joined.tested.tolist() == [value for part in parts for value in part.tested.tolist()]
    assert joined.acceptance_by_position() == pytest.approx([2 / 3, 1, 1])


def test_rounds_survive_json():
    for log in (rounds(), Rounds.plain(2), Rounds.plain(0)):
        again = Rounds.from_json(json.loads(json.dumps(log.to_json(), allow_nan=False)))
        np.testing.assert_equal(columns(again), columns(log))


def test_the_posterior_of_a_round_has_a_mean_and_a_band():
    log = Rounds(*np.array([[1, 1, 0], [1, 0, 0], [2, 1, 1]]), alpha=np.array([1.0, 30.0, np.nan]), beta=np.array([1.0, 10.0, np.nan]))
    np.testing.assert_allclose(log.mean, [0.5, 0.75, np.nan])
    low, high = log.interval(0.8)
    np.testing.assert_allclose(high - low, [0.8, 0.1738, np.nan], atol=1e-3)
    assert low[1] < 0.75 < high[1]


def test_a_generation_counts_after_truncation():
    generation = Generation("text", list(range(8)), 5, "stop", rounds().cut(8), seconds=2.0, first_token_seconds=0.5)
    assert (generation.rounds, generation.drafted, generation.accepted) == (4, 6, 5)
    assert generation.tokens_per_round == 8 / 4
    assert generation.tokens_per_second == 4


def test_a_generation_of_nothing_has_no_tokens_per_round():
    generation = Generation("", [], 0, "length", Rounds.plain(0), seconds=0.0, first_token_seconds=0.0)
    assert (generation.rounds, generation.drafted, generation.accepted, generation.tokens_per_round) == (0, 0, 0, 0.0)
