"""An arena from images to the report: models, exported pages, raters left out, people beside other metrics."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rgbench.arena import simulated
from rgbench.arena.contest import Contest, Sources, find_entrants, open_contest
from rgbench.arena.page import export_page
from rgbench.arena.report import write_report
from rgbench.arena.simulated import vote_simulated
from rgbench.arena.summary import store, summarise
from rgbench.arena.votes import Rater, Vote
from rgbench.core.errors import UsageError
from rgbench.core.io import seal
from rgbench.data.prompts import benchtop_prompts
from rgbench.evaluate.results import Generation, Head, Run, SheetImage, load_result, write_sheet, write_values
from rgbench.judge.models import load_result_sets
from rgbench.metrics.values import Family, MetricValue, Protocol, identify
from rgbench.models.presets import REGRESSORS_FOLDER
from rgbench.report.report import report
from tests.arena_maker import make_images, make_models, opened
from tests.history.plausible import write_model

MARKUP = "<b>anna</b> | *x*"


def answer(contest: Contest, rater: Rater, choose: Callable[[Vote], str]) -> None:
    """Answer everything that a rater is asked."""
    votes = []
    for ticket in contest.tasks(rater.name):
        vote = contest.vote(rater, ticket, "left")
        assert vote is not None
        chosen = choose(vote)
        side = "tie" if not chosen else "left" if chosen == vote.left else "right"
        votes.append(vote.model_copy(update={"answer": side}))
    rater.add(votes)


def attentive(vote: Vote) -> str:
    """The intact image; of two models the first by name; of every third prompt neither."""
    if vote.check:
        return vote.pair[0]
    return "" if vote.prompt in ("0", "3") else min(vote.pair)


def careless(vote: Vote) -> str:
    return vote.left


# What was tampered with


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> Path:
    """An arena that anna answered."""
    root = tmp_path_factory.mktemp("answered")
    with opened(root, make_models(root, num=2)) as contest:
        answer(contest, contest.votes.join("anna"), attentive)
    return root / "arena"


def changed_vote(**fields: object) -> Callable[[Path], None]:
    """Change anna's first vote that is no check, as somebody with an editor would: sealed again."""

    def spoil(arena: Path) -> None:
        file = arena / "votes" / "anna.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        at = next(i for i, row in enumerate(rows) if not row.get("check", True))
        del rows[at]["sha256"]
        rows[at] = seal({**rows[at], **fields})
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed_vote(pair=["alpha-model", "gamma"]), "is not asked in this arena"),
        (changed_vote(pair=["beta-model", "alpha-model"]), "is not asked in this arena"),
        (changed_vote(pair=["alpha-model", "degraded copy"]), "is not asked in this arena"),
        (changed_vote(left="gamma"), "is not asked in this arena"),
        (changed_vote(prompt="99"), "on '99' is not asked in this arena"),
        (changed_vote(seed=7), "is not asked in this arena"),
        (changed_vote(question="beauty"), "'beauty' of"),
        (changed_vote(rater="bob"), r"anna\.jsonl:\d+: another rater's vote"),
        (
            lambda arena: copy_of_anna(arena, "anna (1).jsonl"),
            r"anna \(1\)\.jsonl: votes of anna, which",
        ),
        (lambda arena: copy_of_anna(arena, "ANNA.jsonl"), "votes of anna, which belong into anna.jsonl"),
        (lambda arena: (arena / "votes" / "x.jsonl").mkdir(), r"x\.jsonl: not a file of votes"),
        (lambda arena: (arena / "votes" / "x.jsonl").symlink_to("nowhere"), r"x\.jsonl: not a file of votes"),
    ],
)
def test_votes_that_the_arena_never_asked_for_are_named(answered, tmp_path, spoil, message):
    arena = Path(shutil.copytree(answered, tmp_path / "arena"))
    spoil(arena)
    with pytest.raises(UsageError, match=message):
        summarise(arena)
    with pytest.raises(UsageError, match=message), open_contest(arena, None, 0):
        pass


def copy_of_anna(arena: Path, name: str) -> None:
    shutil.copy(arena / "votes" / "anna.jsonl", arena / "votes" / name)


def test_a_second_answer_under_another_ticket_is_named(answered, tmp_path):
    arena = Path(shutil.copytree(answered, tmp_path / "arena"))
    file = arena / "votes" / "anna.jsonl"
    before = file.read_text()
    changed_vote(id="f" * 32)(arena)
    file.write_text(before + "".join(set(file.read_text().splitlines(True)) - set(before.splitlines(True))))
    with pytest.raises(UsageError, match=r"anna\.jsonl: .* is answered twice; remove the line"):
        summarise(arena)


