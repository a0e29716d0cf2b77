"""Claims of our own: what is run, what is read from it, and by which rule it is decided."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddc.gauges import find_gauges, named_parameters
from ddc.models import GPT, CausalLM, CausalLMConfig, GPTConfig
from ddc.report.claims import load_claims, rule, short_table, verdict_table
from ddc.training.compose import compose_alike
from experiments import own
from experiments.merging import averages as merging
from experiments.merging import report as merging_report
from experiments.merging.plan import EXPERIMENT as MERGING
from experiments.protocols import EXPERIMENTS
from experiments.rate_range import plan as rates_plan
from experiments.rate_range import ranges
from experiments.rate_range import report as rates_report
from experiments.regauged import plan, report, starts
from experiments.regauged_llama import plan as llama_plan
from experiments.transfer import plan as transfer_plan
from experiments.transfer import report as transfer_report
from experiments.tuned_muon import plan as muon_plan
from experiments.tuned_muon import report as muon_report
from tests.helpers import make_model
from tests.test_causal_lm import LLAMA

CLAIM = load_claims(EXPERIMENTS)
Record = dict[str, Any]


def record_of(setting: str, seed: int, stage: str, loss: float | None) -> Record:
    """The record of a run that was never made, as far as reports read it."""
    pairs = dict(each.split("=", 1) for each in setting.split())
    optimizer: Record = {
        key.removeprefix("optimizer."): value if key.endswith("canonicalise") else float(value)
        for key, value in pairs.items()
        if key.startswith("optimizer.")
    }
    return {
        "id": f"{setting} {seed}",
        "seed": seed,
        "stages": {stage: setting},
        "config": {
            "optimizer": {"name": pairs["optimizer"], **optimizer},
            "start": {"weights": pairs.get("start.weights")},
            "model": {"context": 64},
            "data": {"train_tokens": 40960},
            "training": {"steps": 500, "batch_size": 8},
        },
        "commit": "0" * 40,
        "summary": None if loss is None else {"validation_loss": loss},
        "diverged": loss is None,
        "seconds": 5.0,
    }


# ----------------------------------------------------------------------------------------------
# registry


def test_our_claims_are_told_apart() -> None:
    own_claims = [name for name, claim in CLAIM.items() if claim.own]
    assert own_claims == ["W1", "W1b", *(f"W{i}" for i in range(2, 9))]
    assert "*Holds*" in rule(CLAIM["W2"])
    assert "*Reproduced*" in rule(CLAIM["C1"])
    better = {"against AdamW": {"spread 0": [0.5, 0.6, 0.4, 0.5, 0.55]}}
    rows = own.verdicts(CLAIM["W2"], better, 1, "s", "–", ".2f")
    assert [row.verdict for row in rows] == ["reproduced"]
    assert "**holds**" in verdict_table(CLAIM, rows)
    worse = own.verdicts(CLAIM["W2"], better, -1, "s", "–", ".2f")
    assert "**does not hold**" in verdict_table(CLAIM, worse)


def test_comparisons_are_listed_by_verdict() -> None:
    better, worse = [0.5, 0.6, 0.4, 0.5, 0.55], [-0.5, -0.6, -0.4, -0.5, -0.55]
    found = {
        "against AdamW": {"spread 0": better},
        "against AdamW, balanced once": {"spread 0": worse},
        "against AdamW, relative steps": {"spread 0": better},
    }
    rows = own.verdicts(CLAIM["W2"], found, 1, "s", "–", ".2f")
    short = short_table({"W2": CLAIM["W2"], "W3": CLAIM["W3"]}, rows)
    assert (
        "**holds**: AdamW; AdamW, relative steps. **does not hold**: AdamW, balanced once" in short
    )
    assert short.splitlines()[-1].rstrip(" |").endswith(CLAIM["W3"].title)


def test_every_effect_must_be_there_and_few_seeds_show_nothing() -> None:
    def verdict(**effects: list[float]) -> str:
        rows = own.verdicts(CLAIM["W2"], {"against AdamW": effects}, 1, "s", "–", ".2f")
        return rows[0].verdict

    wide, same = [0.5, 0.6, 0.4, 0.5, 0.55], [0.1, -0.1, 0.05, -0.05, 0.0]
    narrow = [-each for each in wide]
    assert verdict(a=wide, b=wide) == "reproduced"
    assert verdict(a=wide, b=same) == "direction only"
    assert verdict(a=wide, b=narrow) == "not reproduced"
    assert verdict(a=wide[:2], b=wide[:2]) == "not tested"


def test_a_comparison_without_runs_is_not_tested() -> None:
    rows = own.verdicts(CLAIM["W2"], {"against AdamW": {"spread 0": []}}, 1, "s", "–", ".2f")
    assert [row.verdict for row in rows] == ["not tested"]


# ----------------------------------------------------------------------------------------------
# W2


def test_rates_are_half_decades() -> None:
    assert [rates_plan.rate(i) for i in (-8, -7, -1, 0, 1)] == [1e-4, 3e-4, 0.3, 1.0, 3.0]


def test_all_runs_of_the_first_round_are_valid_and_different() -> None:
    planned = rates_plan.EXPERIMENT.plan("grid", None)
    assert len(planned) == len({*planned}) == 7 * 7 * 3 * 5
    ids = {
        compose_alike(["+experiment=rate_range", *setting.split()]).run_id
        for setting, seed in planned
        if seed == 0
    }
    assert len(ids) == 7 * 7 * 3


def test_a_range_is_measured_between_rates() -> None:
    """Half a decade where both ends are near the best, a share where one is, nothing beyond the
    last good rate.
    """
    losses = {-8: 3.0, -7: 2.0, -6: 2.0, -5: 2.08, -4: math.inf}
    assert ranges.length_below(losses, 2.04) == pytest.approx(0.5 * (0.04 + 1 + 0.5))
    assert ranges.length_below(losses, 1.9) == 0
    # the last good rate is near enough, and the range ends there
    assert ranges.length_below(losses, 2.08) == pytest.approx(0.5 * (0.08 + 1 + 1))


def made_up_loss(optimizer: str, spread: float, half_decades: int, seed: int) -> float | None:
    """A parabola around a best rate: DDC's is wide and knows no spread, others get narrower."""
    immune = optimizer.startswith("DDC")
    away = half_decades - rates_plan.LOWEST[optimizer] - 3
    if away == 3 and not immune:
        return None
    width = (3.0 if immune else 2.0 / (1 + spread)) * (1 + 0.02 * seed)
    return 2.0 * (1 + 0.02 * (away / width) ** 2)


