"""Summary of an arena: win rates, strengths, agreement, raters left out; as values of the results, and as a page.

A model's value in the results is the mean over prompts of the share of its comparisons that it wins there, ties half,
so that every prompt weighs alike. Its interval resamples raters and prompts. Votes of people and of simulated raters
are never mixed: where a person voted, simulated votes are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats

from rgbench.arena.contest import Design, read_design, read_votes
from rgbench.arena.pairs import QUESTIONS
from rgbench.arena.statistics import bradley_terry, krippendorff_alpha, resample_counts, resampled_wins
from rgbench.arena.votes import Rater, Vote
from rgbench.core.errors import UsageError
from rgbench.core.io import canonical_sha256
from rgbench.core.run import provenance
from rgbench.evaluate.results import ModelResult, Run, load_result, write_values
from rgbench.judge.models import Column
from rgbench.metrics.statistics import LEVEL, NUM_RESAMPLES, wilson_interval
from rgbench.metrics.values import Family, Interval, MetricValue, Protocol, metric_info

CHECKED = ("overall", "quality")  # questions that a degraded copy answers
MIN_CHECKS, MIN_RIGHT = 4, 0.75  # answers to checks from which a rater is judged, and the share that must be right
MIN_MODELS = 4  # for a correlation
PERCENT = 100
SIMULATED = "simulated raters"  # flag of values that no person gave


@dataclass(frozen=True)
class Attention:
    """A rater with the answers to his checks.

    Attributes:
        rater: with his votes.
        right: answers that prefer the intact image.
        asked: answered checks' questions.
        why_not: why his votes do not count; "" where they do.
    """

    rater: Rater
    right: int
    asked: int
    why_not: str


@dataclass(frozen=True)
class Duel:
    """One pair of models under one question: votes for the first, for the second, and ties."""

    first: str
    second: str
    won: int
    lost: int
    ties: int

    @property
    def rate(self) -> float:
        """Share that the first wins; ties half."""
        return (self.won + self.ties / 2) / (self.won + self.lost + self.ties)

    @property
    def interval(self) -> Interval:
        """Wilson interval of the rate."""
        return wilson_interval(self.won + self.ties / 2, self.won + self.lost + self.ties)


@dataclass(frozen=True)
class Standing:
    """One model under one question.

    Attributes:
        model: name.
        votes: comparisons with other models.
        ties: among them.
        rate: share that it wins; ties half.
        wilson: interval of the rate, as if votes were independent.
        strength: ln of Bradley–Terry's π; all models' mean is 0.
        strength_interval: resampled over raters and prompts.
        share: mean over prompts of the rate.
        share_interval: resampled over raters and prompts.
        by_prompt: rate by position of the prompt, where there are votes.
    """

    model: str
    votes: int
    ties: int
    rate: float
    wilson: Interval
    strength: float
    strength_interval: Interval
    share: float
    share_interval: Interval
    by_prompt: dict[int, float]


@dataclass(frozen=True)
class Tally:
    """What the raters say to one question.

    Attributes:
        question: name.
        standings: best first; models without a vote are left out.
        duels: of every pair with votes.
        alpha: Krippendorff's; None where no two raters answered one comparison.
        shared: comparisons with two answers or more.
    """

    question: str
    standings: tuple[Standing, ...]
    duels: tuple[Duel, ...]
    alpha: float | None
    shared: int


@dataclass(frozen=True)
class Correlation:
    """How one metric orders the arena's models as people do: Spearman's ρ, Pearson's r, over ``num`` models."""

    column: Column
    spearman: float
    pearson: float
    num: int


@dataclass(frozen=True, eq=False)
class Summary:
    """Everything that an arena says.

    Attributes:
        design: of the arena.
        raters: everybody, counted or not.
    """

    design: Design
    raters: tuple[Attention, ...]

    @cached_property
    def counted(self) -> tuple[Rater, ...]:
        """Raters whose votes count."""
        return tuple(each.rater for each in self.raters if not each.why_not)

    @property
    def simulated(self) -> bool:
        """Whether no person's vote counts."""
        return all(rater.kind == "simulated" for rater in self.counted)

    @cached_property
    def votes(self) -> tuple[Vote, ...]:
        """Votes that count, without checks."""
        return tuple(vote for rater in self.counted for vote in rater.votes.values() if not vote.check)

    @cached_property
    def tallies(self) -> tuple[Tally, ...]:
        """One for each question that has votes."""
        asked = {vote.question for vote in self.votes}
        return tuple(_tally(self, question) for question in QUESTIONS if question in asked)

    @property
    def left(self) -> tuple[int, int]:
        """Votes for the left image, of all that are no ties: half of them where the side does not matter."""
        decided = [vote for vote in self.votes if vote.answer != "tie"]
        return sum(vote.answer == "left" for vote in decided), len(decided)

    @cached_property
    def results(self) -> dict[str, ModelResult]:
        """The stored results of the models that have one."""
        folders = {model.name: Path(model.result) for model in self.design.models if model.result}
        return {name: load_result(folder) for name, folder in folders.items() if folder.is_dir()}

    @cached_property
    def correlations(self) -> tuple[Correlation, ...]:
        """Of every metric with people's overall preference, the strongest first; none for fewer than four models."""
        overall = next((tally for tally in self.tallies if tally.question == "overall"), None)
        people = {standing.model: standing.share for standing in overall.standings} if overall else {}
        found = (_correlation(column, people, self.results) for column in _columns(self.results.values()))
        return tuple(sorted((each for each in found if each), key=lambda each: -each.spearman))


