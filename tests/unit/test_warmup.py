"""Warm-up: which shapes, when a time is stable, what a failing shape does; and an OpenAI-style endpoint."""

from __future__ import annotations

import io
import json
import socket
import threading
from email.message import Message
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import pytest

from cached_client.coldstart import Timeline
from cached_client.errors import CacheError, EndpointError, InvalidRequestError, WarmUpError
from cached_client.warmup import CompletionsEndpoint, shapes, warm_up
from cached_client.warmup.shapes import ShapeTimes, _stable


@pytest.mark.parametrize(
    ("times_s", "stable"),
    [
        ([], False),
        ([9.0, 1.0, 1.0], False),  # only two beside the first
        ([9.0, 1.0, 1.1, 0.9], True),
        ([1.0, 1.0, 1.0], False),  # the first never counts
        ([9.0, 1.0, 1.0, 2.0], False),
        ([9.0, 5.0, 1.0, 1.2, 1.0], True),
    ],
)
def test_a_shape_is_stable_when_its_last_three_times_agree(times_s, stable):
    assert _stable(times_s) is stable


def test_times_of_a_shape():
    times = ShapeTimes(8, 128, (9.0, 2.0, 1.0, 1.5), False)
    assert (times.name, times.first_s, times.stable_s) == ("b8.s128", 9.0, 1.5)
    nothing = ShapeTimes(8, 128, (), False, "boom")
    assert (nothing.first_s, nothing.stable_s) == (None, None)


class Clock:
    """A clock that the calls themselves move on."""

    def __init__(self, monkeypatch):
        self.now_s = 0.0
        clock = SimpleNamespace(perf_counter=lambda: self.now_s, monotonic=lambda: self.now_s)
        monkeypatch.setattr(shapes, "time", clock)


def test_every_shape_is_run_the_largest_first_until_it_is_stable(monkeypatch):
    clock, calls, synchronized = Clock(monkeypatch), list[tuple[int, int]](), list[int]()

    def call(batch_size, length):
        clock.now_s += 0.5 if (batch_size, length) not in calls else 0.001
        calls.append((batch_size, length))

    def synchronize():
        clock.now_s += batch_s
        synchronized.append(1)

    batch_s = 0.25
    result = warm_up(call, batch_sizes=(1, 4), lengths=(16, 8, 8), iterations=30, synchronize=synchronize)
    assert [(shape.batch_size, shape.length) for shape in result.shapes] == [(4, 16), (4, 8), (1, 16), (1, 8)]
    assert list(dict.fromkeys(calls)) == [(4, 16), (4, 8), (1, 16), (1, 8)]
    assert len(synchronized) == len(calls)
    for shape in result.shapes:
        assert shape.times_s == pytest.approx((0.75, 0.251, 0.251, 0.251))
        assert shape.stable
    assert result.total_s == pytest.approx(4 * (0.75 + 3 * 0.251))
    assert result.passed
    result.check()


def test_a_shape_that_never_gets_stable_has_passed_and_says_so(monkeypatch):
    clock = Clock(monkeypatch)
    waits_s = iter([1.0, 2.0] * 10)

    def call(batch_size, length):
        clock.now_s += next(waits_s)

    result = warm_up(call, iterations=6)
    assert result.passed
    assert result.shapes[0].times_s == (1.0, 2.0, 1.0, 2.0, 1.0, 2.0)
    assert result.shapes[0].stable_s == 2.0
    assert "not stable" in result.table()


def test_a_failing_shape_is_reported_with_its_shape_and_the_others_are_run():
    def call(batch_size, length):
        if batch_size * length > 100:
            raise MemoryError(f"no room for {batch_size * length}")

    timeline = Timeline(since_process_start=False)
    result = warm_up(call, batch_sizes=(1, 8), lengths=(64,), timeline=timeline)
    large, small = result.shapes
    assert (large.name, large.error, large.times_s) == ("b8.s64", "MemoryError: no room for 512", ())
    assert not small.error
    assert not result.passed
    assert "failed: MemoryError: no room for 512" in result.table()
    with pytest.raises(WarmUpError, match=r"b8\.s64: MemoryError") as caught:
        result.check()
    assert caught.value.fields == {"shapes": "b8.s64", "cause": "MemoryError: no room for 512"}
    assert [(span.name, span.parent, span.failed) for span in timeline.spans()] == [
        ("warmup", None, False), ("b8.s64", 0, True), ("b1.s64", 0, False)
    ]  # fmt: skip


def test_an_interrupt_is_not_swallowed():
    def call(batch_size, length):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_up(call)


def test_it_can_be_ended():
    left = iter([True, True, False])
    result = warm_up(lambda *_: None, batch_sizes=(1, 2), keep_going=lambda: next(left, False))
    assert [shape.error for shape in result.shapes] == ["the warm-up was ended"] * 2
    assert len(result.shapes[0].times_s) == 2