def made_up_ranges(seeds: range) -> list[Record]:
    return [
        record_of(
            rates_plan.setting(name, spread, each),
            seed,
            "grid",
            made_up_loss(name, spread, each, seed),
        )
        for seed in seeds
        for name in rates_plan.OPTIMIZERS
        for spread in rates_plan.SPREADS
        for each in rates_plan.first(name)
    ]


def test_a_wider_range_holds_and_missing_seeds_are_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    records = made_up_ranges(rates_plan.SEEDS)
    monkeypatch.setitem(vars(rates_plan.EXPERIMENT), "records", records)
    found = rates_report.verdicts(records, CLAIM)
    assert [row.protocol for row in found] == list(CLAIM["W2"].fixed)
    assert {row.verdict for row in found} == {"reproduced"}
    assert "**holds**" in rates_report.markdown(records, CLAIM)
    (results,) = rates_report.results(records, CLAIM)
    assert all(path.exists() for path in results.figures["losses"].plot(tmp_path / "losses"))
    few = [record for record in records if record["seed"] < 2]
    monkeypatch.setitem(vars(rates_plan.EXPERIMENT), "records", few)
    found = rates_report.verdicts(few, CLAIM)
    assert {row.verdict for row in found} == {"not tested"}
    assert "grid (294 of 735)" in found[0].against


def test_a_lattice_is_widened_where_its_end_is_near_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = made_up_ranges(rates_plan.SEEDS)
    monkeypatch.setitem(vars(rates_plan.EXPERIMENT), "records", records)
    added = {
        name: rates_plan.widened(name, rates_plan.first(name), None)
        for name in ("AdamW", "DDCAdam")
    }
    assert added == {"AdamW": [], "DDCAdam": [-9, -1]}
    planned = rates_plan.stage(1, None)
    assert len(planned) == 2 * 2 * 3 * 5
    runs = ranges.by_run(records)
    assert ranges.range_of(runs, "DDCAdam", 0, 0).is_open
    assert not ranges.range_of(runs, "AdamW", 0, 0).is_open
    assert ranges.range_of(runs, "AdamW", 0, 7) is None


def test_text_that_is_seen_is_that_of_the_configuration() -> None:
    """And of the records: what a plan says of its text has been wrong."""
    record = record_of("optimizer=adamw", 0, "grid", 2.0)
    assert own.scale("GPT", [record]) == "GPT, 41 kB of text, seen 6.25 times"
    for each, times in ((rates_report, "3.75"), (muon_report, "12.5")):
        (row, *_) = each.verdicts(each.load(), CLAIM)
        assert row.scale.endswith(f"41 kB of text, seen {times} times")