def test_hidden_files_beside_votes_are_none(answered, tmp_path):
    arena = Path(shutil.copytree(answered, tmp_path / "arena"))
    before = summarise(arena).votes
    copy_of_anna(arena, "._anna.jsonl")
    assert summarise(arena).votes == before


@pytest.mark.parametrize("secret", [None, b"", b"0" * 64, b"0" * 63, b"0" * 64 + b"\n"])
def test_without_the_secret_that_signed_its_votes_an_arena_asks_nothing(answered, tmp_path, secret):
    """Under another one every question would be asked, and every vote counted, again."""
    arena = Path(shutil.copytree(answered, tmp_path / "arena"))
    (arena / "secret").unlink()
    if secret is not None:
        (arena / "secret").write_bytes(secret)
    message = "secret: (missing or damaged|did not sign the votes of anna)"
    with pytest.raises(UsageError, match=message), open_contest(arena, None, 0):
        pass
    assert (arena / "secret").exists() == (secret is not None)


# What meets


def test_different_prompts_are_refused_by_name(tmp_path):
    make_images(tmp_path / "one", 4)
    make_images(tmp_path / "two", 4, texts=["other"] * 4)
    with pytest.raises(UsageError, match="one and two have different prompts"):
        find_entrants(Sources(models=(str(tmp_path / "one"), str(tmp_path / "two"))))


def test_a_longer_list_is_cut_by_num_alone(tmp_path):
    sources = Sources(models=(str(make_images(tmp_path / "one", 4)), str(make_images(tmp_path / "two", 6))))
    with pytest.raises(UsageError, match=r"one and two have different prompts \(4 and 6 images\)"):
        find_entrants(sources)


def test_sizes_that_tell_models_apart_are_refused(tmp_path):
    models = (make_images(tmp_path / "one", 2), make_images(tmp_path / "two", 2, side=48))
    with pytest.raises(UsageError, match="32×32 and 48×48"):
        find_entrants(Sources(models=tuple(map(str, models))))


@pytest.mark.parametrize("given", [(), ("one",), ("one", "one"), ("one", "nobody")])
def test_an_arena_needs_two_models_that_exist(tmp_path, monkeypatch, given):
    make_images(tmp_path / "one", 2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="two models or more|'nobody': no model"):
        find_entrants(Sources(models=given))


def test_results_meet_by_name_on_their_kept_images(tmp_path):
    for method in ("lcd", "lrm"):
        write_model(tmp_path, method, 0, num=8, images=6)
    found = find_entrants(Sources(models=("lcd-s0", "lrm-s0"), results=str(tmp_path), num=5))
    assert [entrant.name for entrant in found] == ["lcd-s0", "lrm-s0"]
    assert [key[0] for key in found[0].keys] == [f"test/{i}" for i in range(5)]
    assert found[0].image(3).size == (64, 64) and found[0].result == next((tmp_path / "benchtop" / "lcd-s0").iterdir())


def test_saved_images_are_those_that_were_measured(tmp_path):
    folders = {}
    for method in ("lcd", "lrm"):
        write_model(tmp_path, method, 0, num=8, images=2)
        (folders[method],) = (tmp_path / "benchtop" / f"{method}-s0").iterdir()
        saved, index = folders[method] / "images", []
        saved.mkdir()
        for about, image in load_result(folders[method]).images.items():
            name = about.prompt_id.replace("/", "_")
            image.save(saved / f"{name}.png")
            row = {"file": f"{name}.png", "prompt_id": about.prompt_id, "prompt": about.prompt, "seed": about.seed}
            index.append(row)
        (saved / "index.json").write_text(json.dumps(index))
    sources = Sources(models=("lcd-s0", "lrm-s0"), results=str(tmp_path))
    one, _ = find_entrants(sources)
    assert all(isinstance(image, Path) for image in one.images) and len(one.images) == 2
    file = one.images[1]
    before = file.read_bytes()
    shutil.copy(one.images[0], file)
    with pytest.raises(UsageError, match=rf"{file.name}: not the image that was measured; evaluate it again"):
        find_entrants(sources)
    file.write_bytes(before)
    assert find_entrants(sources)[0].sha256 == one.sha256
    file.unlink()
    with pytest.raises(UsageError, match=r"images: 1 images are missing: 'test_1'; evaluate it again"):
        find_entrants(sources)


