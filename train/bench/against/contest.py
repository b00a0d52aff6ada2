"""Two sides that do the same work in turns, and what follows: figures, ratios, the share of what is possible."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from train.bench.against.bound import Needed, Roof, measure_roof

Better = Literal["higher", "lower"]


class Part(NamedTuple):
    """A piece of a round.

    run   does it; returns the seconds that it took, or, where `work` is None, the figure itself
    work  how much of the row's unit it does, such as examples or tokens
    """

    run: Callable[[], float]
    work: float | None


@dataclass(frozen=True)
class Side:
    """One side of a contest: its name, and the parts of a round, which are done in order."""

    name: str
    parts: Sequence[Part]

    def figure(self, values: Sequence[float]) -> float:
        """The figure of a round: work per second, or what the parts returned themselves."""
        work = [part.work for part in self.parts if part.work is not None]
        return sum(work) / sum(values) if work else sum(values)


@dataclass(frozen=True)
class Contest:
    """What a row measures.

    ours        our side
    theirs      the opponent's ways to do it; the best of one round each is measured
    checked     what was found equal on both sides before
    needed      arithmetic and traffic that no implementation can avoid in our round; None if that is not the limit
    limited_by  what limits our side, if `needed` does not say
    """

    ours: Side
    theirs: Sequence[Side]
    checked: Mapping[str, Any] = field(default_factory=dict)
    needed: Needed | None = None
    limited_by: str = ""


class Pair(NamedTuple):
    """A round of both sides, in turns; `share` is our share of the bound, None without one."""

    ours: float
    theirs: float
    share: float | None

    @property
    def ratio(self) -> float:
        """Ours over theirs."""
        return self.ours / self.theirs


def hold(contest: Contest, pairs: int, better: Better, advance: Callable[[], None]) -> dict[str, Any]:
    """Choose the opponent's best way, warm up, and measure.

    Args:
        contest: the two sides.
        pairs: number of rounds of both, after the rounds that warm up.
        better: which of two figures is the better one.
        advance: called after every part.

    Returns:
        As JSON: both sides' figures and medians, the ratio with its spread, the bound.
    """
    tried = {side.name: side.figure(_round(side, advance)) for side in _warmed_up(contest)}
    ways = {side.name: side for side in contest.theirs}
    pick = max if better == "higher" else min
    best = pick(ways, key=lambda name: tried.get(name, 0.0))
    roofs, measured = [], []
    for number in range(pairs):
        if contest.needed:
            roofs.append(measure_roof())
        measured.append(_pair(contest, ways[best], roofs[-1] if roofs else None, bool(number % 2), advance))
    tried.pop(contest.ours.name, None)
    return _result(contest, best, measured, roofs) | ({"tried": tried} if len(tried) > 1 else {})


def parts_of(contest: Contest, pairs: int) -> int:
    """How often `hold` advances, at most."""
    longest = max(len(side.parts) for side in contest.theirs)
    return sum(len(side.parts) for side in _warmed_up(contest)) + pairs * (len(contest.ours.parts) + longest)


def _warmed_up(contest: Contest) -> list[Side]:
    """The sides that do a round before: all if time is measured, and ways to choose from."""
    timed = contest.ours.parts[0].work is not None
    return [*([contest.ours] if timed else []), *(contest.theirs if timed or len(contest.theirs) > 1 else [])]


def _round(side: Side, advance: Callable[[], None]) -> list[float]:
    values = []
    for part in side.parts:
        values.append(part.run())
        advance()
    return values


def _pair(contest: Contest, theirs: Side, roof: Roof | None, swap: bool, advance: Callable[[], None]) -> Pair:
    """A round of both sides, part by part in turns, so that a machine that is busy for a while slows both."""
    sides = (theirs, contest.ours) if swap else (contest.ours, theirs)
    turns = sorted(
        ((number + 0.5) / len(side.parts), which, side, part)
        for which, side in enumerate(sides)
        for number, part in enumerate(side.parts)
    )
    values: dict[str, list[float]] = {side.name: [] for side in sides}
    for _, _, side, part in turns:
        values[side.name].append(part.run())
        advance()
    ours, other = contest.ours.figure(values[contest.ours.name]), theirs.figure(values[theirs.name])
    share = None
    if roof is not None and contest.needed is not None:
        share = contest.needed.seconds(roof) / sum(values[contest.ours.name])
    return Pair(ours, other, share)


def _result(contest: Contest, best: str, measured: Sequence[Pair], roofs: Sequence[Roof]) -> dict[str, Any]:
    """The measured pairs as JSON."""
    ratios = [pair.ratio for pair in measured]
    result: dict[str, Any] = {
        "ours": _figures(contest.ours.name, [pair.ours for pair in measured]),
        "theirs": _figures(best, [pair.theirs for pair in measured]),
        "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        "checked": dict(contest.checked),
        "limited_by": contest.limited_by,
    }
    if contest.needed and roofs:
        roof = Roof(*(statistics.median(values) for values in zip(*roofs, strict=True)))
        shares = [pair.share for pair in measured if pair.share is not None]
        result["limited_by"] = contest.needed.limit(roof)
        result["bound"] = {
            "share": statistics.median(shares),
            "figure": contest.ours.figure([contest.needed.seconds(roof)]),
            "needed_flops": contest.needed.flops,
            "needed_bytes": contest.needed.bytes,
            "matmul_flops": roof.flops,
            "bandwidth": roof.bandwidth,
        }
    return result


def _figures(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {"name": name, "median": statistics.median(values), "figures": list(values)}