# ----------------------------------------------------------------------------------------------
# W8


def test_grids_of_muons_are_equal_and_a_lower_loss_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[Record] = []
    monkeypatch.setitem(vars(muon_plan.EXPERIMENT), "records", records)
    best = {"muon": 0.03, "ddcmuon": 0.01}
    for stage in muon_plan.EXPERIMENT.stages:
        for setting, seed in muon_plan.EXPERIMENT.plan(stage, None):
            compose_alike(["+experiment=tuned_muon", *setting.split()])
            if known := muon_plan.EXPERIMENT.recorded(setting, seed):
                known["stages"][stage] = setting
                continue
            record = record_of(setting.replace(" gauges=none", ""), seed, stage, 2.0)
            record["stages"][stage] = setting
            optimizer = record["config"]["optimizer"]
            away = math.log10(optimizer["lr"] / best[optimizer["name"]]) ** 2
            away += math.log10(optimizer["adam_lr"] / 3e-3) ** 2 + optimizer["weight_decay"]
            gain = 0.1 + 0.01 * seed if setting.startswith("optimizer=ddcmuon optimizer.lr") else 0
            record["summary"] = {"validation_loss": 2 + 0.01 * away - gain + 0.02 * seed}
            records.append(record)
    grid = muon_plan.SEARCH.grid(muon_plan.MUON)
    assert all(muon_plan.SEARCH.grid(name) == grid for name in muon_plan.OPTIMIZERS)
    assert {len(runs) for runs in muon_report.losses_of(records).values()} == {5}
    found = muon_report.verdicts(records, CLAIM)
    assert [row.protocol for row in found] == list(CLAIM["W8"].fixed)
    assert {row.verdict for row in found} == {"reproduced"}
    assert "not interior" in found[0].against  # the decay falls and falls
    assert "All planned runs are recorded." in muon_report.markdown(records, CLAIM)
    few = [record for record in records if record["stages"].keys() != {"reported"}]
    monkeypatch.setitem(vars(muon_plan.EXPERIMENT), "records", few)
    (row,) = muon_report.verdicts(few, CLAIM)
    assert row.verdict == "not tested"


# ----------------------------------------------------------------------------------------------
# W1


def tokens(vocabulary: int, seed: int) -> Tensor:
    return torch.randint(vocabulary, (4, 16), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def moved() -> tuple[GPT, dict[str, nn.Module], starts.Inputs]:
    config = GPTConfig(context=16, layers=2, width=16, heads=4, kv_heads=2, hidden=12)
    model = make_model(config)  # random scales of norms too
    batches = [tokens(20, seed) for seed in range(3)]
    return model, starts.regauged(model, batches), starts.inputs_of_maps(model, batches)


def test_tools_compute_the_same_elsewhere_on_the_orbit(moved) -> None:
    model, found, _ = moved
    assert list(found) == list(plan.STARTS)
    new = tokens(20, 9)
    for name, other in found.items():
        assert starts.difference(model, other, new) < 1e-9
        size = max(
            float((a - b).detach().norm() / b.detach().norm())
            for a, b in zip(other.parameters(), model.parameters(), strict=True)
        )
        assert (size > 0.1) == (name != plan.ORIGINAL), name


def test_tools_do_what_they_say(moved) -> None:
    model, found, before = moved
    batches = [tokens(20, seed) for seed in range(3)]
    # SmoothQuant, α = 0.5: activations and weights have the same largest entry in each channel
    smooth = found["smoothquant"]
    inputs = starts.inputs_of_maps(smooth, batches)
    attention = smooth.blocks[0].attention
    readers = [attention.query.weight, attention.key.weight, attention.value.weight]
    weights = torch.stack([each.abs().amax(0) for each in readers]).amax(0)
    largest = inputs["blocks.0.attention.query.weight"].abs().amax(0)
    torch.testing.assert_close(largest, weights, rtol=1e-9, atol=0)
    assert torch.equal(smooth.head.weight, model.head.weight)
    # QuaRot: no scale of a norm is left, and the stream is turned
    turned = found["quarot"]
    for norm in (turned.norm, turned.blocks[1].mlp_norm):
        torch.testing.assert_close(norm.weight, torch.ones_like(norm.weight))
    embeddings = [each.embedding.weight for each in (turned, model)]
    torch.testing.assert_close(*(each @ each.T for each in embeddings))
    # rows of W_up and W_V
    divided = found["absmax"].blocks[0]
    for weight in (divided.mlp.up.weight, divided.attention.value.weight):
        torch.testing.assert_close(weight.abs().amax(1), torch.ones(len(weight)).double())
    # AWQ: no scale makes the error of rounding worse than none does
    awq = found["awq"].blocks[0].mlp.down.weight
    plain = model.blocks[0].mlp.down.weight
    seen = starts.inputs_of_maps(found["awq"], batches)["blocks.0.mlp.down.weight"]
    errors = [
        float((x @ (starts.rounded(w.T) - w.T)).detach().square().mean())
        for x, w in ((seen, awq), (before["blocks.0.mlp.down.weight"], plain))
    ]
    assert errors[0] <= errors[1]


def test_four_bits_are_sixteen_values() -> None:
    weight = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = starts.rounded(weight)
    assert all(len(rounded[:, i].unique()) <= 16 for i in range(3))
    step = (weight.amax(0) - weight.amin(0)) / 15
    assert bool(((rounded - weight).abs() <= step).all())


def test_hadamard_matrices_are_orthogonal_and_need_a_power_of_two() -> None:
    matrix = starts.hadamard(16)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(16).double())
    assert len(matrix.abs().unique()) == 1
    with pytest.raises(ValueError, match="size=12"):
        starts.hadamard(12)