def test_several_results_of_a_name_are_named(tmp_path):
    for steps in (2, 4):
        write_model(tmp_path, "lcd", 0, steps=steps, num=8, images=4)
    with pytest.raises(UsageError, match=r"lcd-s0: 2 results \(.*lcm2.*lcm4.*\)"):
        find_entrants(Sources(models=("lcd-s0", "lrm-s0"), results=str(tmp_path)))
    folders = tuple(map(str, sorted((tmp_path / "benchtop" / "lcd-s0").iterdir())))
    assert [entrant.name for entrant in find_entrants(Sources(models=folders))] == list(folders)


def test_another_arena_in_the_folder_is_left_alone(tmp_path):
    models = make_models(tmp_path)
    with opened(tmp_path, models):
        pass
    other = (models[0], str(make_images(tmp_path / "third")))
    with pytest.raises(UsageError, match="holds an arena of alpha-model, beta-model"), opened(tmp_path, other):
        raise AssertionError
    (tmp_path / "beta-model" / "0.png").write_bytes((tmp_path / "beta-model" / "1.png").read_bytes())
    with pytest.raises(UsageError, match="images have changed"), opened(tmp_path, models):
        raise AssertionError


def test_the_secret_is_its_owners_alone(tmp_path):
    with opened(tmp_path, make_models(tmp_path)) as contest:
        secret = tmp_path / "arena" / "secret"
        assert secret.stat().st_mode & 0o777 == 0o600
        assert secret.read_text() not in (tmp_path / "arena" / "arena.json").read_text() and contest.token


# Pages for elsewhere


def exported(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_an_exported_page_holds_every_question_and_its_answers_are_merged(tmp_path):
    with opened(tmp_path, make_models(tmp_path)) as contest:
        rater = contest.votes.join("anna")
        data = exported(export_page(contest, rater))
        asked = contest.comparisons("anna")
        assert [one["ticket"] for one in data["tasks"]] == list(contest.tasks("anna"))
        for one, task in zip(data["tasks"], contest.tasks("anna").values(), strict=True):
            shown = base64.b64decode(data["images"][one["left"]].partition(",")[2])
            assert shown == contest.side(asked[task.comparison], "left")
        rows = [{"ticket": t["ticket"], "answer": "left", "time": "2026-01-01T10:00:00Z"} for t in data["tasks"]]
        file = tmp_path / "votes-anna.json"
        file.write_text(json.dumps({"arena": data["arena"], "rater": "anna", "votes": rows[:7]}))
        assert contest.merge(file).new == 7
        forged = [{**rows[8], "ticket": "0" * 32}, {**rows[9], "answer": "both"}, {**rows[10], "time": "soon"}, 3]
        changed = {**rows[0], "answer": "right"}
        file.write_text(json.dumps({"arena": data["arena"], "rater": "anna", "votes": [*rows[:8], changed, *forged]}))
        found = contest.merge(file)
        assert (found.new, found.known, found.refused) == (1, 7, 5)
        assert [vote.answer for vote in rater.votes.values()] == ["left"] * 8
        assert rater.votes[rows[0]["ticket"]].time == "2026-01-01T10:00:00+00:00"


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "not the answers"), ('{"votes": 1}', "not the answers"), ("{", "not valid JSON"),
     ('{"votes": [], "arena": "x"}', "another arena"), ('{"votes": [], "arena": "ID", "rater": "\\ud800"}', "no page")],
)  # fmt: skip
def test_files_that_are_no_answers_are_refused(tmp_path, content, message):
    with opened(tmp_path, make_models(tmp_path)) as contest:
        file = tmp_path / "votes.json"
        file.write_text(content.replace("ID", contest.design.id))
        with pytest.raises(UsageError, match=message):
            contest.merge(file)


# What the votes say


def test_win_rates_strengths_and_agreement_by_hand(tmp_path):
    with opened(tmp_path, make_models(tmp_path, num=6)) as contest:
        for name in ("anna", "ben"):
            answer(contest, contest.votes.join(name), attentive)
    overall = summarise(tmp_path / "arena").tallies[0]
    first, second = overall.standings
    assert (first.model, first.votes, first.ties, first.rate) == ("alpha-model", 12, 4, (8 + 2) / 12)
    assert first.rate + second.rate == 1 and first.strength == pytest.approx(-second.strength)
    assert first.strength == pytest.approx(np.log(10.5 / 2.5) / 2)
    assert first.strength_interval.low < first.strength < first.strength_interval.high
    (duel,) = overall.duels
    assert (duel.won, duel.lost, duel.ties) == (8, 0, 4)
    assert (overall.alpha, overall.shared) == (1, 6)


