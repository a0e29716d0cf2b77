"""Claims, verdicts, statistics of pairs, and the report made from committed records alone."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from scipy.special import gammaln

from benchmarks import report as cost
from ddc.report.book import Section, latex, page
from ddc.report.claims import Effect, effect, load_claims, verdict
from ddc.report.figures import drawn, save_figure, subplots
from ddc.report.paired import interval, quantity_table, seeds_table, stage_runs
from ddc.report.runs import read_lines
from ddc.report.stages import table
from ddc.report.statistics import (
    effect_size,
    holm,
    interquartile_mean,
    paired_p,
    share_difference_interval,
)
from experiments import __main__ as command
from experiments import pages
from experiments.equivariance import report as equivariance
from experiments.learning_coefficients import report as learning_coefficients
from experiments.lm_overtrain import drift
from experiments.lm_overtrain import report as lm_overtrain
from experiments.protocols import EXPERIMENTS, ROOT
from experiments.questions import Question, questions
from experiments.rates import plan as rates_plan
from experiments.rates import report as rates
from experiments.vit_scratch import plan as vit_plan
from experiments.vit_scratch import report as vit

CLAIM = load_claims(EXPERIMENTS)


# ----------------------------------------------------------------------------------------------
# registry


def test_every_claim_can_be_run_and_reported() -> None:
    papers = ["C1", "C1b", "C2", "C2b", "C3", "C3b", "C4", "C4b", "C5", "C5b", "C6", "C7", "C8"]
    papers += ["C9", "C9b"]
    assert list(CLAIM) == [*papers, "W1", "W1b", "W2", "W3", "W4", "W5", "W6", "W7", "W8"]
    every = {each.name: each for each in questions(CLAIM)}
    for claim in CLAIM.values():
        question = every[claim.experiment]
        assert question.plan is not None or question.module("measure") is not None
        assert question.status("runs")
        report = question.module("report")
        assert all(callable(getattr(report, name)) for name in ("load", "results", "verdicts"))


@pytest.mark.parametrize(
    ("change", "message"),
    [("level: 0.05", "level: low"), ("metric:", "measure:")],
)
def test_a_broken_claim_is_named(change: str, message: str, tmp_path: Path) -> None:
    path = copied_claim(tmp_path)
    path.write_text(path.read_text().replace(change, message, 1))
    with pytest.raises(ValueError, match=r"lm_overtrain/claim\.yaml, C1"):
        load_claims(tmp_path)


def copied_claim(folder: Path, name: str = "lm_overtrain") -> Path:
    """A folder of experiments with one claim, C1."""
    path = folder / name / "claim.yaml"
    path.parent.mkdir()
    shutil.copyfile(EXPERIMENTS / "lm_overtrain/claim.yaml", path)
    return path


def test_a_claim_without_a_rule_is_refused(tmp_path: Path) -> None:
    path = copied_claim(tmp_path)
    path.write_text(re.sub(r"\n  reproduced: .*", "", path.read_text(), count=1))
    with pytest.raises(ValueError, match=r"C1.*reproduced"):
        load_claims(tmp_path)


def test_two_claims_of_one_name_are_refused(tmp_path: Path) -> None:
    copied_claim(tmp_path)
    copied_claim(tmp_path, "other")
    with pytest.raises(ValueError, match=r"other/claim\.yaml, C1: lm_overtrain has a claim C1 too"):
        load_claims(tmp_path)


# ----------------------------------------------------------------------------------------------
# verdicts


@pytest.mark.parametrize(
    ("effects", "expected"),
    [
        ([Effect(1)], "reproduced"),
        ([Effect(1, enough=False)], "direction only"),
        ([Effect(1), Effect(0)], "direction only"),
        ([Effect(1), Effect(1)], "reproduced"),
        ([Effect(1), Effect(-1)], "not reproduced"),
        ([Effect(0)], "not reproduced"),
        ([Effect(-1)], "not reproduced"),
        ([Effect(1), Effect(None)], "not tested"),
        ([], "not tested"),
    ],
)
def test_verdict_of_effects(effects: list[Effect], expected: str) -> None:
    assert verdict(effects) == expected


def test_three_seeds_show_a_direction_at_most_and_only_if_they_agree() -> None:
    assert effect([1.0, 2.0, 3.0], None, 0.05) == Effect(1, enough=False)
    assert effect([-1.0, -2.0, -3.0], None, 0.05) == Effect(-1, enough=False)
    assert effect([1.0, 2.0, -0.1], None, 0.05) == Effect(0, enough=False)
    # two show nothing
    assert effect([5.0, 5.0], None, 0.05) == effect([], None, 0.05) == Effect(None, enough=False)
    assert effect([1.0] * 5, 0.01, 0.05) == Effect(1, enough=True)
    assert effect([-1.0] * 5, 0.01, 0.05) == Effect(-1, enough=True)
    assert effect([1.0] * 5, 0.05, 0.05) == Effect(0, enough=True)


def test_equivariance_fails_by_one_row() -> None:
    records = read_lines(ROOT / "results/equivariance/records.jsonl")
    assert {each.verdict for each in equivariance.verdicts(records, CLAIM)} == {"reproduced"}
    broken = next(
        i for i, r in enumerate(records) if r["optimizer"] == "ddcadam" and r["dtype"] == "float64"
    )
    changed = [*records[:broken], {**records[broken], "divergence": 1e-6}, *records[broken + 1 :]]
    assert [v.verdict for v in equivariance.verdicts(changed, CLAIM)] == [
        "direction only",
        "reproduced",
    ]


# ----------------------------------------------------------------------------------------------
# statistics


def test_statistics_of_differences_agree_with_scipy() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, 8)
    assert paired_p(values) == pytest.approx(stats.ttest_rel(values, np.zeros(8)).pvalue)
    assert paired_p(values[:4]) is None
    # counts may all be one number
    assert paired_p([3.0] * 6) == pytest.approx(stats.binomtest(6, 6).pvalue)
    assert paired_p([0.0] * 6) == 1.0
    many = np.random.default_rng(1).normal(0.3, 1.0, 11)
    signs = np.array(list(itertools.product((1, -1), repeat=11)))
    means = np.abs((signs * many).mean(1))
    assert paired_p(many) == pytest.approx((means >= abs(many.mean()) - 1e-12).mean())
    assert interquartile_mean(values) == pytest.approx(np.sort(values)[2:6].mean())
    # Hedges' correction is exactly a ratio of gamma functions; the usual formula approximates it
    df = 7
    exact = np.sqrt(2 / df) * np.exp(gammaln(df / 2) - gammaln((df - 1) / 2))
    assert effect_size(values) == pytest.approx(
        exact * values.mean() / values.std(ddof=1), rel=2e-3
    )
    assert effect_size([1.0, 2.0]) is None
    assert effect_size([1.0, 1.0, 1.0]) is None


def test_difference_of_shares() -> None:
    low, high = share_difference_interval((56, 48), (70, 80))
    # Newcombe 1998, method 10
    assert (low, high) == (
        pytest.approx(0.0524, abs=1e-4),
        pytest.approx(0.3339, abs=1e-4),
    )


def test_what_was_not_tested_stays_untested() -> None:
    assert holm([0.01, None, 0.04]) == pytest.approx([0.02, None, 0.04])
    assert holm([None]) == [None]


def made_up(losses: dict[str, list[float]]) -> list[dict]:
    """Records of both protocols; one gap at train loss 0.5 a seed."""
    return [
        {
            "stages": {"matched": name, "tuned": name},
            "config": {"optimizer": {"name": name, "lr": 1e-3, "weight_decay": 0.1}},
            "seed": seed,
            "diverged": False,
            "summary": {"gap": 3.0, "gap_at_train_loss": {"0.5": value}},
        }
        for name, values in losses.items()
        for seed, value in enumerate(values)
    ]


def test_pairs_are_by_seed_and_every_seed_is_shown() -> None:
    runs = stage_runs(made_up({"adamw": [3.0, 4.0, 5.0], "ddcadam": [2.5, 3.4, 4.3]}), "matched")
    text = quantity_table(runs, [lm_overtrain.EQUAL])
    low, high = stats.t.interval(0.95, 2, -0.6, stats.sem([0.5, 0.6, 0.7]))
    assert f"-0.600 ({low:.3f} to {high:.3f})" in text
    assert text.endswith("| – | 3 |")  # not tested; three seeds
    shown = seeds_table({"matched": runs}, [lm_overtrain.EQUAL], lambda record: "x")
    assert "3.000, 4.000, 5.000" in shown
    assert "2.500, 3.400, 4.300" in shown
    assert interval([0.5], ".1f") == "+0.5 (one seed)"


@pytest.mark.parametrize(
    ("ddcadam", "expected"),
    [
        ([1.0, 1.15, 1.2, 1.35, 1.4], "reproduced"),
        ([2.5, 2.65, 2.7, 2.85, 2.9], "direction only"),
        ([2.9, 3.2, 3.1, 3.2, 3.5], "not reproduced"),
        ([4.0, 4.15, 4.2, 4.35, 4.4], "not reproduced"),
    ],
)
def test_verdict_of_the_gap(ddcadam: list[float], expected: str) -> None:
    found = lm_overtrain.gap_verdicts(
        made_up({"adamw": [3.0, 3.1, 3.2, 3.3, 3.4], "ddcadam": ddcadam}), CLAIM["C1"]
    )
    assert [each.verdict for each in found] == [expected] * 2


def test_a_gap_that_was_never_reached_counts_as_no_seed() -> None:
    records = made_up({"adamw": [3.0, 3.1, 3.2, 3.3, 3.4], "ddcadam": [1.0, 1.1, 1.2, 1.3, 1.4]})
    records[-1]["summary"]["gap_at_train_loss"]["0.5"] = None
    found = lm_overtrain.gap_verdicts(records, CLAIM["C1"])
    assert [(each.seeds, each.verdict) for each in found] == [
        ("4 of 5", "direction only")
    ] * 2  # four are not tested
    records = made_up(
        {"adamw": [3.0, 3.1, 3.2, 3.3, 3.4, 3.5], "ddcadam": [1.0, 1.15, 1.2, 1.35, 1.4, 1.5]}
    )
    assert {each.verdict for each in lm_overtrain.gap_verdicts(records, CLAIM["C1"])} == {
        "reproduced"
    }
    records[-1] |= {"diverged": True}  # no less than half of the gap, but not on every seed
    found = lm_overtrain.gap_verdicts(records, CLAIM["C1"])
    assert [(each.seeds, each.verdict) for each in found] == [("5 of 6", "direction only")] * 2


@pytest.mark.parametrize(
    ("shift", "scale", "expected"),
    [
        (1e-6, 1e-6, "reproduced"),
        (0.05, 0.05, "direction only"),  # by less than a factor of ten
        (1e-6, 0.1, "direction only"),
        (1e-6, 0.2, "not reproduced"),
        (0.1, 0.1, "not reproduced"),
    ],
)
def test_verdict_of_the_drift(shift: float, scale: float, expected: str) -> None:
    records = made_up({name: [1.0, 1.1, 1.2, 1.3, 1.4] for name in ("adamw", "ddcadam")})
    for record in records:
        is_adamw = record["config"]["optimizer"]["name"] == "adamw"
        noise = 1 + 0.01 * (record["seed"] * (1 if is_adamw else 2) % 5)
        ends = (0.1, 0.1) if is_adamw else (shift, scale)
        kinds = dict(
            zip(("logit_shift", "norm_scale"), (each * noise for each in ends), strict=True)
        )
        record["curve"] = {"gauge_drift": [dict.fromkeys(kinds, 0.0), kinds]}
    found = drift.verdicts(records, CLAIM["C8"], ["logit_shift", "norm_scale"])
    assert [each.verdict for each in found] == [expected] * 2


def test_the_script_of_a_stage_finds_the_folders_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a PYTHONPATH, as ``make`` calls it: the wheel does not hold experiments."""
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys\nimport experiments.search\n"
        "(pathlib.Path(sys.argv[1]) / 'measured').touch()\n"
    )
    monkeypatch.delenv("PYTHONPATH", raising=False)
    ended = [SimpleNamespace(ended=True, folder=tmp_path)]
    monkeypatch.setattr(command, "parse_sweep", lambda lines: ended)
    monkeypatch.setattr(command, "run_missing", lambda sweep, jobs: None)
    plan = SimpleNamespace(plan_lines=lambda stage, runs: [], scripts={"end": str(script)})
    command.run_stage(plan, "end", "runs", 1)
    assert (tmp_path / "measured").exists()


