"""What is compared: stock vLLM, stock with other options, agentserve in its modes, servers somebody else runs."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args, get_type_hints
from urllib.parse import urlsplit

from vllm_agentserve.bench.device import has_nvidia_driver
from vllm_agentserve.bench.sessions import WorkloadError
from vllm_agentserve.config import KEY, AgentServeConfig, OptionError
from vllm_agentserve.options import read_json
from vllm_agentserve.pages import has_password
from vllm_agentserve.vllm_compat import SCHEDULER_NAME
from vllm_agentserve.vllm_compat.host import OWN_POLICIES, transfer_options

GRAMMAR = (
    "an arm is stock, stock-chunk=N, stock-threshold=N, stock-offload=GIB, stock-offload=GIB:arc, agentserve, agentserve-MODE, "
    "any of these followed by :KEY=VALUE,KEY=VALUE, or only KEY=VALUE,KEY=VALUE for stock with these options of vllm serve; "
    "after agentserve a KEY is one of its own options, and serve.KEY one of vllm serve; client.live=N lets N sessions at most be "
    "under way, client.last=true says which call is a session's last, client.anonymous=true sends no session ids, "
    "client.ranks=N keeps every session on one of N data-parallel engines"
)
SHORT = {"stock-chunk": "max-num-batched-tokens", "stock-threshold": "long-prefill-token-threshold"}
OFFLOAD = "stock-offload"
"""Stock with vLLM's own host memory behind the KV cache, of so many GiB."""
TAKEN = {
    "--port": "the benchmark gives every server its port: use its own --port",
    "--uds": "servers listen on a port here",
}
"""Options of `vllm serve` with which its server would not be found."""
HIDDEN = "KEY"
"""What stands where an API key was given."""
SECRETS = ("--api-key", "--hf-token")
"""Options of `vllm serve` whose values nobody else may see."""
SECRET = re.compile(r"(--(?:api|hf)[-_](?:key|token)(?:\s+|=))\S+(?:\s+(?!-)\S+)*")
"""One of them in a longer text, with all its values."""
MODES = get_args(get_type_hints(AgentServeConfig)["mode"])
HOST_POLICIES = tuple(
    name for name in get_args(get_type_hints(AgentServeConfig)["kv_host_policy"]) if name not in OWN_POLICIES
)
"""Those of vLLM itself. Ours asks our scheduler for the programs of requests."""


@dataclass(frozen=True)
class ClientOptions:
    """What the client of an arm does.

    Args:
        live: sessions under way at most; the others wait their turn, which counts as their time. None for no limit.
        last: it says which call is the last one of its session.
        anonymous: requests say neither which session they belong to nor which one spawned it.
        ranks: engines of a server with data parallelism among which sessions are shared out, each on one with all that it
            spawns; None leaves the choice to the server, request by request.
    """

    live: int | None = None
    last: bool = False
    anonymous: bool = False
    ranks: int | None = None


@dataclass(frozen=True)
class Arm:
    """One thing to compare: a server we start with `options`, or one at `url` that somebody else runs."""

    name: str
    options: tuple[str, ...] = ()
    url: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    client: ClientOptions = ClientOptions()
    key: str | None = field(default=None, repr=False)
    """API key that its server wants."""

    @property
    def ours(self) -> bool:
        """Whether we start its server."""
        return self.url is None


def parse_arm(text: str) -> Arm:
    """Parses one arm as written on the command line.

    Raises:
        WorkloadError: it is not one; the message names the part and the grammar.
    """
    head, _, tail = text.partition(":")
    if "=" in head and head.partition("=")[0] not in (*SHORT, OFFLOAD):
        head, tail = "stock", text
    policy = ""
    if head.partition("=")[0] == OFFLOAD:
        policy, tail = offload_policy(tail)
    pairs = parse_pairs(text, tail)
    client = client_options(text, pairs)
    if any(f"--{option_name(key.removeprefix('serve.'))}" in SECRETS for key in pairs):
        where = "the environment, as VLLM_API_KEY or HF_TOKEN, or in --serve"
        raise WorkloadError(
            f"an arm whose name holds an API key is not allowed, names are written down: give it in {where}"
        )
    name, _, value = head.partition("=")
    if name in SHORT and re.fullmatch(r"[1-9]\d*", value):
        return Arm(text, serve_options({SHORT[name]: value} | pairs), client=client)
    if name == OFFLOAD:
        return Arm(text, (*offload_options(text, value, policy), *serve_options(pairs)), client=client)
    if head == "stock":
        return Arm(text, serve_options(pairs), client=client)
    if head == "agentserve" or head.startswith("agentserve-"):
        return replace(agentserve_arm(text, head.removeprefix("agentserve").removeprefix("-"), pairs), client=client)
    raise WorkloadError(f"arm {text!r} is not known: {GRAMMAR}")