def test_raters_who_fail_checks_are_left_out_and_said_so(tmp_path):
    with opened(tmp_path, make_models(tmp_path, num=36)) as contest:
        answer(contest, contest.votes.join(MARKUP), attentive)
        answer(contest, contest.votes.join("click"), careless)
    summary = summarise(tmp_path / "arena")
    why = {each.rater.name: each.why_not for each in summary.raters}
    assert why == {MARKUP: "", "click": "fails attention checks"}
    assert {vote.rater for vote in summary.votes} == {MARKUP} and not any(vote.check for vote in summary.votes)
    text = write_report(summary, tmp_path / "arena").read_text(encoding="utf-8")
    assert "| click | person | 120 |" in text and "left out: fails attention checks" in text
    assert "&lt;b&gt;anna&lt;/b&gt; \\| \\*x\\*" in text and "<b>" not in text


def test_people_and_simulated_raters_are_never_mixed(tmp_path):
    with opened(tmp_path, make_models(tmp_path)) as contest:
        answer(contest, contest.votes.join("simulated 1", "simulated"), careless)
        assert summarise(tmp_path / "arena").simulated
        answer(contest, contest.votes.join("anna"), attentive)
    summary = summarise(tmp_path / "arena")
    assert not summary.simulated and {vote.rater for vote in summary.votes} == {"anna"}


def test_no_vote_is_no_report(tmp_path):
    with pytest.raises(UsageError, match="no arena here"):
        summarise(tmp_path / "arena")
    with opened(tmp_path, make_models(tmp_path)) as contest:
        contest.votes.join("anna")
    with pytest.raises(UsageError, match="no vote that counts"):
        summarise(tmp_path / "arena")


def students(root: Path) -> tuple[str, ...]:
    """Four students' results; the HPS of each later one is higher, its set distance too."""
    names = []
    for i, (method, seed) in enumerate([("lcd", 0), ("lcd", 1), ("lrm", 0), ("lrm", 1)]):
        shifts = {"hps": 5.0 * i, "fd_efflite0": 50.0 * i}
        folder = write_model(root, method, seed, metrics=("hps", "fd_efflite0"), num=12, images=6, shifts=shifts)
        names.append(folder.parent.name)
    return tuple(names)


def by_name(vote: Vote) -> str:
    return vote.pair[0] if vote.check else max(vote.pair)


def test_preferences_stand_beside_other_metrics_in_results_and_report(tmp_path):
    results = tmp_path / "results"
    names = students(results)
    before = {path: path.stat().st_size for path in results.rglob("images.webp")}
    with opened(tmp_path / "x", [str(results / "benchtop" / name) for name in names]) as contest:
        answer(contest, contest.votes.join("anna"), by_name)
        answer(contest, contest.votes.join("ben"), by_name)
    summary = summarise(tmp_path / "x" / "arena")
    folders = store(summary, "rgbench arena --report")
    store(summary, "rgbench arena --report")
    assert len(folders) == 4 and {path: path.stat().st_size for path in results.rglob("images.webp")} == before
    (found,) = load_result_sets(results)
    columns = {column.metric: column for column in found.columns if column.family is Family.PEOPLE}
    assert list(columns) == ["people_overall", "people_quality", "people_alignment"]
    best = load_result(folders[-1])
    value = best.by_key[columns["people_overall"].key]
    assert value.value == 100 and value.num_images == 6 and value.extra["raters"] == 2 and value.flags == ()
    rows = best.rows(*value.key)
    assert rows is not None and rows.by_image() == {(f"test/{i}", 0): 100.0 for i in range(6)}
    assert {group for _, _, group in rows.keys} == {"test"}, "prompts keep the groups that other values have"
    assert value.protocol.fields["models"] == list(names) and value.protocol.fields["raters"] == "people"
    report(results, tmp_path / "out", ["md"])
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "People, overall (%) ↑" in text and "HPS ↑" in text


def test_metrics_are_correlated_with_people_over_four_models(tmp_path):
    results = tmp_path / "results"
    folders = [str(results / "benchtop" / name) for name in students(results)]
    for num, wanted in ((4, {"HPS": 1.0, "FD-EffLite0": -1.0}), (3, {})):
        with opened(tmp_path / str(num), folders[:num]) as contest:
            answer(contest, contest.votes.join("anna"), by_name)
        summary = summarise(tmp_path / str(num) / "arena")
        assert {each.column.label: round(each.spearman, 9) for each in summary.correlations} == wanted
        text = write_report(summary, tmp_path / str(num) / "arena").read_text(encoding="utf-8")
        assert ("| HPS | 1.00 |" in text) == (num == 4)


# Simulated raters