def test_the_main_table_says_what_speaks_against_a_verdict() -> None:
    found = {(each.claim, each.protocol): each for each in command.all_verdicts(CLAIM)}
    assert found["C3", "tuned"].verdict == "direction only"  # by the rule
    assert "not reproduced with settings beyond the grid" in found["C3", "tuned"].against
    assert "0.702 (DDCAdam) against 0.659 (AdamW)" in found["C3", "tuned"].against
    assert "rate × decay is 4 times DDCAdam's" in found["C4", "tuned"].against
    assert "DDCAdam's learning rate was not tuned (0.001)" in found["C1", "tuned"].against
    assert "17 of the 17 cells read are log-volumes" in found["C2", "matched, 5 × 5 cells"].against
    assert "at the corner of its grid" in found["C5", "tuned"].against
    assert [each.tested for key, each in found.items() if key[0] in ("C2", "C6")] == [
        *["no: fewer than 5 seeds"] * 2, *["no: a bound"] * 2
    ]  # fmt: skip
    for (claim, protocol), each in found.items():
        if protocol == "–":  # its runs are not there yet
            assert each.verdict == "not tested"
            continue
        assert protocol in CLAIM[claim].fixed
        if claim in ("C1", "C3", "C4", "C5"):
            assert each.tested == "yes"


