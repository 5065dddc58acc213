"""The arena's server: blind, several raters at once, nothing forged, nothing lost."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from rgbench.arena.contest import Contest
from rgbench.arena.page import export_page
from rgbench.arena.server import build_app, listen
from rgbench.arena.votes import Votes
from rgbench.core.errors import UsageError
from tests.arena_maker import NAMES, make_models, opened
from tests.conftest import ROOT

MARKUP = "<script>alert(1)</script><img src=x> & 'quoted' \"text\""


@pytest.fixture
def contest(tmp_path: Path) -> Iterator[Contest]:
    with opened(tmp_path, make_models(tmp_path, texts=["one", MARKUP, "three", "four"])) as found:
        yield found


@pytest.fixture
def client(contest: Contest) -> TestClient:
    return TestClient(build_app(contest))


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def join(client: TestClient, contest: Contest, name: str = "anna") -> str:
    answer = client.post("/join", json={"name": name}, headers=bearer(contest.token))
    assert answer.status_code == 200, answer.text
    return answer.json()["key"]


def task(client: TestClient, key: str) -> dict:
    return client.get("/task", headers=bearer(key)).json()


def vote(client: TestClient, key: str, ticket: str, answer: str = "left"):
    return client.post("/vote", json={"ticket": ticket, "answer": answer}, headers=bearer(key))


def votes_on_disk(contest: Contest) -> dict[str, int]:
    return {rater.name: len(rater.votes) for rater in Votes(contest.votes.folder, contest.design.id).raters.values()}


def test_a_rater_answers_everything_one_question_at_a_time(client, contest):
    key, asked = join(client, contest), []
    found = task(client, key)
    while "task" in found:
        asked.append((found["task"]["prompt"], found["task"]["question"]))
        found = vote(client, key, found["task"]["ticket"], "tie").json()
    assert found["done"] == found["total"] == len(asked) == 3 * (4 + 1), "four comparisons and a check"
    assert len({question for _, question in asked[:3]}) == 3 and len({prompt for prompt, _ in asked[:3]}) == 1
    assert votes_on_disk(contest) == {"anna": 15}


def test_answers_are_stored_with_what_stood_where(client, contest):
    key = join(client, contest)
    asked = task(client, key)["task"]
    assert vote(client, key, asked["ticket"], "right").status_code == 200
    stored = next(iter(contest.votes.raters["anna"].votes.values()))
    left = contest.comparisons("anna")[0].left
    assert (stored.rater, stored.left, stored.answer, stored.question) == ("anna", left, "right", "overall")
    assert stored.id == asked["ticket"] and set(stored.pair) >= {left} and stored.time.startswith("20")


def test_shown_are_the_pixels_of_the_right_sides(client, contest):
    key = join(client, contest)
    first = contest.comparisons("anna")[0]
    found = task(client, key)["task"]
    for side, model in (("left", first.left), ("right", first.right)):
        image = Image.open(io.BytesIO(client.get(found[side]).content))
        if not first.check:
            assert list(image.get_flattened_data()) == list(
                contest.entrants[model].image(first.prompt).get_flattened_data()
            )
        assert (image.format, image.mode, image.info) == ("PNG", "RGB", {}), "no metadata"


def test_no_name_of_a_model_reaches_a_page(client, contest):
    """Neither page, nor answers, nor images, nor an exported page; ids differ between raters and comparisons."""
    seen, ids = [client.get("/").content], []
    for name in ("anna", "ben"):
        key = join(client, contest, name)
        found = task(client, key)
        while "task" in found:
            answer = client.get("/task", headers=bearer(key))
            images = [found["task"][side] for side in ("left", "right")]
            seen += [answer.content, *(client.get(url).content for url in images)]
            ids.append(tuple(images))
            found = vote(client, key, found["task"]["ticket"]).json()
    seen.append(export_page(contest, contest.votes.join("carl")).encode())
    assert not [text for text in seen for name in (*NAMES, b"degraded") if bytes(str(name), "ascii") in text]
    comparisons = set(ids)
    flat = [one for pair in comparisons for one in pair]
    assert len(set(flat)) == len(flat) == 2 * 2 * 5
    assert all(re.fullmatch(r"/image/[0-9a-f]{32}", one) for one in flat)


def test_a_check_shows_an_image_beside_its_degraded_copy(contest):
    number, check = next((i, each) for i, each in enumerate(contest.comparisons("anna")) if each.check)
    images = [Image.open(io.BytesIO(contest.side(check, side))) for side in ("left", "right")]
    spread = [max(high - low for low, high in image.getextrema()) for image in images]
    intact = 0 if check.left == check.pair[0] else 1
    assert spread[intact] > 240 > 120 > spread[1 - intact], number


@pytest.mark.parametrize("token", ["", "wrong", "ümlaut", "0" * 32])
def test_without_the_token_nothing_is_let_in(client, contest, token):
    key = join(client, contest)
    ticket = task(client, key)["task"]["ticket"]
    headers = {"Authorization": f"Bearer {token}".encode("latin-1")}
    assert client.post("/join", json={"name": "eve"}, headers=headers).status_code == 403
    assert client.get("/task", headers=headers).status_code == 403
    assert client.post("/vote", json={"ticket": ticket, "answer": "left"}, headers=headers).status_code == 403
    assert client.post("/vote", json={"ticket": ticket, "answer": "left"}).status_code == 403
    assert client.get(f"/image/{token or 'x'}").status_code == 404
    assert votes_on_disk(contest) == {"anna": 0}


def test_keys_and_tickets_cannot_be_forged_or_used_by_another(client, contest):
    anna, ben = join(client, contest, "anna"), join(client, contest, "ben")
    ticket = task(client, anna)["task"]["ticket"]
    assert vote(client, ben, ticket).status_code == 403, "a ticket is its rater's own"
    forged = f"ben.{anna.rpartition('.')[2]}"
    assert client.get("/task", headers=bearer(forged)).status_code == 403, "a key is its rater's own"
    assert vote(client, forged, task(client, ben)["task"]["ticket"]).status_code == 403
    assert vote(client, contest.token, ticket).status_code == 403, "the share token opens the door and no more"
    assert vote(client, anna, "f" * 32).status_code == 403
    later = list(contest.tasks("ben"))[5]
    assert vote(client, ben, later).status_code == 200, "one's own later question may be answered"
    assert votes_on_disk(contest) == {"anna": 0, "ben": 1}


def test_a_replayed_vote_counts_once_and_cannot_change_its_answer(client, contest):
    key = join(client, contest)
    ticket = task(client, key)["task"]["ticket"]
    for _ in range(3):
        assert vote(client, key, ticket).json()["done"] == 1
    assert vote(client, key, ticket, "right").status_code == 409
    assert [each.answer for each in Votes(contest.votes.folder, contest.design.id).raters["anna"].votes.values()] == [
        "left"
    ]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"[]", 400), (b"{", 400), (b"[" * 3000, 400), (b"\xff", 400), (b'"' + b"x" * 9000, 413),
        (b'{"ticket": 1, "answer": "left"}', 400), (b'{"ticket": "x", "answer": ["left"]}', 400),
        (b'{"ticket": "\\ud800", "answer": "left"}', 403), (b'{"answer": "both"}', 400),
    ],
)  # fmt: skip
def test_bad_votes_are_refused_in_words(client, contest, body, status):
    answer = client.post("/vote", content=body, headers=bearer(join(client, contest)))
    assert answer.status_code == status and answer.json()["error"]


@pytest.mark.parametrize("name", ["", "   ", "\u200b", "x" * 61, 7, None, "a\x00b", "\ud800"])
def test_names_that_nobody_could_read_are_refused(client, contest, name):
    answer = client.post("/join", content=json.dumps({"name": name}), headers=bearer(contest.token))
    assert answer.status_code == 400 and contest.votes.raters == {}


def test_a_name_is_taken_once(client, contest):
    join(client, contest)
    assert client.post("/join", json={"name": "anna "}, headers=bearer(contest.token)).status_code == 409


def test_names_and_prompts_with_markup_stay_text(client, contest):
    key = join(client, contest, MARKUP[:40])
    answer = client.get("/task", headers=bearer(key))
    assert answer.headers["content-type"] == "application/json"
    html = export_page(contest, contest.votes.raters[next(iter(contest.votes.raters))])
    assert html.count("<script") == 2 and "<img src=x" not in html and "alert(1)\\u003c" in html


def test_headers_forbid_everything_from_elsewhere(client):
    answer = client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["referrer-policy"] == "no-referrer" and answer.headers["cache-control"] == "no-store"
    assert not re.search(r"https?://", answer.text)


def test_two_raters_at_once_lose_nothing(tmp_path):
    with opened(tmp_path, make_models(tmp_path, num=9)) as contest:
        client = TestClient(build_app(contest))

        def answer_all(name: str) -> int:
            key = join(client, contest, name)
            found = task(client, key)
            while "task" in found:
                found = vote(client, key, found["task"]["ticket"], "right").json()
            return found["total"]

        with ThreadPoolExecutor(2) as pool:
            totals = list(pool.map(answer_all, ["anna", "ben"]))
        assert totals == [30, 30] and votes_on_disk(contest) == {"anna": 30, "ben": 30}


def test_a_rater_continues_where_the_server_stopped(tmp_path):
    models = make_models(tmp_path)
    with opened(tmp_path, models) as contest:
        client = TestClient(build_app(contest))
        key, token = join(client, contest), contest.token
        for _ in range(4):
            vote(client, key, task(client, key)["task"]["ticket"])
        waiting = task(client, key)
    with opened(tmp_path, models) as contest:
        assert contest.token == token, "links stay good"
        assert task(TestClient(build_app(contest)), key) == waiting and waiting["done"] == 4


def test_a_full_disk_is_said_and_the_question_stays_open(client, contest, monkeypatch):
    key = join(client, contest)
    ticket = task(client, key)["task"]["ticket"]
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        answer = vote(client, key, ticket)
    assert answer.status_code == 507 and "No space left" in answer.json()["error"]
    assert votes_on_disk(contest) == {"anna": 0}
    assert vote(client, key, ticket).status_code == 200 and votes_on_disk(contest) == {"anna": 1}


@pytest.mark.enable_socket
def test_a_port_in_use_and_a_strange_host_are_one_sentence_each():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"--port {port}: in use"):
            listen("127.0.0.1", port)
    with pytest.raises(UsageError, match=r"--host 192.0.2.1"):
        listen("192.0.2.1", 0)


class Served:
    """``rgbench arena`` in a process of its own."""

    def __init__(self, root: Path, models: tuple[str, ...]) -> None:
        command = [sys.executable, "-u", "-m", "rgbench", "arena", *models, "--port", "0", "--out", str(root / "arena")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        link = re.search(r"(http://127\.0\.0\.1:\d+)/#join=(\w+)", self.process.stdout.readline())
        assert link
        self.url, self.token = link.groups()

    def ask(self, path: str, token: str, content: dict | None = None) -> dict:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, data, {"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def stop(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(timeout=60)


@pytest.mark.long
@pytest.mark.enable_socket
def test_killing_the_server_between_votes_loses_none_of_500(tmp_path):
    models, key, confirmed, token = make_models(tmp_path, num=160), "", 0, ""
    for kill in (137, 1, 200, 162):
        served = Served(tmp_path, models)
        assert token in ("", served.token)
        token = served.token
        key = key or served.ask("/join", token, {"name": "anna"})["key"]
        found = served.ask("/task", key)
        assert found["done"] == confirmed
        for _ in range(kill):
            found = served.ask("/vote", key, {"ticket": found["task"]["ticket"], "answer": "left"})
            confirmed += 1
            assert found["done"] == confirmed
        assert served.stop(signal.SIGKILL) == -signal.SIGKILL
    assert confirmed == 500
    served = Served(tmp_path, models)
    assert served.ask("/task", key)["done"] == 500
    assert served.stop(signal.SIGINT) == 0, "Ctrl-C is how a server is stopped"
