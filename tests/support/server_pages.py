"""What a running server counts on /metrics, for tests."""

import time
import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def total(url: str, name: str, **labels: str) -> float:
    """The sum of a series with these labels."""
    with urllib.request.urlopen(url + "/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


class Programs:
    """How many requests came since this was made, by how their programs were known, and how many programs there are more.

    Args:
        url: of a server with a policy of programs.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._before = self._counts()

    def _counts(self) -> dict[str, float]:
        """The counts once half a second changes none."""
        last: dict[str, float] = {}
        for _ in range(60):
            now = {name: total(self._url, f"vllm:agentserve_{series}") for name, series in SERIES.items()}
            if now == last:
                break
            last = now
            time.sleep(0.5)
        return last

    def since(self) -> dict[str, int]:
        now = self._counts()
        return {name: round(now[name] - self._before[name]) for name in now}


SERIES = {
    "explicit": "program_explicit_requests_total",
    "inferred": "program_inferred_requests_total",
    "new": "program_new_requests_total",
    "programs": "programs_tracked",
    "invalid": "invalid_hints_total",
}