def test_beyond_the_grid_speaks_against_a_verdict_only_where_it_does() -> None:
    records = vit_plan.EXPERIMENT.records
    worse = copy.deepcopy(records)
    for record in worse:
        if "beyond" in record["stages"] and record["config"]["optimizer"]["name"] == "adamw":
            record["summary"]["validation_loss"] += 1
    assert "0.659" in vit.beyond(records)
    assert (
        vit.beyond(worse) == vit.beyond([r for r in records if "beyond" not in r["stages"]]) == "–"
    )


def test_23_of_28_learning_coefficients_are_near_the_true_one() -> None:
    records = read_lines(ROOT / "results/learning_coefficients/records.jsonl")
    assert learning_coefficients.near(records) == 23
    for text in (ROOT / "docs/results.md").read_text(), learning_coefficients.table(records):
        assert re.search(r"23 of 28 (estimates )?are within 5% of", " ".join(text.split()))


def test_cells_are_compared_grid_by_grid() -> None:
    readings = rates.read_folder(ROOT / "results/rates/small")
    found = {each.protocol: each for each in rates.verdicts(rates.Committed(readings), CLAIM)}
    small = found["matched, 5 × 5 cells"]
    assert (small.seeds, small.p, small.verdict) == ("3", "–", "direction only")
    assert small.ours.startswith("DDCAdam 5, 4, 4; AdamW 1, 2, 1: +3.0")


