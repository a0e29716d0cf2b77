"""The claims of the paper, and our own, as data, and the one rule by which effects become a
verdict.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddc.report.stages import table
from ddc.report.statistics import TESTED_FROM

#: Fewer seeds than this show nothing.
SHOWN_FROM = 3
FEW_SEEDS = (
    "Below five paired seeds nothing is tested: three or four that all agree are *direction only*"
    " at most, fewer are *not tested*."
)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and what counts as reproducing it; or one of our own, and what it takes
    to hold.

    Attributes:
        id: C1 to C9; W1 and so on, of our own.
        title: in words.
        paper: the paper's figures, as text.
        values: the same as numbers, by optimizer.
        where: where they stand.
        experiment: the folder of ``experiments`` that tests it.
        metric: what is measured.
        comparison: what is compared with what.
        protocols: by name, in words.
        reproduced: rule for this verdict.
        direction_only: likewise; whatever is neither is not reproduced.
        level: p-values below it count.
        fixed: when this rule was written, relative to the runs, by protocol as the main table names
            it.
        enough: share of the paper's effect that *reproduced* needs; 0 where the rule has no such
            number.
        own: whether it is ours. Its verdicts have words of their own (:data:`OWN`).
    """

    id: str
    title: str
    paper: str
    values: dict[str, float]
    where: str
    experiment: str
    metric: str
    comparison: str
    protocols: dict[str, str]
    reproduced: str
    direction_only: str
    level: float
    fixed: dict[str, str]
    enough: float = 0.0
    own: bool = False


#: The verdicts on our own claims, by those on the paper's.
OWN = {"reproduced": "holds", "not reproduced": "does not hold"}


@dataclass(frozen=True)
class Effect:
    """What an experiment found on one quantity.

    Attributes:
        direction: 1 if it is shown in the paper's direction, -1 in the other, 0 if neither is
            shown; None if there are too few seeds to show anything.
        enough: whether it is as large as *reproduced* asks for.
    """

    direction: int | None
    enough: bool = True


@dataclass(frozen=True)
class Verdict:
    """A row of the main table.

    Attributes:
        claim: its id.
        protocol: matched or tuned, or what else the claim has.
        ours: our figures, as text, with a 95% interval.
        p: adjusted p-value or values, as text.
        seeds: how many.
        tested: whether a test decided, or why not.
        scale: model and data in a few words.
        verdict: reproduced, direction only, not reproduced, or not tested.
        against: what is known against it, from the same records.
    """

    claim: str
    protocol: str
    ours: str
    p: str
    seeds: str
    tested: str
    scale: str
    verdict: str
    against: str = "–"


def load_claims(experiments: Path) -> dict[str, Claim]:
    """The claims by id, in its order: those of ``claim.yaml`` in each folder of a folder.

    Raises:
        ValueError: a claim that lacks a key, has an unknown one, or a value of another type; or two
            of one id.
    """
    claims: dict[str, Claim] = {}
    for path in sorted(experiments.glob("*/claim.yaml")):
        entries: Any = OmegaConf.load(path)
        for name, entry in entries.items():
            if name in claims:
                raise ValueError(
                    f"{path}, {name}: {claims[name].experiment} has a claim {name} too"
                )
            derived = {"id": name, "experiment": path.parent.name}
            try:
                merged = OmegaConf.merge(OmegaConf.structured(Claim), entry, derived)
                claims[name] = cast(Claim, OmegaConf.to_object(merged))
            except OmegaConfBaseException as error:
                raise ValueError(f"{path}, {name}: {str(error).splitlines()[0]}") from error
    return {name: claims[name] for name in sorted(claims)}


def effect(
    advantages: Sequence[float], p: float | None, level: float, enough: bool = True
) -> Effect:
    """What paired differences show.

    From :data:`~ddc.report.statistics.TESTED_FROM` seeds on, a direction is shown if p < ``level``.
    Below, nothing is tested: a direction is shown only if three or four seeds all agree, and it is
    never enough for *reproduced*. One or two seeds show nothing. :data:`FEW_SEEDS` says so beside
    every verdict.

    Args:
        advantages: by seed, positive in the paper's direction.
        p: of their mean, adjusted; None where it was not tested.
        level: p-values below it count.
        enough: whether the mean is as large as *reproduced* asks for.
    """
    if len(advantages) < SHOWN_FROM:
        return Effect(None, enough=False)
    if p is None or len(advantages) < TESTED_FROM:
        agree = [sign for sign in (1, -1) if all(sign * each > 0 for each in advantages)]
        return Effect(agree[0] if agree else 0, enough=False)
    mean = statistics.mean(advantages)
    return Effect(0 if p >= level or mean == 0 else 1 if mean > 0 else -1, enough)


