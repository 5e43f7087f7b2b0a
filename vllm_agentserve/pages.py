"""A page of a server, with an API key that no other server gets."""

import urllib.request
from typing import IO, Any
from urllib.parse import urlsplit


class KeyStays(urllib.request.HTTPRedirectHandler):
    """Takes the key out of a request that is redirected to another server; Python itself leaves it in."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            following.remove_header("Authorization")
        return following


def authorization(key: str | None) -> dict[str, str]:
    """The header with which clients of the OpenAI API send their key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def open_page(url: str, key: str | None, timeout_s: float) -> Any:
    """The answer to a GET; raises what `urllib.request.urlopen` does."""
    request = urllib.request.Request(url, headers=authorization(key))
    return urllib.request.build_opener(KeyStays).open(request, timeout=timeout_s)