# ----------------------------------------------------------------------------------------------
# documents


def test_tables_as_latex() -> None:
    with pytest.raises(ValueError, match="no LaTeX for ☃: add to MATHEMATICS"):
        latex("☃")
    text = latex(table(["name_1", "50%"], [["a & b", "1.5"], ["ρ_P", "– 2"]]))
    assert text.isascii()
    assert text.count(r"\\") >= 3
    assert all(
        each in text for each in (r"\toprule", r"\bottomrule", r"name\_1", r"50\%", r"a \& b")
    )


def test_a_figure_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        figure, axes = subplots(figsize=(3, 2))
        axes.plot([1, 2, 3])
        made.append([path.read_bytes() for path in save_figure(figure, tmp_path / name / "figure")])
    assert made[0] == made[1]


def test_missing_records_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    records = vit_plan.EXPERIMENT.records
    for kept, message in (
        ([], r"vit_scratch/runs\.jsonl lacks 10 of 10 runs of matched"),
        ([r for r in records if r["stages"].keys() != {"beyond"}], "lacks 12 of 12 runs of beyond"),
        ([r for r in records if r["seed"] != 100], "lacks 18 of 18 runs of tuning"),
    ):
        monkeypatch.setitem(vit_plan.EXPERIMENT.__dict__, "records", kept)
        with pytest.raises(ValueError, match=message):
            Question("vit_scratch").section(CLAIM)


