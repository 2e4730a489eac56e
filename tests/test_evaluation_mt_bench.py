"""MT-Bench: two turns asked, answers and marks in FastChat's form, any OpenAI-compatible judge."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pedro.data.tasks import get_task
from pedro.errors import UnavailableError
from pedro.evaluation.mt_bench import (
    Judge,
    ask_questions,
    judge_answers,
    judge_prompt,
    read_rating,
    summary,
    write_records,
)

EXCERPTS = Path(__file__).parent / "fixtures" / "tasks"


@pytest.fixture(scope="module")
def rows():
    return list(get_task("mt_bench").rows("test", EXCERPTS))


@pytest.fixture
def endpoint():
    """A judge that gives 7 to a first turn and no mark to a second; `refusals` are sent before it answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, self.headers["Authorization"], body))
            status = server.refusals.pop(0) if server.refusals else 200
            second = "### User:" in body["messages"][1]["content"]
            text = "I cannot mark this." if second else "Good.\n\nRating: [[7]]"
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply if status == 200 else b"{}")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.refusals = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def judge(server, **options):
    return Judge(f"http://127.0.0.1:{server.server_port}/v1", "marker", "key", pause_s=0.0, **options)


def test_the_second_turn_is_asked_with_the_first_answer_before_it(rows):
    asked = []

    def chat(messages, temperature):
        asked.append((temperature, [message["role"] for message in messages], messages[-1]["content"]))
        return f"answer {len(asked)}"

    first, second = ask_questions(rows, chat, "acme.helper")
    assert [roles for _, roles, _ in asked[:2]] == [["user"], ["user", "assistant", "user"]]
    assert [content for _, _, content in asked[:2]] == list(rows[0].extra["turns"])
    assert [temperature for temperature, _, _ in asked] == [0.7, 0.7, 0.0, 0.0]  # writing, reasoning
    assert first["choices"] == [{"index": 0, "turns": ["answer 1", "answer 2"]}]
    assert (second["question_id"], second["model_id"]) == (101, "acme.helper")


def test_answers_are_written_as_fastchat_reads_them(rows, tmp_path):
    path = tmp_path / "model_answer" / "acme.jsonl"
    assert write_records(path, ask_questions(rows, lambda *_: "é", "acme")) == 2
    published = json.loads((EXCERPTS / "mt_bench/gpt-4.jsonl").read_text())
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert {key: type(value) for key, value in record.items()} == {k: type(v) for k, v in published.items()}


def test_each_turn_is_marked_and_a_missing_mark_is_left_out(rows, endpoint):
    answers = list(ask_questions(rows, lambda *_: "an answer", "acme"))
    marks = list(judge_answers(rows, answers, judge(endpoint)))
    assert [(mark["question_id"], mark["turn"], mark["score"]) for mark in marks] == [
        (81, 1, 7.0),
        (81, 2, -1),
        (101, 1, 7.0),
        (101, 2, -1),
    ]
    assert marks[0]["judge"] == ["marker", "single-v1"]
    assert marks[3]["judge"] == ["marker", "single-math-v1-multi-turn"]
    assert summary(marks, rows) == {"score": 7.0, "turn_1": 7.0, "writing": 7.0, "reasoning": 7.0, "unrated": 2}
    path, key, body = endpoint.requests[0]
    assert (path, key, body["temperature"]) == ("/v1/chat/completions", "Bearer key", 0)


def test_only_questions_with_a_reference_are_marked_against_it(rows):
    name, system, prompt = judge_prompt(rows[0], ["one", "two"], 0)
    assert (name, system) == ("single-v1", "You are a helpful assistant.")
    assert "[Question]\nCompose an engaging travel blog" in prompt
    assert "[The Start of Assistant's Answer]\none\n" in prompt
    name, _, prompt = judge_prompt(rows[1], ["one", "two"], 1)
    assert name == "single-math-v1-multi-turn"
    assert "### Reference answer:\nIf you have just overtaken the second person" in prompt
    assert prompt.index("### Assistant A:\none") < prompt.index("### Assistant A:\ntwo")


def test_a_busy_judge_is_asked_again_and_a_refusing_one_is_an_error(endpoint):
    endpoint.refusals = [429, 503]
    assert judge(endpoint).ask("s", "p") == "Good.\n\nRating: [[7]]"
    assert len(endpoint.requests) == 3
    endpoint.refusals = [401] * 9
    with pytest.raises(UnavailableError, match=r"marker at http.*: status 401; check its address, model and key"):
        judge(endpoint).ask("s", "p")
    assert len(endpoint.requests) == 4
    with pytest.raises(UnavailableError, match="does not answer"):
        Judge("http://127.0.0.1:9/v1", "marker", tries=1).ask("s", "p")


@pytest.mark.parametrize(
    ("judgment", "rating"),
    [
        ("Rating: [[8.5]]", 8.5),
        ("I give it [6].", 6),
        ("Rating: [[10]] out of [[10]]", 10),
        ("Rating: 5", -1),
        ("", -1),
    ],
)
def test_a_mark_is_read_as_fastchat_reads_it(judgment, rating):
    assert read_rating(judgment) == rating