def verdict(effects: Sequence[Effect]) -> str:
    """Reproduced: all effects shown in the paper's direction, and enough. Direction only: some, and
    none against it.
    """
    directions = [each.direction for each in effects if each.direction is not None]
    if not directions or len(directions) < len(effects):
        return "not tested"
    if min(directions) < 0 or max(directions) <= 0:
        return "not reproduced"
    return (
        "reproduced"
        if min(directions) > 0 and all(each.enough for each in effects)
        else "direction only"
    )


def tested(p: float | None) -> str:
    """Whether there were seeds enough for a test of paired differences, in a word of the main
    table.
    """
    return "yes" if p is not None else f"no: fewer than {TESTED_FROM} seeds"


def not_complete(claim: Claim, protocols: Sequence[str], scale: str) -> list[Verdict]:
    """One row for all protocols whose runs are missing, by name where others have runs; none where
    there is no such protocol.
    """
    if not protocols:
        return []
    of_some = {*protocols} < {*claim.fixed}
    ours = "the runs are not complete" + (f": {'; '.join(protocols)}" if of_some else "")
    return [Verdict(claim.id, "–", ours, "–", "–", "–", scale, "not tested")]


def verdict_table(claims: Mapping[str, Claim], verdicts: Iterable[Verdict]) -> str:
    """The paper's figures beside ours, in the order of the claims."""
    verdicts = list(verdicts)
    header = [
        "claim",
        "paper",
        "protocol",
        "ours (95%)",
        "p (Holm)",
        "seeds",
        "tested",
        "rule written",
        "scale",
    ]
    header += ["known against it", "verdict"]
    rows = [
        [
            *(
                f"{claim.id}: {claim.title}",
                claim.paper,
                v.protocol,
                v.ours,
                v.p,
                v.seeds,
                v.tested,
            ),
            *(claim.fixed.get(v.protocol, "–"), v.scale, v.against),
            f"**{words_of(claim, v)}**",
        ]
        for claim in claims.values()
        for v in verdicts
        if v.claim == claim.id
    ]
    return table(header, rows, left=len(header))


def short_table(claims: Mapping[str, Claim], verdicts: Iterable[Verdict]) -> str:
    """One row a claim: what the paper has, if it is the paper's, and its protocols by verdict."""
    verdicts, own = list(verdicts), all(claim.own for claim in claims.values())
    rows = []
    for claim in claims.values():
        by_verdict: dict[str, list[str]] = {}
        for v in verdicts:
            if v.claim == claim.id:
                named = by_verdict.setdefault(words_of(claim, v), [])
                is_named = v.protocol in (claim.protocols if own else claim.fixed)
                named += [v.protocol.removeprefix("against ")] * is_named
        cells = [
            f"**{each}**: {'; '.join(named)}" if named else f"**{each}**"
            for each, named in by_verdict.items()
        ]
        paper = [] if own else [claim.paper]
        rows.append([f"{claim.id}: {claim.title}", *paper, ". ".join(cells)])
    if own:
        return table(["claim", "verdict, by comparison"], rows, left=2)
    return table(["claim", "paper", "verdict, by protocol"], rows, left=3)


def words_of(claim: Claim, verdict: Verdict) -> str:
    """A verdict in the words of the claim."""
    return OWN.get(verdict.verdict, verdict.verdict) if claim.own else verdict.verdict


def rule(claim: Claim) -> str:
    """The rule of a claim's verdict in a sentence."""
    yes, no = ("Holds", "does not hold") if claim.own else ("Reproduced", "not reproduced")
    return (
        f"{claim.id}: {claim.metric}; {claim.comparison}. *{yes}*: {claim.reproduced}."
        f" *Direction only*: {claim.direction_only}. Else {no}. Rule written"
        f" {'; '.join(f'{when} ({protocol})' for protocol, when in claim.fixed.items())}."
    )