@pytest.mark.slow
def test_what_was_collected_stays_where_a_run_is_not_here(tmp_path: Path) -> None:
    collected = vit_plan.EXPERIMENT.collected(str(tmp_path))
    assert sorted(collected, key=lambda r: r["id"]) == sorted(
        vit_plan.EXPERIMENT.records, key=lambda r: r["id"]
    )


def test_the_readings_of_a_new_run_replace_those_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = replace(rates_plan.EXPERIMENT, results=tmp_path / "results")
    for kept, run in experiment.sweep("small", str(tmp_path / "runs")).items():
        source = ROOT / "results/rates/small" / kept.name
        shutil.copytree(source, run.folder)
        shutil.copytree(source, kept)
        (kept / "old").touch()
        break
    experiment.collect(str(tmp_path / "runs"))
    assert {path.name for path in kept.iterdir()} == {path.name for path in source.iterdir()}
    assert [(stage.name, stage.recorded,
    stage.needed) for stage in experiment.status(str(tmp_path / "runs"))] == [
        ("small", 1, 6), ("deep", 0, 2), ("coefficients", 0, 2)
    ]  # fmt: skip
    (run.folder / "rates.json").unlink()
    with pytest.raises(ValueError, match=r"is not read: python scripts/read_rates\.py"):
        experiment.collect(str(tmp_path / "runs"))
    shutil.rmtree(kept)
    monkeypatch.setattr(rates, "EXPERIMENT", experiment)
    with pytest.raises(ValueError, match="has no readings: run and collect them first"):
        Question("rates").section(CLAIM)


def test_the_page_shows_every_figure_with_its_caption() -> None:
    section = Section(
        "T", ("C1",), "make x", "table\n", {ROOT / "results/vit_scratch/losses.png": "caption"}
    )
    text = page([section], "main", "notes", ROOT)
    assert "![caption](results/vit_scratch/losses.png)" in text
    assert "`make x`" in text


def test_cost_is_drawn_from_its_records(tmp_path: Path) -> None:
    speed, memory = (
        json.loads((ROOT / f"results/benchmark/{name}.json").read_text())
        for name in ("speed", "memory")
    )
    figures = [path.name for path in drawn(cost.drawings(speed, memory), tmp_path)]
    assert figures == ["cost.png", "scaling.png"]
    assert (ROOT / "results/benchmark/speed.md").read_text() == cost.speed_table(speed)
    assert (ROOT / "results/benchmark/memory.md").read_text() == cost.memory_table(memory)
    state = {(row["model"], row["optimizer"]): row["optimizer_state"] for row in memory["rows"]}
    for model in {row["model"] for row in memory["rows"]}:  # no more state than AdamW's
        assert all(
            state[model, name] <= state[model, "adamw"] for name in ("ddcadam", "muon", "ddcmuon")
        )


