"""Results of a benchmark from runs made up by hand: totals, scores, comparison with plain decoding, tables and plots."""

import json
import math

import numpy as np
import pytest

from eesd_jax.bench import plots, report
from eesd_jax.bench.record import Answer, Costs, Divergence, Run
from eesd_jax.engine.generation import Rounds

COSTS = Costs(plain=1.0, rounds=(1.25, 1.5, 2.0, 3.0))
CONTRACT = [
    *("controller", "arms", "category", "temperature", "batch_size", "tokens_per_second", "speedup"),
    *("tokens_per_round", "acceptance_rate", "mean_draft_length", "identical_to_plain"),
]
PNG = b"\x89PNG\r\n\x1a\n"


def speculative(drafted, accepted, committed=None, mean=math.nan, identity="a") -> Answer:
    committed = [count + 1 for count in accepted] if committed is None else committed
    alpha = np.full(len(drafted), 10 * mean)
    log = Rounds(np.array(drafted), np.array(accepted), np.array(committed), alpha, 10 - alpha)
    return Answer(identity, list(range(sum(committed))), "text", "length", log)


def plain(num_tokens, identity="a") -> Answer:
    return Answer(identity, list(range(num_tokens)), "text", "length", Rounds.plain(num_tokens))


def run(controller, seconds, *answers, category="writing", batch=0, turn=0) -> Run:
    return Run(batch, turn, controller, category, seconds, list(answers))


@pytest.fixture
def runs() -> list[Run]:
    """Two prompts of two categories, 6 and 4 tokens."""
    return [
        run("beta", 2.0, speculative([2, 3], [2, 2], mean=0.7)),
        run("plain", 3.0, plain(6)),
        run("plain", 1.0, plain(4, "b"), category="maths", batch=1),
        run("beta", 3.0, speculative([1, 3, 0], [0, 1, 0], mean=0.5, identity="b"), category="maths", batch=1),
    ]


def rows_of(runs, divergences=(), costs=COSTS, temperature=0.0, batch_size=1) -> dict[tuple[str, str], dict]:
    rows = report.result_rows(runs, divergences, costs, arms="exit", temperature=temperature, batch_size=batch_size)
    return {(row["controller"], row["category"]): row for row in rows}


def results_of(runs, divergences=(), costs=COSTS, temperature=0.0) -> dict:
    return {
        "machine": {"device": "cpu", "devices": 1, "cpu": "Some | CPU", "cores": 2, "jax": "0", "dtype": "float32", "reads_codes": False},
        "model": "tiny",
        "settings": {"temperature": temperature, "batch_size": 1, "max_new_tokens": 6, "prompts": "p.jsonl", "conversations": 2}
        | {"ignore_eos": False},
        "notes": ["A note."],
        "costs": costs and costs._asdict(),
        "rows": report.result_rows(runs, divergences, costs, arms="exit", temperature=temperature, batch_size=1),
        "divergences": [vars(divergence) for divergence in divergences],
    }