class Pixels:
    """Gold that calls the mean brightness degradation."""

    def __init__(self, *_: object) -> None: ...

    def degradation(self, images):
        return images.mean((1, 2, 3))


def benchtop_models(root: Path, num: int = 12) -> tuple[str, ...]:
    """The true scenes, and scenes of other prompts, as results."""
    from rgbench.benchtop.scenes import scene_batch

    prompts = benchtop_prompts(num).prompts
    images, _ = scene_batch("test", range(num))
    own = {int(prompt.id.rpartition("/")[2]): prompt for prompt in prompts if prompt.group == "test"}
    run = Run(command="made up")
    for name, shift in (("right", 0), ("wrong", 1)):
        fields = {"sampler": name}
        head = Head(world="benchtop", model=name, method="external",
                    generation=Generation(id=identify("x", fields), fields=fields))  # fmt: skip
        pixels = (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
        sheet = [
            (SheetImage(prompt_id=prompt.id, prompt=prompt.text, seed=0), pixels[(i + shift) % num])
            for i, prompt in own.items()
        ]
        value = MetricValue("hps", Protocol.of("hps", {"prompts": {"num": num}}), 1.0, None, num)
        write_sheet(write_values(root, head, run, [value], []), head, run, sheet)
    return str(root / "benchtop" / "right"), str(root / "benchtop" / "wrong")


def test_simulated_raters_prefer_what_the_caption_says(tmp_path, monkeypatch):
    with opened(tmp_path, benchtop_models(tmp_path / "results")) as contest:
        raters = vote_simulated(contest, 2, "cpu", tmp_path / "none")
        before = [dict(rater.votes) for rater in raters]
        assert {vote.question for rater in raters for vote in rater.votes.values()} == {"overall", "alignment"}
        assert [dict(rater.votes) for rater in vote_simulated(contest, 2, "cpu", tmp_path / "none")] == before
        monkeypatch.setattr(simulated, "Gold", Pixels)
        (third,) = vote_simulated(contest, 3, "cpu", tmp_path)[2:]
        assert {vote.question for vote in third.votes.values()} == {"overall", "quality", "alignment"}
    summary = summarise(tmp_path / "arena")
    assert summary.simulated
    for tally in summary.tallies:
        if tally.question != "quality":
            assert tally.standings[0].model == "right" and tally.standings[0].rate > 0.7
    store(summary, "x")
    (found,) = load_result_sets(tmp_path / "results")
    assert all(
        value.flags == ("simulated raters",)
        for model in found.models
        for value in model.first.values
        if value.metric.startswith("people")
    )


def test_simulated_raters_know_the_benchtop_alone(tmp_path):
    with opened(tmp_path, make_models(tmp_path)) as contest:
        with pytest.raises(UsageError, match="no prompt of the benchtop"):
            vote_simulated(contest, 1, "cpu", REGRESSORS_FOLDER)
        assert contest.votes.raters == {}, "nobody joined"


# The command


def test_the_command_exports_merges_and_reports(cli, tmp_path):
    models = make_models(tmp_path / "images")
    done = cli("arena", *models, "--export", "anna.html", "--export", "<b>.html")
    assert done.returncode == 0 and done.stdout.split() == ["anna.html", "<b>.html"]
    data = exported((tmp_path / "anna.html").read_text(encoding="utf-8"))
    votes = [{"ticket": t["ticket"], "answer": "tie", "time": "2026-01-01T10:00:00Z"} for t in data["tasks"]]
    (tmp_path / "got.json").write_text(json.dumps({"arena": data["arena"], "rater": "anna", "votes": votes}))
    assert "15 new votes" in cli("arena", "--merge", "got.json").stdout, "the arena knows its models"
    done = cli("arena", "--report")
    assert done.returncode == 0 and "alpha-model" in done.stdout
    assert "# Arena" in (tmp_path / "arena" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--report",), "no arena here"), ((), "no arena here"), (("--report", "one"), "leave the models out"),
        (("--report", "--rater", "simulated"), "one at a time"), (("one", "--num", "1"), "two models"),
        (("--num", "1"), "--num: belongs to MODEL"), (("one", "two"), "'one': no model"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_sentence_and_writes_nothing(cli, tmp_path, words, message):
    done = cli("arena", *words)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_missing_server_is_explained(cli, tmp_path, monkeypatch):
    models = make_models(tmp_path / "images")
    monkeypatch.setattr("rgbench.cli.arena.find_spec", lambda name: None if name == "uvicorn" else sys)
    done = cli("arena", *models)
    assert done.returncode == 2 and "needs uvicorn" in done.stderr and "rgbench[arena]" in done.stderr