def test_slopes_of_cost_are_those_of_a_power_law(tmp_path: Path) -> None:
    sizes = [2, 4, 8, 16]
    times = [{"ms": 3 * n**1.5, "ratio to AdamW fused": n**-0.25} for n in sizes]
    along = {
        "depth": {
            "sizes": sizes,
            "parameters": [7 * n**2 for n in sizes],
            "optimizers": {"DDCAdam": times},
        }
    }
    assert "| depth, 2 to 16 | DDCAdam | 8.49 | 192.00 | 2.00 | 1.50 | -0.25 |" in cost.slope_table(
        {"along": along}
    )
    assert cost.plot_scaling({"along": along | {"width": along["depth"]}}, tmp_path / "scaling")[
        0
    ].exists()


def test_pages_show_the_tables_of_the_records() -> None:
    """Every table that the README and the documentation copy is that of the records."""
    blocks = 0
    for each in pages.pages(ROOT):
        text = each.read_text()
        assert pages.filled(text, each, ROOT) == text, each
        blocks += len(pages.BLOCK.findall(text))
    assert blocks >= 15
    readme = (ROOT / "README.md").read_text()
    for name, claim in CLAIM.items():  # all of them, with what is not tested
        paper = "" if claim.own else f" {claim.paper} |"
        assert f"| {name}: {claim.title} |{paper} **" in readme


def test_a_block_takes_columns_and_leaves_repeated_cells_empty(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "| no |\n| --- |\n\n## B\n\n| x | y | z |\n| --- | ---: | --- |\n| 1 | 2 | 3 |\n"
        "| 1 | 4 | 3 |\n\n| w |\n| --- |\n"
    )
    page = tmp_path / "page.md"
    source = "a.md; under: B; number: 1; columns: y"
    made = pages.filled(f"<!-- table: {source} -->\nold\n<!-- /table -->\n", page, tmp_path)
    table = "| x | y |\n| --- | ---: |\n| 1 | 2 |\n|  | 4 |"
    assert made == f"<!-- table: {source} -->\n\n{table}\n\n<!-- /table -->\n"
    made = pages.filled(f"<!-- table: {source}; without: 4 -->\n<!-- /table -->\n", page, tmp_path)
    assert "| 1 | 2 |\n\n" in made
    for wrong, message in (
        ("b.md", "b.md"),
        ("a.md; under: C", "no heading 'C'"),
        ("a.md; columns: q", "no column q"),
        ("a.md; number: 4", "no table"),
        ("a.md; colour: red", "unknown colour"),
    ):
        with pytest.raises(ValueError, match=f"page.md.*{message}"):
            pages.filled(f"<!-- table: {wrong} -->\n<!-- /table -->", page, tmp_path)


NUMBER = re.compile(r"(?<![\w.:/])\d+\.\d+(?:e-?\d+)?(?![\w:]|\.\d)|\d+ of \d+")


def prose(text: str) -> str:
    """A page without its copied tables and code."""
    return re.sub(
        r"^```.*?^```|`[^`]*`", "", pages.BLOCK.sub("", text), flags=re.DOTALL | re.MULTILINE
    )


def numbers(text: str) -> set[str]:
    """Measured numbers: those with a decimal point, and counts of a total."""
    return set(NUMBER.findall(" ".join(text.split())))


def test_numbers_in_the_prose_are_in_the_tables() -> None:
    """What is said of a claim in words has the numbers of the tables that its section names."""
    sections = re.split(r"^## ", (ROOT / "docs/results.md").read_text(), flags=re.MULTILINE)
    found = 0
    for section in sections[1:]:
        words = prose(section)
        named = set(re.findall(r"results/\w+", section)) | {"results/report"}
        tables = "".join(p.read_text() for name in named for p in (ROOT / name).glob("*.md"))
        tables += "".join(p.read_text() for p in (ROOT / "experiments").rglob("claim*.yaml"))
        said = numbers(words)
        assert not said - SETTINGS - set(NUMBER.findall(tables)), section.splitlines()[0]
        found += len(said)
    assert found >= 20
    everywhere = "".join(path.read_text() for path in (ROOT / "results").rglob("*.md"))
    made = {ROOT / "docs/refused.md", ROOT / "docs/zoo.md"}
    for each in set(pages.pages(ROOT)) - made:
        said = numbers(prose(each.read_text()))
        assert not said - SETTINGS - set(NUMBER.findall(everywhere)), each


