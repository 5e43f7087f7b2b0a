"""Parts of an answer on its way: headers, whole events, usage, errors."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_agentserve.cluster.relay import WholeEvents, end_to_end, error_body, error_event, is_stream, usage


def test_headers_of_a_connection_stay_with_it() -> None:
    given_headers = [
        *((b"Connection", b"close, X-Own"), (b"X-Own", b"1"), (b"Transfer-Encoding", b"chunked")),
        *((b"X-Session-ID", b"a"), (b"Host", b"h"), (b"X-Session-ID", b"b")),
    ]
    assert end_to_end(given_headers, b"host") == ((b"x-session-id", b"a"), (b"x-session-id", b"b"))


def test_a_stream_is_known_by_its_type() -> None:
    assert is_stream([(b"content-type", b"text/event-stream; charset=utf-8")])
    assert not is_stream([(b"content-type", b"application/json")])
    assert not is_stream([])


@given(st.lists(st.binary(max_size=6).map(lambda one: one.replace(b"x", b"\n\n")), max_size=12))
def test_only_whole_events_go_on_before_the_end(pieces: list[bytes]) -> None:
    events, sent = WholeEvents(), b""
    for piece in pieces:
        found = events.feed(piece)
        assert not found or found.endswith(b"\n\n")
        sent += found
    rest = events.rest()
    assert b"\n\n" not in rest
    assert sent + rest == b"".join(pieces)


@pytest.mark.parametrize(
    ("tail", "found"),
    [
        (b'{"choices":[],"usage":{"prompt_tokens":12,"total_tokens":20,"completion_tokens":8}}', (12, 8)),
        (b'data: {"usage":{"input_tokens": 5, "output_tokens": 2}}\n\n', (5, 2)),
        (b'{"usage":{"prompt_tokens":1}}' + b" " * 100 + b'{"usage":{"prompt_tokens":7}}', (7, 0)),
        (b"data: [DONE]\n\n", None),
        (b"", None),
    ],
)
def test_usage_is_read_from_the_end(tail: bytes, found: tuple[int, int] | None) -> None:
    assert usage(tail) == found


def test_errors_have_the_form_of_their_interface() -> None:
    chat = json.loads(error_body("/v1/chat/completions", 503, "gone"))
    assert chat["error"] == {"message": "gone", "type": "ServiceUnavailableError", "param": None, "code": 503}
    message = json.loads(error_body("/v1/messages?beta=true", 503, "gone"))
    assert message == {"type": "error", "error": {"type": "api_error", "message": "gone"}}
    event = error_event("/v1/completions", "gone")
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert json.loads(event[6:])["error"]["message"] == "gone"
    for path in ("/v1/messages", "/v1/responses"):
        name, data, *_ = error_event(path, "gone").decode().split("\n")
        assert name == "event: error"
        assert json.loads(data.removeprefix("data: "))["type"] == "error"
