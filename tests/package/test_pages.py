"""An API key goes to the server it is for, and nowhere else."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vllm_agentserve.bench.endpoint import get
from vllm_agentserve.top_scrape import scrape


@contextmanager
def listening(goes_to: str | None = None) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A server with an empty page, or one that sends its clients on; its address, and the paths and keys that it is sent."""
    seen: list[tuple[str, str | None]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(200 if goes_to is None or self.path == goes_to else 307)
            if goes_to is not None:
                self.send_header("Location", goes_to)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *given: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
        server.shutdown()


def test_a_server_that_sends_on_to_another_one_does_not_pass_the_key_on() -> None:
    with listening() as (other, seen), listening(f"{other}/metrics") as (url, _):
        assert get(f"{url}/metrics", "secret") == b""
        with pytest.raises(Exception, match=r"metrics"):
            scrape(f"{url}/metrics", "secret")
    assert seen == [("/metrics", None), ("/metrics", None)]


def test_another_page_of_the_same_server_gets_the_key() -> None:
    with listening("/metrics/") as (url, seen):
        assert get(f"{url}/metrics", "secret") == b""
    assert seen == [("/metrics", "Bearer secret"), ("/metrics/", "Bearer secret")]