def summarise(folder: Path) -> Summary:
    """Read an arena's votes; a server may be running.

    Raises:
        UsageError: no arena there, no vote, or a damaged file.
    """
    design = read_design(folder)
    raters = tuple(_attention(rater) for rater in read_votes(folder, design).raters.values())
    if any(each.rater.kind == "person" and not each.why_not and each.rater.votes for each in raters):
        mixed = "simulated, and people voted"
        raters = tuple(
            Attention(each.rater, each.right, each.asked, mixed) if each.rater.kind == "simulated" else each
            for each in raters
        )
    found = Summary(design, raters)
    if not found.votes:
        left_out = sum(bool(each.why_not) for each in raters)
        raise UsageError(f"{folder}: no vote that counts yet ({len(raters)} raters, {left_out} of them left out)")
    return found


def _attention(rater: Rater) -> Attention:
    answers = [vote for vote in rater.votes.values() if vote.check and vote.question in CHECKED]
    right = sum(vote.winner == vote.pair[0] for vote in answers)
    failed = rater.kind == "person" and len(answers) >= MIN_CHECKS and right < MIN_RIGHT * len(answers)
    return Attention(rater, right, len(answers), "fails attention checks" if failed else "")


# One question


def _tally(summary: Summary, question: str) -> Tally:
    votes = [vote for vote in summary.votes if vote.question == question]
    models = list(summary.design.names)
    prompts = {(prompt.id, prompt.seed): i for i, prompt in enumerate(summary.design.prompts)}
    raters = {rater.name: i for i, rater in enumerate(summary.counted)}
    who = np.array([raters[vote.rater] for vote in votes])
    what = np.array([prompts[vote.prompt, vote.seed] for vote in votes])
    wins = np.array([_wins(vote, models) for vote in votes])
    total = wins.sum(0)
    counts = resample_counts(len(raters), len(prompts))
    strength = bradley_terry(total)
    resampled = bradley_terry(resampled_wins(wins, who, what, counts))
    standings = []
    for m, model in enumerate(models):
        own = np.array([model in vote.pair for vote in votes])
        if not own.any():
            continue
        games, won = int(own.sum()), float(total[m].sum())
        share, shares, by_prompt = _shares(wins[own, m].sum(-1), who[own], what[own], counts)
        standings.append(
            Standing(
                model=model,
                votes=games,
                ties=sum(vote.answer == "tie" and model in vote.pair for vote in votes),
                rate=won / games,
                wilson=wilson_interval(won, games),
                strength=float(strength[m]),
                strength_interval=_percentiles(resampled[:, m]),
                share=share,
                share_interval=_percentiles(shares),
                by_prompt=by_prompt,
            )
        )
    units = _units(votes)
    return Tally(
        question=question,
        standings=tuple(sorted(standings, key=lambda each: -each.strength)),
        duels=tuple(duel for pair in combinations(models, 2) if (duel := _duel(pair, votes)) is not None),
        alpha=krippendorff_alpha(units),
        shared=sum(len(unit) > 1 for unit in units),
    )


def _wins(vote: Vote, models: Sequence[str]) -> np.ndarray:
    """(M, M): 1 for the winner over the loser, ½ each way for a tie."""
    found = np.zeros((len(models), len(models)))
    first, second = map(models.index, vote.pair)
    winner = vote.winner
    found[first, second] = 0.5 if winner is None else float(winner == vote.pair[0])
    found[second, first] = 1 - found[first, second]
    return found