@pytest.mark.slow
def test_tools_work_on_a_llama() -> None:
    torch.manual_seed(0)
    model = CausalLM(CausalLMConfig(context=16, options=LLAMA), 20).double()
    found = starts.regauged(model, [tokens(20, seed) for seed in range(2)])
    new = tokens(20, 9)
    before = model.model.get_input_embeddings().weight
    for name in plan.TOOLS:
        assert starts.difference(model, found[name], new) < 1e-9
        assert torch.equal(found[name].model.get_input_embeddings().weight, before) == (
            name != "quarot"
        )


def test_a_tool_that_changes_the_model_is_an_error(monkeypatch: pytest.MonkeyPatch, moved) -> None:
    def wrong_(params, gauges, inputs) -> None:
        params["head.weight"].mul_(1.1)

    monkeypatch.setitem(starts.TOOLS, "wrong", wrong_)
    with pytest.raises(RuntimeError, match="wrong changes what the model computes"):
        starts.regauged(moved[0], [tokens(20, 0)])


def test_settings_are_valid_and_grids_equal() -> None:
    for runs in (plan.FINE_TUNING, llama_plan.FINE_TUNING):
        for each in (runs.search, *runs.searches.values()):
            assert {len({*each.grid(name)}) for name in each.axes} == {6}
        planned = [*runs.pretrain_plan(None), *runs.experiment.plan("grid", None)]
        for line in runs.experiment.lines(planned, "runs"):
            compose_alike(line.split())


def test_the_llama_is_tried_as_the_gpt_is() -> None:
    """The same settings in their own folders, and nothing is retuned."""
    mine, theirs = (each.EXPERIMENT.plan("grid", None) for each in (llama_plan, plan))
    assert [(s.replace("regauged_llama", "regauged"), seed) for s, seed in mine] == theirs
    assert "retuned" in plan.EXPERIMENT.stages
    assert llama_plan.EXPERIMENT.stages[-1] == "reported"


def made_up_w1(monkeypatch: pytest.MonkeyPatch, gain: float) -> list[Record]:
    """Records of all stages; all but DDC's lose ``gain`` and more away from the original."""
    records: list[Record] = []
    monkeypatch.setitem(vars(plan.EXPERIMENT), "records", records)
    for stage in plan.EXPERIMENT.stages:
        for setting, seed in plan.EXPERIMENT.plan(stage, None):
            if known := plan.EXPERIMENT.recorded(setting, seed):
                known["stages"][stage] = setting
                continue
            record = record_of(setting, seed, stage, 2.0)
            optimizer = record["config"]["optimizer"]
            loss = 2 + 0.001 * (math.log10(optimizer["lr"]) + 2.6) ** 2 + 0.01 * seed
            name = Path(record["config"]["start"]["weights"] or "x/original").name
            if not optimizer["name"].startswith("ddc"):
                loss += gain * plan.STARTS.index(name) * (1 + 0.1 * seed)
            record["summary"] = {"validation_loss": loss}
            records.append(record)
    return records