@pytest.mark.parametrize("wrong", [{"batch_sizes": ()}, {"lengths": (0,)}, {"iterations": 0}, {"batch_sizes": (-1,)}])
def test_shapes_that_cannot_be_are_refused(wrong):
    with pytest.raises(InvalidRequestError, match="of 1 or more is needed"):
        warm_up(lambda *_: None, **wrong)


def test_the_result_as_data_and_as_a_table():
    result = warm_up(lambda *_: None, batch_sizes=(2,), lengths=(3,), iterations=2)
    data = json.loads(result.to_json())
    assert data["passed"] is True
    (shape,) = data["shapes"]
    assert (shape["name"], shape["batch_size"], shape["length"], len(shape["times_s"])) == ("b2.s3", 2, 3, 2)
    assert result.table().splitlines()[0].split() == ["SHAPE", "BATCH", "LENGTH", "FIRST", "STABLE", "CALLS"]


class Server:
    """An HTTP server that keeps what it was asked, and answers what the test says."""

    def __init__(self):
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.answer = lambda body: (200, {"choices": [{"text": f"{len(prompt)}"} for prompt in body["prompt"]]})
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, body, self.headers.get("Authorization")))
                status, answer = outer.answer(body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def test_an_endpoint_is_warmed_up_with_prompts_of_the_length_and_never_the_same_twice():
    with Server() as server:
        endpoint = CompletionsEndpoint(server.url, "llama", api_key="secret", max_tokens=3)
        result = warm_up(endpoint, batch_sizes=(1, 4), lengths=(16, 700), iterations=3)
        assert result.passed, result.table()
        assert endpoint(2, 5) == ["5", "5"]
    prompts = [tuple(prompt) for _, body, _ in server.asked for prompt in body["prompt"]]
    assert {(len(body["prompt"]), len(body["prompt"][0])) for _, body, _ in server.asked} == {
        (1, 16), (4, 16), (1, 700), (4, 700), (2, 5)
    }  # fmt: skip
    assert len(set(prompts)) == len(prompts)
    assert len({prompt[0] for prompt in prompts}) == len(prompts)  # else a cache of prefixes has the first tokens
    assert {(path, body["model"], body["max_tokens"], key) for path, body, key in server.asked} == {
        ("/v1/completions", "llama", 3, "Bearer secret")
    }


def test_prompts_may_be_texts():
    with Server() as server:
        endpoint = CompletionsEndpoint(f"{server.url}/v1/", "llama", prompt=lambda length, _: "hi " * length)
        endpoint(1, 3)
    assert server.asked[0][:2] == ("/v1/completions", server.asked[0][1])
    assert server.asked[0][1]["prompt"] == ["hi hi hi "]


@pytest.mark.parametrize(
    ("status", "answer", "told"),
    [
        (404, {"error": {"message": "no such model"}}, "answered 404: no such model"),
        (500, b"<html>", "answered 500: <html>"),
        (500, [1], "answered 500: [1]"),
        (200, b"not json", "no list of completions"),
        (200, {"choices": [{}]}, "no list of completions"),
        (200, [], "no list of completions"),
        (200, {"choices": []}, "0 completions for 1 prompts"),
    ],
)
def test_any_other_answer_is_an_error_that_says_what_came(status, answer, told):
    with Server() as server:
        server.answer = lambda _: (status, answer)
        with pytest.raises(EndpointError) as caught:
            CompletionsEndpoint(server.url, "llama")()
        assert told in str(caught.value)
        result = warm_up(CompletionsEndpoint(server.url, "llama"))
        assert told in result.shapes[0].error


def test_something_else_answers():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            with listener.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(EndpointError, match=r"did not answer: SSH-2\.0"):
            CompletionsEndpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", "llama")()
        thread.join()


class _Broken(io.BytesIO):
    """A body that ends as it does on a connection that is lost."""

    error: Exception

    def read(self, *_):
        raise self.error


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), TimeoutError("timed out"), IncompleteRead(b"")])
def test_an_error_whose_body_does_not_come_is_told_by_its_status(monkeypatch, error):
    body = _Broken()
    body.error = error

    def answer(request, timeout):
        raise HTTPError(request.full_url, 503, "Busy", Message(), body)

    monkeypatch.setattr("urllib.request.urlopen", answer)
    with pytest.raises(EndpointError, match="answered 503: Busy") as raised:
        CompletionsEndpoint("http://host", "llama")()
    assert raised.value.fields["status"] == "503"
    assert body.closed


@pytest.mark.parametrize("url", ["http://[::1", "http://[no]/", "ftp://host", ""])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(InvalidRequestError, match="is not an http or https address"):
        CompletionsEndpoint(url, "llama")


def test_nobody_answers():
    with Server() as server:
        url = server.url
    with pytest.raises(EndpointError, match=r"did not answer: .*refused"):
        CompletionsEndpoint(url, "llama")()
    with pytest.raises(CacheError, match="is not an http or https address"):
        CompletionsEndpoint("file:///etc/passwd", "llama")