#: Numbers in the prose that are part of a setting, a version or arithmetic, and measure nothing.
SETTINGS = {"0.8", "0.2", "0.03", "2.6", "2.13", "3.11", "3.12", "3.13", "1.9e13"}


def test_every_table_and_figure_is_a_target() -> None:
    """None is committed that cannot be made by its path, and none can be made that is not
    committed.
    """
    named = {
        path
        for source in command.sources(CLAIM).values()
        for each in source()
        for path in each.paths
    }
    there = {
        path
        for suffix in ("md", "tex", "png", "pdf")
        for path in (ROOT / "results").rglob(f"*.{suffix}")
    }
    assert {str(path.relative_to(ROOT)) for path in there ^ named} == set()


def test_one_figure_is_made_by_its_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "ROOT", tmp_path)
    own = vit_plan.EXPERIMENT
    moved = replace(own, results=tmp_path / "results/vit_scratch")
    moved.__dict__["records"] = own.records
    monkeypatch.setattr(vit, "EXPERIMENT", moved)
    command.make(["results/vit_scratch/units.pdf"])
    assert sorted(path.name for path in moved.results.iterdir()) == [
        "units.pdf",
        "units.png",
    ]
    with pytest.raises(
        ValueError,
        match=r"vit_scratch/runs\.pdf is no table or figure; there are results/vit_scratch/table",
    ):
        command.make(["results/vit_scratch/runs.pdf"])


def test_make_knows_its_targets_and_states_no_time_that_is_not_recorded() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert not re.findall(
        r"\d+ (?:seconds?|minutes?|hours?)\b|\b(?:a|an|two|three|eight) (?:minute|hour)s?\b",
        makefile,
    )
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    targets = {
        name
        for line in re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
        for name in line.split()
    }
    names = {each.name for each in questions(CLAIM)}
    listed = {line.split()[0] for line in shown.splitlines() if line and line[:3] != "All"}
    assert listed == targets - {"FORCE", "images", "$(QUESTIONS)"} | {"results/%"} | names
    dry = subprocess.run(
        ["make", "-n", "results/lm_overtrain/losses.pdf"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "-m experiments make results/lm_overtrain/losses.pdf" in dry
    times = r"[0-9.]+ (?:seconds|minutes|hours)"
    assert not re.findall(times, (ROOT / "README.md").read_text())


@pytest.mark.slow
def test_the_report_follows_from_committed_records(tmp_path: Path) -> None:
    """What the report makes is removed, made again, and the same; and the page needs nothing but
    itself.
    """
    for name in ("ddc", "docs", "experiments", "results", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    made = [
        path
        for name in ("lm_overtrain", "rates", "vit_scratch", "grok_mlp", "equivariance", "report")
        for path in (tmp_path / "results" / name).glob("*")
        if path.suffix in (".md", ".tex", ".png", ".pdf", ".html")
    ]
    assert len(made) >= 50
    for path in made:
        path.unlink()
    run = subprocess.run(
        [sys.executable, "-m", "experiments", "report"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for path in made:
        assert path.exists(), path
        if path.suffix in (".md", ".tex"):
            assert path.read_text() == (ROOT / path.relative_to(tmp_path)).read_text(), path
    html = (tmp_path / "results/report/index.html").read_text()
    assert html.count("<img") >= 19
    assert not re.findall(r'(?:src|href)="(?!#|data:|https://arxiv)[^"]*"', html)
    assert all(f"{name}:" in html for name in CLAIM)