def _shares(
    won: np.ndarray, who: np.ndarray, what: np.ndarray, counts: tuple[np.ndarray, np.ndarray]
) -> tuple[float, np.ndarray, dict[int, float]]:
    """Mean over prompts of a model's win rate; the same of resamples; the rate of each prompt."""
    shape = (counts[0].shape[1], counts[1].shape[1])
    wins, games = np.zeros(shape), np.zeros(shape)
    np.add.at(wins, (who, what), won)
    np.add.at(games, (who, what), 1)
    asked = np.flatnonzero(games.sum(0))
    rates = wins.sum(0)[asked] / games.sum(0)[asked]
    drawn, seen = counts[0] @ wins[:, asked], counts[0] @ games[:, asked]
    weights = counts[1][:, asked] * (seen > 0)
    total = weights.sum(1)
    sums = (weights * drawn / np.maximum(seen, 1)).sum(1)
    resampled = sums[total > 0] / total[total > 0]
    return float(rates.mean()), resampled, dict(zip(asked.tolist(), rates.tolist(), strict=True))


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    method = f"bootstrap over raters and prompts, {NUM_RESAMPLES}"
    return Interval(low=float(low), high=float(high), level=LEVEL, method=method)


def _units(votes: Sequence[Vote]) -> list[list[str]]:
    """Answers to each comparison."""
    found: dict[tuple[object, ...], list[str]] = {}
    for vote in votes:
        found.setdefault((vote.pair, vote.prompt, vote.seed), []).append(vote.winner or "")
    return list(found.values())


def _duel(pair: tuple[str, str], votes: Sequence[Vote]) -> Duel | None:
    winners = [vote.winner for vote in votes if vote.pair == pair]
    won, lost = winners.count(pair[0]), winners.count(pair[1])
    return Duel(*pair, won, lost, len(winners) - won - lost) if winners else None


# Against metrics


def _columns(results: Iterable[ModelResult]) -> list[Column]:
    found: dict[tuple[str, str], Column] = {}
    for result in results:
        for value in result.values:
            info = metric_info(value.metric, result.head.metrics)
            if info.family is not Family.PEOPLE:
                found.setdefault(value.key, Column(value.metric, value.protocol, info, value.reference))
    return list(found.values())


def _correlation(column: Column, people: dict[str, float], results: dict[str, ModelResult]) -> Correlation | None:
    pairs = []
    for model, share in people.items():
        value = results[model].by_key.get(column.key) if model in results else None
        if value is not None and value.value is not None and (oriented := column.oriented(value.value)) is not None:
            pairs.append((oriented, share))
    ours, theirs = np.array(pairs).reshape(-1, 2).T
    if len(pairs) < MIN_MODELS or not ours.std() or not theirs.std():
        return None
    pearson = float(np.corrcoef(ours, theirs)[0, 1])
    return Correlation(column, float(stats.spearmanr(ours, theirs).statistic), pearson, len(pairs))


# In the results


def store(summary: Summary, command: str) -> list[Path]:
    """Write people's preferences beside the other values of each model that has a result.

    Args:
        summary: of the arena.
        command: that is recorded.

    Returns:
        Folders of the results.
    """
    run = Run(command=command, provenance=provenance())
    written = []
    for model, result in summary.results.items():
        assert result.folder is not None
        groups = _groups(result)
        for tally in summary.tallies:
            found = next((each for each in tally.standings if each.model == model), None)
            if found is not None:
                prompts = [summary.design.prompts[i] for i in found.by_prompt]
                keys = [(p.id, p.seed, groups.get((p.id, p.seed), "")) for p in prompts]
                value = _value(summary, tally, found)
                write_values(result.folder.parents[2], result.head, run, [value], keys)
        written.append(result.folder)
    return written


def _value(summary: Summary, tally: Tally, standing: Standing) -> MetricValue:
    interval = standing.share_interval
    return MetricValue(
        metric=f"people_{tally.question}",
        protocol=_protocol(summary, tally.question),
        value=PERCENT * standing.share,
        interval=interval.model_copy(update={"low": PERCENT * interval.low, "high": PERCENT * interval.high}),
        num_images=len(standing.by_prompt),
        flags=(SIMULATED,) if summary.simulated else (),
        extra={
            "votes": standing.votes,
            "ties": standing.ties,
            "raters": len(summary.counted),
            "strength": standing.strength,
            "alpha": tally.alpha,
        },
        rows=PERCENT * np.array(list(standing.by_prompt.values())),
    )


def _protocol(summary: Summary, question: str) -> Protocol:
    """What may be compared: values of one arena alone, since a win rate depends on whom one meets."""
    design = summary.design
    prompts = [[prompt.id, prompt.seed, prompt.text] for prompt in design.prompts]
    fields = {
        "prompts": {"num": len(design.prompts), "sha256": canonical_sha256(prompts)},
        "arena": design.id,
        "models": list(design.names),
        "question": QUESTIONS[question],
        "raters": "simulated" if summary.simulated else "people",
        "ties": "half a win",
    }
    return Protocol.of(f"people_{question}", fields)


def _groups(result: ModelResult) -> dict[tuple[str, int], str]:
    """Groups of prompts, as other values of the model have them."""
    stored = (result.rows(*value.key) for value in result.values)
    return {(prompt, seed): group for rows in stored if rows is not None for prompt, seed, group in rows.keys}
