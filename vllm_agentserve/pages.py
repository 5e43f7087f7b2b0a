"""A page of a server, with an API key that no other server gets."""

import os
import urllib.request
from typing import IO, Any
from urllib.parse import urlsplit

KEY_VARIABLE = "OPENAI_API_KEY"


def given_key(option: str | None) -> str | None:
    """The API key of an option, or else of the environment, without blanks and line breaks around it; None without one.

    Raises:
        ValueError: no header can carry it. The message does not show it.
    """
    name, given = ("--api-key", option) if option else (KEY_VARIABLE, os.environ.get(KEY_VARIABLE))
    key = (given or "").strip()
    if not all("!" <= letter <= "~" for letter in key):
        raise ValueError(f"{name} is no API key: it has blanks, line breaks or letters that are not ASCII")
    return key or None


def refusal(url: str, code: int) -> str | None:
    """What it means that a server answers with this HTTP status; None where that depends on what was asked for."""
    if code in (401, 403):
        return f"{url} answers HTTP {code}: it wants an API key, give one with --api-key or in {KEY_VARIABLE}"
    if code == 429 or code >= 500:
        return f"{url} answers HTTP {code}: a server is there, but it cannot serve this now; its log says why"
    return None


def has_password(url: str) -> bool:
    """Whether an address holds a user name or a password, which would be shown with it."""
    host = url.partition("://")[2] or url
    return "@" in host.partition("/")[0]


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
