"""What a comparison says in a sentence: leaders, ties, the correction for many differences, and what is not claimed."""

from __future__ import annotations

import numpy as np
import pytest
from comparisons import result, rows_of, tables_of, whole, write_comparison

from pedro.comparison.result_model import AVERAGE
from pedro.comparison.run_files import read_comparison
from pedro.comparison.verdict import against, by_information, contrasts, holm, task_titles, verdict, verdicts


def table_of(folder):
    (table,) = tables_of(read_comparison(folder))
    return table


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One method is far better on sst2, three are alike, and on rte nobody learns anything."""
    skills = {"PEDRO": 1.2, "LoRA": 3.0, "AdaLoRA": 1.2, "BitFit": 1.2}
    return table_of(whole(tmp_path_factory.mktemp("verdict") / "made", skills, {"rte": 0.0, "sst2": 1.0}))


def test_holm_adjusts_by_how_many_are_left_and_never_falls():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_leader_that_beats_all_others_leads_the_second_by_points_with_an_interval(made):
    said = verdict(made, "sst2")
    assert (said.leader, said.tied) == ("LoRA", ())
    assert set(said.beaten) == {"PEDRO", "AdaLoRA", "BitFit"}
    assert said.comparisons == 6, "every pair could have been the one that is told"
    second = said.beaten[0]
    gap = 100 * (made.entries["LoRA", "sst2"].value - made.entries[second, "sst2"].value)
    assert said.sentence("SST-2") == (
        f"On SST-2 LoRA leads {second} by {gap:.1f} points "
        f"[{100 * said.next.difference.low:.1f}, {100 * said.next.difference.high:.1f}], and every other method."
    )


def test_what_nothing_separates_is_said_to_be_so(tmp_path):
    alike = table_of(whole(tmp_path / "alike", {"A": 1.0, "B": 1.0, "C": 1.0}, {"sst2": 1.0}))
    said = verdict(alike, "sst2")
    assert (len(said.tied), said.beaten, said.next) == (2, (), None)
    assert "nothing separates the 3 methods" in said.sentence("SST-2")


def test_a_group_at_the_top_is_named_and_led_from_what_it_beats(tmp_path):
    mixed = table_of(whole(tmp_path / "mixed", {"A": 3.0, "B": 3.0, "C": 0.3}, {"sst2": 1.0}))
    said = verdict(mixed, "sst2")
    assert {said.leader, *said.tied} == {"A", "B"}
    text = said.sentence("SST-2")
    assert text.startswith("On SST-2 nothing separates ")
    assert f"{said.leader} leads C by " in text


def test_many_equal_methods_are_seldom_told_apart(tmp_path):
    """Eight alike: 28 pairs at 5 % each would mostly give a difference; corrected, one table in twenty."""
    wrong = 0
    for number in range(5):
        rows = {f"M{at}": 1.0 for at in range(8)}
        table = table_of(whole(tmp_path / f"many-{number}", rows, {f"task{number}": 1.0}, rows=200))
        wrong += bool(verdict(table, f"task{number}").beaten)
    assert wrong <= 1


def test_one_seed_or_one_value_gives_no_verdict(tmp_path):
    one = table_of(whole(tmp_path / "one", {"A": 3.0, "B": 0.3}, {"sst2": 1.0}, seeds=1))
    assert "no difference can be shown: each method has one seed" in verdict(one, "sst2").sentence("SST-2")
    values = [result(label, "sst2", 0, [value]) for label, value in (("A", 1), ("B", 0))]
    single = table_of(write_comparison(tmp_path / "single", values))
    assert "each method has one value" in verdict(single, "sst2").sentence("SST-2")
    alone = table_of(whole(tmp_path / "alone", {"A": 1.0}, {"sst2": 1.0}))
    assert "there is one method, A" in verdict(alone, "sst2").sentence("SST-2")


def test_where_all_are_at_chance_nothing_is_led(tmp_path):
    table = table_of(whole(tmp_path / "chance", {"A": 0.0, "B": 0.0}, {"rte": 1.0}))
    assert verdict(table, "rte").at_chance
    assert "no method is shown to beat always giving the most frequent answer" in verdict(table, "rte").sentence("RTE")


def test_an_informative_task_comes_first_and_the_one_at_chance_last(made):
    assert by_information(made) == [AVERAGE, "sst2", "rte"]
    assert [each.task for each in verdicts(made)] == [AVERAGE, "sst2", "rte"]
    assert verdicts(made)[0].sentence("Avg.").startswith("On average ")


def test_differences_to_a_baseline_are_corrected_for_all_that_are_shown(made):
    shown = against(made, "PEDRO", ["sst2", "rte"])
    assert [(each.label, each.task) for each in shown if each.separates] == [("LoRA", "sst2")]
    assert len(shown) == 6
    alone = against(made, "PEDRO", ["sst2"])
    lora = next(each for each in alone if each.label == "LoRA")
    assert lora.difference == next(each for each in shown if (each.label, each.task) == ("LoRA", "sst2")).difference
    assert all(each.p <= many.p for each, many in zip(alone, shown, strict=False) if each.task == many.task)


def test_an_interval_that_holds_zero_separates_nothing_whatever_its_p(made):
    entry = made.entries["PEDRO", "sst2"]
    (same,) = contrasts([(entry, entry)])
    assert (same.difference.value, same.p, same.separates) == (0.0, 1.0, False)


def test_p_is_that_of_the_bootstraps_standard_error(made):
    a, b = made.entries["LoRA", "sst2"], made.entries["PEDRO", "sst2"]
    (only,) = contrasts([(a, b)])
    z = (a.value - b.value) / np.std(a.samples - b.samples, ddof=1)
    draws = np.random.default_rng(0).standard_normal(200_000)
    assert only.p == pytest.approx(np.mean(np.abs(draws) > z), abs=1e-3)


def test_titles_are_short_where_that_tells_them_apart(made):
    known = {"sst2": "SST-2: sentiment of a sentence", "rte": "RTE: textual entailment"}
    assert task_titles(made, known) == {"rte": "RTE", "sst2": "SST-2", AVERAGE: AVERAGE}
    assert task_titles(made, {"sst2": "Same: a", "rte": "Same: b"}) == {
        "sst2": "Same: a",
        "rte": "Same: b",
        AVERAGE: AVERAGE,
    }
    assert task_titles(made, {})["sst2"] == "sst2"


def test_rows_of_a_method_decide_and_not_its_name(tmp_path):
    runs = [
        result(label, "sst2", seed, rows_of("sst2", seed, skill, 300, label="same"))
        for label, skill in (("Z", 3.0), ("A", 0.2))
        for seed in range(3)
    ]
    assert verdict(table_of(write_comparison(tmp_path / "named", runs)), "sst2").leader == "Z"