def test_w1_holds_where_others_lose_and_its_report_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    records = made_up_w1(monkeypatch, 0.05)
    found = report.verdicts(records, CLAIM)
    assert [row.protocol for row in found] == list(CLAIM["W1"].fixed)
    assert {row.verdict for row in found} == {"reproduced"}
    assert "retuned there gains" in found[0].against
    text = report.markdown(records, CLAIM)
    assert "All planned runs are recorded." in text
    (results,) = report.results(records, CLAIM)
    assert all(path.exists() for path in results.figures["starts"].plot(tmp_path / "starts"))


def test_w1_does_not_hold_where_nothing_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    records = made_up_w1(monkeypatch, 0.0)
    assert {row.verdict for row in report.verdicts(records, CLAIM)} == {"not reproduced"}
    few = [each for each in records if each["seed"] != 3]
    monkeypatch.setitem(vars(plan.EXPERIMENT), "records", few)
    assert "reported (100 of 125)" in report.verdicts(few, CLAIM)[0].against
    nothing = [each for each in records if "reported" not in each["stages"]]
    monkeypatch.setitem(vars(plan.EXPERIMENT), "records", nothing)
    (row,) = report.verdicts(nothing, CLAIM)
    assert row.verdict == "not tested"


def test_gauges_of_tools_are_found(moved) -> None:
    kinds = {gauge.kind for gauge in find_gauges(moved[0], kinds=starts.KINDS, verify=False)}
    assert kinds == {"norm_scale", "gated_rescale", "value_map", "stream_rotation"}
    assert "head.weight" in named_parameters(moved[0])


# ----------------------------------------------------------------------------------------------
# W3


def test_sizes_have_heads_of_one_width_and_valid_settings() -> None:
    ids = set()
    for size, (width, layers) in transfer_plan.SIZES.items():
        for name in transfer_plan.OPTIMIZERS:
            setting = transfer_plan.setting(name, 0.01, size)
            config = compose_alike(["+experiment=transfer", *setting.split()])
            assert isinstance(config.model, GPTConfig)
            assert (config.model.width, config.model.layers) == (width, layers)
            assert config.model.head_width == 16
            assert config.model.hidden * 64 == 172 * width
            ids.add(config.run_id)
    assert len(ids) == 6 * 6
    planned = transfer_plan.EXPERIMENT.plan("grid_w64", None)
    assert len(planned) == len({*planned}) == 6 * 6


def made_up_w3(monkeypatch: pytest.MonkeyPatch, shift: dict[str, int]) -> list[Record]:
    """Records of all stages: a parabola around a best rate, which at each larger size of an
    optimizer is a number of half decades lower than at the base.
    """
    records: list[Record] = []
    monkeypatch.setitem(vars(transfer_plan.EXPERIMENT), "records", records)
    names = {
        transfer_plan.setting(name, transfer_plan.rate(each), size): (name, size, each)
        for name in transfer_plan.OPTIMIZERS
        for size in transfer_plan.SIZES
        for each in transfer_plan.LATTICE
    }
    for stage in transfer_plan.EXPERIMENT.stages:
        for setting, seed in transfer_plan.EXPERIMENT.plan(stage, None):
            if known := transfer_plan.EXPERIMENT.recorded(setting, seed):
                known["stages"][stage] = setting
                continue
            name, size, each = names[setting]
            best = transfer_plan.OPTIMIZERS[name][2] + 3
            best -= shift.get(name, 0) if size in transfer_plan.LARGER else 0
            loss = 2 + 0.01 * seed + 0.02 * (1 + 0.1 * seed) * (each - best) ** 2
            records.append(
                {
                    "id": f"{setting} {seed}",
                    "seed": seed,
                    "stages": {stage: setting},
                    "commit": "0" * 40,
                    "summary": {"validation_loss": loss},
                    "diverged": False,
                    "seconds": 5.0,
                }
            )
    return records


