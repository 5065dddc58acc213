"""Votes are on disk when they are confirmed, and count once; what raters are asked is balanced."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rgbench.arena.pairs import CHECK_EVERY, DEGRADED, plan
from rgbench.arena.votes import NameTaken, OtherAnswer, Vote, Votes, held
from rgbench.core.errors import UsageError


def vote(number: int, answer: str = "left", rater: str = "anna") -> Vote:
    return Vote(
        id=f"{rater} {number}", rater=rater, pair=("a", "b"), prompt=f"p/{number}", seed=0, question="overall",
        left="b", answer=answer, time="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def stored(folder: Path) -> dict[str, Vote]:
    """What another process finds."""
    return next(iter(Votes(folder, "x").raters.values())).votes


def test_what_is_confirmed_is_on_disk(tmp_path):
    rater = Votes(tmp_path, "x").join("anna")
    for number in range(5):
        assert rater.add([vote(number)]) == 1
        assert len(stored(tmp_path)) == number + 1, "nothing waits for a close"


def test_a_vote_twice_counts_once_and_another_answer_is_refused(tmp_path):
    rater = Votes(tmp_path, "x").join("anna")
    assert [rater.add([vote(1)]), rater.add([vote(1)])] == [1, 0]
    with pytest.raises(OtherAnswer):
        rater.add([vote(2), vote(1, "right")])
    assert list(stored(tmp_path)) == ["anna 1"]


@pytest.mark.parametrize(("cut", "more"), [(1, b""), (60, b""), (10, b"\0" * 500)])
def test_a_line_that_was_cut_is_given_again(tmp_path, cut, more):
    rater = Votes(tmp_path, "x").join("anna")
    rater.add([vote(1), vote(2)])
    rater.path.write_bytes(rater.path.read_bytes()[:-cut] + more)
    again = Votes(tmp_path, "x").raters["anna"]
    assert list(again.votes) == ["anna 1"]
    again.add([vote(2, "right")])
    assert [v.answer for v in stored(tmp_path).values()] == ["left", "right"]
    data = rater.path.read_bytes()
    assert data.count(b"\n") == 3 and data.endswith(b"\n"), "nothing of the cut line is left"


def test_a_rater_whose_first_line_was_cut_joins_again(tmp_path):
    rater = Votes(tmp_path, "x").join("anna")
    rater.path.write_bytes(rater.path.read_bytes()[:20])
    votes = Votes(tmp_path, "x")
    assert votes.raters == {}
    votes.join("anna").add([vote(1)])
    assert list(stored(tmp_path)) == ["anna 1"]


def test_damage_before_the_end_is_named(tmp_path):
    rater = Votes(tmp_path, "x").join("anna")
    rater.add([vote(1), vote(2)])
    lines = rater.path.read_text().splitlines(keepends=True)
    rater.path.write_text(lines[0] + lines[1].replace("left", "lost") + lines[2])
    with pytest.raises(UsageError, match=r"anna.jsonl:2"):
        Votes(tmp_path, "x")


def test_votes_of_another_arena_are_refused(tmp_path):
    Votes(tmp_path, "x").join("anna")
    with pytest.raises(UsageError, match="another arena"):
        Votes(tmp_path, "y")


def test_names_are_taken_once_and_make_files_of_their_own(tmp_path):
    votes = Votes(tmp_path, "x")
    names = ["anna", "a/b", "a_b", "../../anna", "<b>anna</b>", "Anna", "안나", "." * 9]
    for name in names:
        votes.join(name)
    with pytest.raises(NameTaken):
        votes.join("anna")
    again = Votes(tmp_path, "x")
    assert sorted(rater.name for rater in again.raters.values()) == sorted(names)
    assert all(rater.path.parent == tmp_path for rater in again.raters.values())


def test_several_threads_lose_nothing(tmp_path):
    votes = Votes(tmp_path, "x")
    raters = [votes.join(name) for name in ("anna", "ben")]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: raters[n % 2].add([vote(n, rater=raters[n % 2].name)]), range(200)))
    found = Votes(tmp_path, "x").raters
    assert [len(found[name].votes) for name in ("anna", "ben")] == [100, 100]


def test_one_process_alone_adds_votes(tmp_path):
    with held(tmp_path), pytest.raises(UsageError, match="another process"), held(tmp_path):
        raise AssertionError
    with held(tmp_path):
        pass


@pytest.mark.parametrize(("left", "answer", "winner"), [
    ("a", "left", "a"), ("a", "right", "b"), ("b", "left", "b"), ("b", "right", "a"), ("a", "tie", None),
])  # fmt: skip
def test_the_winner_is_what_stood_on_the_preferred_side(left, answer, winner):
    assert vote(1).model_copy(update={"left": left, "answer": answer}).winner == winner


def test_every_pair_meets_on_every_prompt_once_sides_by_turns():
    asked = [each for each in plan(["a", "b", "c"], 10, 0, "anna") if not each.check]
    assert Counter((each.pair, each.prompt) for each in asked).most_common(1)[0][1] == 1 and len(asked) == 30
    for stop in (6, 12, 18, 30):
        so_far = Counter(each.pair for each in asked[:stop])
        assert len(set(so_far.values())) == 1, "wherever a rater stops, pairs have equally many votes"
        left = Counter((each.pair, each.left) for each in asked[:stop])
        assert max(left.values()) - min(left.values()) == 0


def test_checks_are_planted_among_comparisons():
    asked = plan(["a", "b"], 50, 0, "anna")
    blocks = [asked[start : start + CHECK_EVERY] for start in range(0, len(asked), CHECK_EVERY)]
    assert all(sum(each.check for each in block) == 1 for block in blocks)
    checks = [each for each in asked if each.check]
    assert {each.pair for each in checks} == {("a", DEGRADED), ("b", DEGRADED)}
    assert {each.left == DEGRADED for each in checks} == {True, False}


def test_the_order_is_the_raters_own_and_stays():
    assert plan(["a", "b"], 20, 0, "anna") == plan(["a", "b"], 20, 0, "anna")
    assert plan(["a", "b"], 20, 0, "anna") != plan(["a", "b"], 20, 0, "ben")
    assert plan(["a", "b"], 20, 0, "anna") != plan(["a", "b"], 20, 1, "anna")
