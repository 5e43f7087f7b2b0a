"""What a cluster is made of: its model, options of `vllm serve`, how many engines, and how conversations are placed."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_agentserve.bench.arms import last_value
from vllm_agentserve.config import KEY, AgentServeConfig
from vllm_agentserve.options import read_json
from vllm_agentserve.policy.placement import Placement
from vllm_agentserve.vllm_compat import SCHEDULER_NAME, is_our_scheduler

SCHEDULER_OPTION = "--scheduler-cls"
START_TIMEOUT_S = 1800.0
"""A large model is loaded and compiled for many minutes."""
LONGEST_START_S = 86_400
ADDED = {
    SCHEDULER_OPTION: SCHEDULER_NAME,
    # Both are asked for every second.
    "--disable-access-log-for-endpoints": "/health,/metrics",
}
"""Options that every engine gets unless they are given."""
TAKEN = {
    "--host": "the cluster has one address: use its own --host, before the model",
    "--port": "the cluster has one address: use its own --port, before the model",
    "--uds": "engines listen where the cluster looks for them",
    "--headless": "every engine has its API server here",
    "--grpc": "requests come over HTTP",
    "--ssl-keyfile": "requests come over HTTP: put a proxy with TLS before the cluster",
    "--ssl-certfile": "requests come over HTTP: put a proxy with TLS before the cluster",
    "--root-path": "paths are those of one engine",
    "--middleware": "vllm_agentserve adds its own; others would not see what the ingress answers",
}
"""Options of `vllm serve` that cannot be combined with a cluster."""
TRANSFER_OPTION = "--kv-transfer-config"
TRANSFER = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
"""What engines get where prompts are computed on other ones."""


class SettingsError(ValueError):
    """A setting that is not allowed; the message names it, its value and what is allowed."""


@dataclasses.dataclass(frozen=True)
class ClusterSettings:
    """Checked settings.

    Args:
        model: a folder or a name, as for `vllm serve`.
        options: further options of `vllm serve`, the same for every engine.
        engines: how many.
        ingresses: processes that take requests.
        prefillers: further engines that compute the first prompts of conversations for the others; 0 for none.
        prefill_tokens: first prompts that are shorter are computed where their conversation lives.
        prefill_seconds: a prefiller that has not answered by then is not waited for.
        policy: see `Policy` of `policy/placement.py`.
        bound: see `Placement`.
        pin_seconds: see `Placement`.
        max_pins: see `Placement`.
        cores_shared: whether the engines of a machine without a GPU each get their share of its cores.
        start_timeout_s: how long an engine may take until it is healthy.

    Raises:
        SettingsError: one of them is not allowed.
    """

    model: str
    options: tuple[str, ...] = ()
    engines: int = 2
    ingresses: int = 1
    prefillers: int = 0
    prefill_tokens: int = 4096
    prefill_seconds: float = 30.0
    policy: str = "conserve"
    bound: float = 1.25
    pin_seconds: float = 3600.0
    max_pins: int = 65536
    cores_shared: bool = True
    start_timeout_s: float = START_TIMEOUT_S

    def __post_init__(self) -> None:
        if not self.model:
            raise SettingsError("model = '' is not allowed: it must be a folder or a name")
        for name in ("engines", "ingresses"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024:
                raise SettingsError(f"{name} = {value!r} is not allowed: it must be a whole number from 1 to 1024")
        for name, most in (("prefillers", 1024), ("prefill_tokens", 1 << 30)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise SettingsError(f"{name} = {value!r} is not allowed: it must be a whole number from 0 to {most}")
        for name in ("bound", "pin_seconds", "max_pins", "prefill_seconds", "start_timeout_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise SettingsError(f"{name} = {value!r} is not allowed: it must be a number")
        if not 0 < self.prefill_seconds < float("inf"):
            raise SettingsError(
                f"prefill_seconds = {self.prefill_seconds!r} is not allowed: it must be a number above 0"
            )
        if not 1 <= self.start_timeout_s <= LONGEST_START_S:
            raise SettingsError(
                f"start_timeout_s = {self.start_timeout_s!r} is not allowed: it must be a number from 1 to {LONGEST_START_S}"
            )
        try:
            self.placement()
        except (TypeError, ValueError) as error:
            raise SettingsError(str(error)) from error
        for given in self.options:
            name = given.partition("=")[0].replace("_", "-")
            if name in TAKEN:
                raise SettingsError(f"{name} cannot be given to engines of a cluster: {TAKEN[name]}")
            if self.prefillers and name.startswith((TRANSFER_OPTION, "--kv-offloading")):
                raise SettingsError(f"{name} cannot be given with prefillers: they need vLLM's place for a connector")
        if self.prefillers and self.own_options().kv_host_gib:
            raise SettingsError("kv_host_gib cannot be given with prefillers: they need vLLM's place for a connector")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "ClusterSettings":
        """Settings by name, as a file for `serve deploy` has them."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise SettingsError(f"there is no setting {unknown[0]!r}: there are {', '.join(known)}")
        if not isinstance(given.get("model"), str):
            raise SettingsError(f"model = {given.get('model')!r} is not allowed: it must be a folder or a name")
        options = given.get("options", ())
        if isinstance(options, str) or not isinstance(options, Sequence):
            raise SettingsError(f"options = {options!r} is not allowed: it must be a list, one entry per word")
        return cls(**{**given, "options": tuple(map(str, options))})

    def mapping(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return dataclasses.asdict(self) | {"options": list(self.options)}

    def without_options(self) -> "ClusterSettings":
        """What those need that do not run engines."""
        return dataclasses.replace(self, options=())

    def placement(self) -> Placement:
        """A placement of these settings."""
        return Placement(self.policy, bound=self.bound, pin_seconds=self.pin_seconds, max_pins=self.max_pins)

    def engine_options(self) -> list[str]:
        """The options of every engine: with our scheduler, unless another one is chosen."""
        added = ADDED | ({TRANSFER_OPTION: json.dumps(TRANSFER)} if self.prefillers else {})
        missing = [one for name, value in added.items() if not last_value(self.options, name) for one in (name, value)]
        return [*self.options, *missing]

    @property
    def client_names(self) -> bool:
        """Whether the engines read names that clients give in forms of their own."""
        ours = is_our_scheduler(last_value(self.engine_options(), SCHEDULER_OPTION))
        return ours and self.own_options().client_names

    def own_options(self) -> AgentServeConfig:
        """Those of our scheduler; the default ones where they are wrong, which the engines will say."""
        try:
            given = read_json(last_value(self.options, "--additional-config") or "{}")
            return AgentServeConfig.from_mapping(given.get(KEY, {}))
        except (AttributeError, ValueError):
            return AgentServeConfig()
