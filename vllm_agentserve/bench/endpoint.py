"""What a running server says of itself: its model, its limits, its KV cache, its counters."""

import http.client
import json
import urllib.error
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from vllm_agentserve.pages import open_page, refusal

PATIENCE_S = 10.0
NO_ANSWER = (OSError, http.client.HTTPException, OverflowError)
"""What is raised where nothing answers, or something that does not speak HTTP; OverflowError for a port that cannot be."""


class EndpointError(RuntimeError):
    """Nothing usable answers at the address; the message holds the address, what was found and the remedy."""


@dataclass(frozen=True)
class Endpoint:
    """A server that can be measured.

    Args:
        extensions: whether it knows vLLM's own request fields.
        max_model_len: longest context in tokens, where it tells.
        kind: its name and version.
    """

    url: str
    model: str
    extensions: bool
    max_model_len: int | None
    kind: str


def get(url: str, key: str | None = None) -> bytes:
    """What is at an address; `key` is an API key, for servers that want one."""
    with open_page(url, key, PATIENCE_S) as answer:
        return bytes(answer.read())


def refused(url: str, code: int) -> str:
    """What an HTTP status means that a server answers instead of what was asked for."""
    if code == 404:
        return f"{url} does not answer but with HTTP 404: a server is there, and no such page; give its address alone"
    return refusal(url, code) or f"{url} answers HTTP {code}: a server is there, and it is not one of this kind"


def get_json(url: str, key: str | None = None) -> Any:
    try:
        return json.loads(get(url, key))
    except (*NO_ANSWER, ValueError, RecursionError):
        return None


def find_endpoint(url: str, key: str | None = None) -> Endpoint:
    """Asks a server what it is; raises `EndpointError` when it is not there, wants another key or serves no model."""
    try:
        models = json.loads(get(f"{url}/v1/models", key))["data"]
        first = models[0]
        name = str(first["id"])
        room = first.get("max_model_len")
    except urllib.error.HTTPError as error:
        error.close()
        raise EndpointError(refused(f"{url}/v1/models", error.code)) from error
    except NO_ANSWER as error:
        raise EndpointError(
            f"{url} does not answer ({str(error).strip()}): is the server up, and is this its address?"
        ) from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise EndpointError(
            f"{url}/v1/models lists no model: it does not look like an OpenAI-compatible server"
        ) from error
    version = get_json(f"{url}/version", key)
    vllm = isinstance(version, dict) and "version" in version and first.get("owned_by") in ("vllm", None)
    kind = f"vLLM {version['version']}" if vllm else f"{first.get('owned_by') or 'another server'}"
    return Endpoint(url, name, vllm, room if isinstance(room, int) else None, kind)


def metric_families(url: str, key: str | None = None) -> list[Any]:
    """Everything on `/metrics`; empty where there is no such page, or none that can be read."""
    try:
        return list(text_string_to_metric_families(get(f"{url}/metrics", key).decode()))
    except (*NO_ANSWER, ValueError, IndexError, KeyError):
        return []


def read_counters(url: str, key: str | None = None) -> dict[str, float]:
    """The counters of `/metrics` that begin with `vllm:` or `sglang:`, summed over their labels; empty where there are none."""
    totals: dict[str, float] = {}
    for family in metric_families(url, key):
        if family.type != "counter" or not family.name.startswith(("vllm:", "sglang:")):
            continue
        for sample in family.samples:
            if sample.name.endswith("_total"):
                totals[family.name] = totals.get(family.name, 0.0) + sample.value
    return totals


def added(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What each counter gained; those that stood still are left out."""
    gains = {name: after[name] - before.get(name, 0.0) for name in sorted(after)}
    return {name: round(gain, 6) for name, gain in gains.items() if gain}


def kv_blocks(url: str, key: str | None = None) -> tuple[int, int] | None:
    """The KV cache as the server states it: (blocks, tokens per block), or None."""
    for family in metric_families(url, key):
        if family.name == "vllm:cache_config_info":
            labels = family.samples[0].labels
            blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
            if blocks.isdigit() and size.isdigit():
                return int(blocks), int(size)
    return None