def tables(markdown: str) -> list[list[list[str]]]:
    """Cells of every table, header first; checks that each is a Markdown table."""
    found, lines = [], markdown.splitlines()
    for i, line in enumerate(lines):
        if not line.startswith("|"):
            continue
        assert line.endswith("|")
        if not lines[i - 1].startswith("|"):
            found.append([])
            rule = lines[i + 1].strip("|").split("|")
            assert all(set(cell) <= set("-:") and len(cell) > 2 for cell in rule)
        found[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
        assert len(found[-1][-1]) == len(found[-1][0]) or set(line) <= set("|-:")
    return [[table[0], *table[2:]] for table in found]


def test_rows_are_one_a_controller_and_category_with_the_fields_of_the_contract(runs):
    rows = rows_of(runs)
    assert list(rows) == [(name, category) for category in ("writing", "maths", "all") for name in ("plain", "beta")]
    assert all(set(CONTRACT) <= set(row) for row in rows.values())
    assert {row["arms"] for (name, _), row in rows.items() if name == "plain"} == {"none"}
    assert {row["arms"] for (name, _), row in rows.items() if name == "beta"} == {"exit"}


def test_the_row_of_all_is_total_tokens_over_total_seconds(runs):
    rows = rows_of(runs)
    assert rows["beta", "writing"]["tokens_per_second"] == 6 / 2
    assert rows["beta", "writing"]["speedup"] == (6 / 2) / (6 / 3)
    assert rows["beta", "maths"]["speedup"] == pytest.approx((4 / 3) / (4 / 1), abs=1e-4)
    assert rows["beta", "all"]["tokens_per_second"] == 10 / 5
    assert rows["beta", "all"]["speedup"] == pytest.approx((10 / 5) / (10 / 4), abs=1e-4)
    assert {rows["plain", category]["speedup"] for category in ("writing", "maths", "all")} == {1.0}


def test_statistics_of_a_row(runs):
    row = rows_of(runs)["beta", "all"]
    assert (row["answers"], row["tokens"], row["rounds"], row["drafted"], row["accepted"]) == (2, 10, 5, 9, 5)
    assert row["tokens_per_round"] == 2.0
    assert row["acceptance_rate"] == pytest.approx(5 / 9, abs=1e-4)
    assert row["mean_draft_length"] == 9 / 5
    assert row["accepted_lengths"] == [2, 1, 2]
    assert row["acceptance_by_position"] == pytest.approx([3 / 4, 2 / 3, 0], abs=1e-4)
    plain_row = rows_of(runs)["plain", "all"]
    assert (plain_row["acceptance_rate"], plain_row["mean_draft_length"], plain_row["tokens_per_round"]) == (None, 0, 1)


def test_the_score_prices_the_logged_rounds(runs):
    rows = rows_of(runs)
    assert rows["beta", "writing"]["scored_speedup"] == pytest.approx(6 / (2 + 3), abs=1e-4)
    assert rows["beta", "maths"]["scored_speedup"] == pytest.approx(4 / (1.5 + 3 + 1.25), abs=1e-4)
    assert rows["beta", "all"]["scored_speedup"] == pytest.approx(10 / (5 + 5.75), abs=1e-4)
    # Stopping before what was rejected: 2 and 2 drafts; 0, 1 and 0.
    assert rows["beta", "writing"]["clairvoyant_speedup"] == pytest.approx(6 / (2 + 2), abs=1e-4)
    assert rows["beta", "maths"]["clairvoyant_speedup"] == pytest.approx(4 / (1.25 + 1.5 + 1.25), abs=1e-4)
    assert {row["scored_speedup"] for (name, _), row in rows.items() if name == "plain"} == {1.0}


def test_the_score_does_not_depend_on_the_clock(runs):
    slower = [Run(r.batch, r.turn, r.controller, r.category, r.seconds * (i + 1), r.answers) for i, r in enumerate(runs)]
    for key, row in rows_of(runs).items():
        assert row["scored_speedup"] == rows_of(slower)[key]["scored_speedup"]


def test_a_round_of_a_batch_costs_its_longest_row():
    # Rounds: (2, 0), (1, 3), and one in which only the first row still runs.
    batch = run("beta", 1.0, speculative([2, 1, 1], [0, 1, 1]), speculative([0, 3], [0, 0], identity="b"))
    assert report.scored_seconds(batch, COSTS) == 2.0 + 3.0 + 1.5
    beside = run("plain", 1.0, plain(5), plain(2, "b"))
    assert report.scored_seconds(beside, COSTS) == 5.0
    row = rows_of([batch, beside], batch_size=2)["beta", "all"]
    assert row["scored_speedup"] == pytest.approx((7 / 6.5) / (7 / 5), abs=1e-4)
    assert row["tokens_per_round"] == 7 / 5


def test_without_costs_there_is_no_score():
    rows = rows_of([run("plain", 1.0, plain(3))], costs=None)
    assert {(row["scored_speedup"], row["clairvoyant_speedup"]) for row in rows.values()} == {(None, None)}


def test_divergences_are_counted_where_they_are(runs):
    found = [Divergence("beta", "writing", "a", 0, 3, 0.0004, True), Divergence("beta", "maths", "b", 1, 0, 2.5, False)]
    rows = rows_of(runs, found)
    counts = {key: (row["identical_to_plain"], row["identical"], row["excused"], row["different"]) for key, row in rows.items()}
    assert counts["beta", "writing"] == (False, 0, 1, 0)
    assert counts["beta", "maths"] == (False, 0, 0, 1)
    assert counts["beta", "all"] == (False, 0, 1, 1)
    assert counts["plain", "all"] == (True, 2, 0, 0)
    assert rows["beta", "all"]["divergence_gaps"] == [0.0004, 2.5]


def test_in_sampling_nothing_is_said_of_identity(runs):
    for row in rows_of(runs, temperature=0.7).values():
        assert (row["identical_to_plain"], row["identical"], row["excused"], row["different"]) == (None,) * 4


def test_runs_survive_json(runs):
    again = [Run.from_json(json.loads(json.dumps(run.to_json(), allow_nan=False))) for run in runs]
    assert rows_of(again) == rows_of(runs)


def test_results_are_json_without_nan(runs):
    found = [Divergence("beta", "maths", "b", 1, 0, 2.5, False)]
    for results in (results_of(runs, found), results_of(runs), results_of(runs[1:3], costs=None)):
        assert json.loads(report.to_text(results), parse_constant=pytest.fail) == json.loads(json.dumps(results))


def test_tables_say_what_the_rows_say(runs):
    found = [Divergence("beta", "maths", "b|1", 1, 7, 2.5, False), Divergence("beta", "writing", "a", 0, 3, 0.0004, True)]
    results = results_of(runs, found)
    markdown = report.to_markdown(results)
    everything, speedups, scores, tokens, shares, places = tables(markdown)
    assert [line[0] for line in everything[1:]] == ["plain", "beta"]
    assert dict(zip(*everything[::2], strict=True)) | {"speed-up": "0.80", "scored": "0.93", "tokens/round": "2.00"} == dict(
        zip(*everything[::2], strict=True)
    )
    assert everything[2][-1] == "0 / 1 / 1"
    assert speedups == [["controller", "writing", "maths", "all"], ["plain", "1.00", "1.00", "1.00"], ["beta", "1.50", "0.33", "0.80"]]
    assert scores[2] == ["beta", "1.20", "0.70", "0.93"]
    assert tokens[2] == ["beta", "3.00", "1.33", "2.00"]
    assert shares[1:] == [["beta", "100.0%", "0.0004", "1.3", "2.5"]]
    assert places[1:] == [["beta", "b\\|1", "1", "7", "2.5", "no"], ["beta", "a", "0", "3", "0.0004", "yes"]]
    assert "A note." in markdown
    assert report.summary(results["rows"]) in markdown


def test_weights_that_are_read_as_codes_are_named(runs):
    results = results_of(runs)
    said = []
    for reads_codes in (False, True):
        results["machine"]["reads_codes"] = reads_codes
        said.append("codes of their file" in report.to_markdown(results))
    assert said == [False, True]


def test_one_category_needs_no_table_by_category(runs):
    assert len(tables(report.to_markdown(results_of(runs[:2])))) == 1


def test_in_sampling_the_table_has_no_counts(runs):
    assert tables(report.to_markdown(results_of(runs, temperature=1.0)))[0][2][-1] == "-"


def test_many_divergences_are_listed_in_part_and_the_worst_first(runs):
    found = [Divergence("beta", "maths", i, 0, 0, 1e-4, True) for i in range(50)] + [Divergence("beta", "maths", "worst", 0, 0, 1.0, False)]
    markdown = report.to_markdown(results_of(runs, found))
    listed = tables(markdown)[-1][1:]
    assert listed[0][1] == "worst"
    assert f"{len(found) - len(listed)} more" in markdown


def test_plots_are_images(runs):
    images = plots.draw_all(report.result_rows(runs, [], COSTS, arms="exit", temperature=0.0, batch_size=1), runs)
    assert set(images) == {
        "speedup_by_category.png",
        "accepted_lengths.png",
        "acceptance_by_position.png",
        "draft_length_over_rounds.png",
        "posterior_over_rounds.png",
    }
    for image in images.values():
        assert image.startswith(PNG)
        assert len(image) > 5000
    assert len(set(images.values())) == len(images)


def test_plots_take_what_there_is(runs):
    unbelieving = [
        run("plain", 1.0, plain(4)),
        run("fixed:1", 1.0, speculative([1, 1], [1, 1])),
        run("fixed:0", 1.0, speculative([0], [0])),
    ]
    images = plots.draw_all(report.result_rows(unbelieving, [], None, arms="lookup", temperature=0.0, batch_size=1), unbelieving)
    assert "posterior_over_rounds.png" not in images
    assert all(image.startswith(PNG) for image in images.values())
    assert plots.draw_all(report.result_rows(runs[1:3], [], None, arms="lookup", temperature=0.0, batch_size=1), runs[1:3]) == {}