def test_w3_holds_where_the_best_rate_of_others_moves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    others = [name for name in transfer_plan.OPTIMIZERS if not name.startswith("DDC")]
    records = made_up_w3(monkeypatch, dict.fromkeys(others, 3))
    outcomes = transfer_report.outcomes_of(records)
    # tuned where the parabola has its bottom, which is outside of the first round
    assert outcomes["AdamW", "w512"][0] == pytest.approx((2 + 0.02 * 9, 2.0))
    assert all(each.regret == 0 for each in outcomes["DDCAdam", "w512"].values())
    assert all(each.regret == 0 for each in outcomes["AdamW", "w64"].values())
    found = transfer_report.verdicts(records, CLAIM)
    assert [row.protocol for row in found] == list(CLAIM["W3"].fixed)
    assert {row.verdict for row in found} == {"reproduced"}
    assert {row.against for row in found} == {"–"}
    assert "All planned runs are recorded." in transfer_report.markdown(records, CLAIM)
    (results,) = transfer_report.results(records, CLAIM)
    assert all(path.exists() for path in results.figures["rates"].plot(tmp_path / "rates"))
    few = [each for each in records if each["seed"] in (0, 100)]
    monkeypatch.setitem(vars(transfer_plan.EXPERIMENT), "records", few)
    found = transfer_report.verdicts(few, CLAIM)
    assert {row.verdict for row in found} == {"not tested"}
    assert {row.against for row in found} == {"runs are missing"}


def test_w3_does_not_hold_where_ours_moves_or_nothing_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for shift in ({}, {"DDCAdam": 2, "DDCMuon": 2}):
        records = made_up_w3(monkeypatch, shift)
        found = transfer_report.verdicts(records, CLAIM)
        assert {row.verdict for row in found} == {"not reproduced"}


def test_a_run_without_a_record_is_planned_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    none = dataclasses.replace(transfer_plan.EXPERIMENT, results=tmp_path)
    monkeypatch.setattr(transfer_plan, "EXPERIMENT", none)
    with pytest.raises(ValueError, match="lacks seed 100"):
        transfer_plan.EXPERIMENT.plan("reported_w512", None)
    assert transfer_report.markdown([], CLAIM) == "No run is recorded yet.\n"
    diverged = {"diverged": True, "summary": None}
    assert own.loss_of(diverged) == own.IGNORANT


# ----------------------------------------------------------------------------------------------
# W6


def test_two_points_of_one_orbit_have_no_barrier_after_they_are_moved() -> None:
    model = make_model(GPTConfig(context=16, layers=2, width=16, heads=4, kv_heads=2, hidden=12))
    gauges = find_gauges(model, kinds="complete", verify=False)
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    params = named_parameters(other)
    for gauge in gauges:
        if gauge.kind != "stream_rotation":
            gauge.act_(params, gauge.sample(params, generator))
    new = tokens(20, 9)
    one, turned = merging.moved_together([model, other], merging.Moves.of(model))
    assert starts.difference(model, merging.average(one, turned), new) < 1e-4  # of float32
    assert starts.difference(model, merging.average(model, other), new) > 0.1


def test_pairs_are_planned_from_what_w1_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_w1(monkeypatch, 0.0)
    planned = MERGING.plan("pairs", None)
    assert len(planned) == len({*planned}) == 5 * 2 * 6
    assert all(
        f"/seed{seed % 50}/" in setting
        and compose_alike(["+experiment=merging", *setting.replace("{runs}", "runs").split()])
        for setting, seed in planned
    )


def test_w6_holds_where_moving_lowers_the_barrier() -> None:
    def pairs(gain: float) -> list[Record]:
        return [
            {"optimizer": name, "start": start, "seed": seed, "first": 2.0, "second": 2.1}
            | {"as_is": 2.5 + 0.01 * seed, "moved": 2.5 - gain * (1 + 0.1 * seed) + 0.01 * seed}
            | {"commit": "0"}
            for name in ("AdamW", "DDCAdam")
            for start in plan.STARTS
            for seed in range(5)
        ]

    assert {each.verdict for each in merging_report.verdicts(pairs(0.4), CLAIM)} == {"reproduced"}
    assert {each.verdict for each in merging_report.verdicts(pairs(-0.4), CLAIM)} == {
        "not reproduced"
    }
    few = [each for each in pairs(0.4) if each["seed"] < 2]
    assert {each.verdict for each in merging_report.verdicts(few, CLAIM)} == {"not tested"}
    assert [each.verdict for each in merging_report.verdicts([], CLAIM)] == ["not tested"]
    along = {"last": 2.0, "swa": 1.9, "swa_moved": 1.8, "ema": 1.95, "ema_moved": 1.9}
    runs = [
        {"optimizer": name, "seed": seed, "commit": "0"}
        | {k: v + 0.001 * seed for k, v in along.items()}
        for name in ("AdamW", "DDCAdam")
        for seed in range(5)
    ]
    text = merging_report.markdown(pairs(0.4), runs, CLAIM)
    assert "**holds**" in text
    assert "| DDCAdam | SWA | 5 | -0.1000 (-0.1000 to -0.1000) | -0.2000" in text