def offload_policy(tail: str) -> tuple[str, str]:
    """Splits what stands behind the colon of such an arm: which copies are dropped first, and the other options."""
    first, _, rest = tail.partition(",")
    return (first, rest) if first in HOST_POLICIES else (HOST_POLICIES[0], tail)


def offload_options(text: str, gib: str, policy: str) -> tuple[str, ...]:
    """Options of `vllm serve` for vLLM's own host memory behind the KV cache, as our option `kv_host_gib` asks for it.

    Raises:
        WorkloadError: the size is none.
    """
    try:
        size = AgentServeConfig.from_mapping({"kv_host_gib": as_json(gib)}).kv_host_gib
    except OptionError:
        size = 0.0
    if not size:
        raise WorkloadError(f"arm {text!r}: {OFFLOAD}={gib} is no size in GiB above 0; {GRAMMAR}")
    asked = transfer_options(size, policy, on_cpu=not has_nvidia_driver())
    return ("--kv-transfer-config", json.dumps(asked))


def client_options(text: str, pairs: dict[str, str]) -> ClientOptions:
    """Takes the options of the client out of the pairs of an arm."""
    found: dict[str, Any] = {}
    for key in [key for key in pairs if key.startswith("client.")]:
        name, value = key.removeprefix("client."), pairs.pop(key)
        if name in ("live", "ranks") and re.fullmatch(r"[1-9]\d*", value):
            found[name] = int(value)
        elif name in ("last", "anonymous") and value in ("true", "false"):
            found[name] = value == "true"
        else:
            raise WorkloadError(f"arm {text!r}: {key}={value} is not known; {GRAMMAR}")
    return ClientOptions(**found)


def agentserve_arm(text: str, mode: str, pairs: dict[str, str]) -> Arm:
    if mode and mode not in MODES:
        raise WorkloadError(f"arm {text!r}: agentserve has no mode {mode!r}; the modes are {', '.join(MODES)}")
    serve = {key.removeprefix("serve."): value for key, value in pairs.items() if key.startswith("serve.")}
    settings = {key: as_json(value) for key, value in pairs.items() if not key.startswith("serve.")}
    if mode:
        settings = {"mode": mode} | settings
    try:
        AgentServeConfig.from_mapping(settings)
    except OptionError as error:
        raise WorkloadError(f"arm {text!r}: {error} Options of vllm serve are written serve.KEY=VALUE here.") from error
    return Arm(text, (*scheduler_options(settings), *serve_options(serve)), settings=settings)


def scheduler_options(settings: dict[str, Any]) -> tuple[str, ...]:
    """Options of `vllm serve` that choose our scheduler, with these options of its own."""
    own = ("--additional-config", json.dumps({KEY: settings})) if settings else ()
    return ("--scheduler-cls", SCHEDULER_NAME, *own)


def parse_pairs(text: str, tail: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in filter(None, tail.split(",")):
        key, separator, value = part.partition("=")
        if not separator or not re.fullmatch(r"[A-Za-z][\w.-]*", key):
            raise WorkloadError(f"arm {text!r}: {part!r} is not KEY=VALUE; {GRAMMAR}")
        pairs[key.strip()] = value.strip()
    return pairs


def serve_options(pairs: dict[str, str]) -> tuple[str, ...]:
    """Options of `vllm serve`; `true` and `false` become the flags vLLM has for them."""
    options: list[str] = []
    for key, value in pairs.items():
        name = "--" + key.replace("_", "-")
        if value in ("true", "false"):
            options.append(name if value == "true" else name.replace("--", "--no-", 1))
        else:
            options += [name, value]
    refuse_taken(options)
    return tuple(options)


def option_name(option: str) -> str:
    """The name of an option of `vllm serve` as its help has it; vLLM takes underscores too, and a value after `=`."""
    return option.partition("=")[0].replace("_", "-")


def last_value(options: Sequence[str], name: str) -> str | None:
    """The value that counts of an option in a command line, the last one; None where the option is not there."""
    found = None
    for option, following in zip(options, (*options[1:], ""), strict=False):
        if option.startswith("-") and option_name(option) == name:
            found = option.partition("=")[2] if "=" in option else following
    return found


def hidden(command: Sequence[str]) -> list[str]:
    """A command line in which API keys and tokens are replaced by a word, for what is written down and shown.

    vLLM takes several keys after one option.
    """
    shown: list[str] = []
    hides = False
    for word in command:
        if hides and not word.startswith("-"):
            shown.append(HIDDEN)
            continue
        # One word of ours may hold several options of a server: `--serve "--api-key X"`.
        shown.append(SECRET.sub(rf"\1{HIDDEN}", word))
        hides = "=" not in word and option_name(word) in SECRETS
    return shown


def refuse_taken(options: Sequence[str]) -> None:
    """Raises `WorkloadError` for options that would take the server elsewhere."""
    for name, why in TAKEN.items():
        value = last_value(options, name)
        if value is not None:
            raise WorkloadError(f"{name} {value} is not allowed for a server of the benchmark, {why}")


def as_json(value: str) -> Any:
    try:
        return read_json(value)
    except ValueError:
        return value


def parse_url_arm(text: str) -> Arm:
    """Parses `NAME=URL` or a bare URL."""
    if has_password(text):
        raise WorkloadError("--url holds a user name or a password, which would be shown: give a key with --api-key")
    name, separator, url = text.partition("=")
    if not separator or name.startswith(("http:", "https:")):
        name, url = server_address(re.sub(r"^https?://", "", text)), text
    if not name or not is_address(url):
        raise WorkloadError(f"--url {text!r} is not a server: give NAME=http://HOST:PORT")
    return Arm(name, url=server_address(url))


def server_address(url: str) -> str:
    """The address of a server without the `/v1` under which clients of the OpenAI API are given it."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def is_address(url: str) -> bool:
    """Whether it can be the address of a server."""
    try:
        parts = urlsplit(url)
        # A port that cannot be raises, too.
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and not (parts.query or parts.fragment)
            and url.isprintable()
            and " " not in url
        )
    except ValueError:
        return False


def parse_arms(arms: Sequence[str], urls: Sequence[str], key: str | None = None) -> list[Arm]:
    """Parses all arms; an arm written twice gets a second name, which makes an A/A test.

    Args:
        key: API key for the servers of `urls`.

    Raises:
        WorkloadError: an arm is wrong, there is none, or two arms are the same running server.
    """
    parsed = [parse_arm(text) for text in arms] + [replace(parse_url_arm(text), key=key) for text in urls]
    if not parsed:
        raise WorkloadError(f"no arms to measure: {GRAMMAR}")
    named: list[Arm] = []
    for arm in parsed:
        if arm.url is not None and any(other.url == arm.url for other in named):
            raise WorkloadError(
                f"--url {arm.url} is given twice: its second arm would find the first one's prompts in the prefix cache"
            )
        same = sum(other.name.partition("#")[0] == arm.name for other in named)
        named.append(replace(arm, name=f"{arm.name}#{same + 1}") if same else arm)
    return named


def split_options(text: str) -> tuple[str, ...]:
    """Splits the value of `--serve` like a shell; raises `WorkloadError` for unbalanced quotes, and for options of `TAKEN`."""
    try:
        options = tuple(shlex.split(text))
    except ValueError as error:
        raise WorkloadError(f"--serve {text!r} cannot be split into options: {error}") from error
    refuse_taken(options)
    return options
