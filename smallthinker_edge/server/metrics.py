"""What a server tells of itself in Prometheus' text format (version 0.0.4). Reads SmallThinker.stats() and computes
nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

PREFIX = "smallthinker_"
# Names of stats(): metric, type, meaning.
FIGURES = {
    "prompt_tokens": ("prompt_tokens_total", "counter", "Tokens of prompts"),
    "reused_tokens": ("reused_tokens_total", "counter", "Of these, tokens known from an earlier prompt"),
    "generated_tokens": ("generated_tokens_total", "counter", "Tokens made"),
    "prompt_seconds": ("prompt_seconds_total", "counter", "Time until the first token of answers"),
    "generation_seconds": ("generation_seconds_total", "counter", "Time from the first token of answers to the last"),
    "hits": ("expert_hits_total", "counter", "Experts found in memory"),
    "ahead_hits": ("expert_ahead_hits_total", "counter", "Experts read ahead for their use"),
    "misses": ("expert_misses_total", "counter", "Experts read when they were needed"),
    "hit_rate": ("expert_hit_ratio", "gauge", "Hits of all uses of experts since the start"),
    "read_bytes": ("expert_read_bytes_total", "counter", "Bytes of experts read from storage"),
    "stall_seconds": ("expert_stall_seconds_total", "counter", "Time compute threads waited for experts, summed"),
    "rss_bytes": ("memory_bytes", "gauge", "Resident memory of the process"),
    "peak_bytes": ("memory_peak_bytes", "gauge", "Most resident memory so far"),
    "temperature_celsius": ("temperature_celsius", "gauge", "Temperature of the processor"),
}


class Metrics:
    """Counts requests by route and status; the rest comes from the model."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()

    def text(self, stats: Mapping[str, object], budget: int | None, pending: int, most_pending: int) -> str:
        """All metrics. stats: of the model. budget: bytes of the process, None without one."""
        lines: list[str] = []

        def add(name: str, kind: str, meaning: str, *values: tuple[str, object]) -> None:
            lines.append(f"# HELP {PREFIX}{name} {meaning}.")
            lines.append(f"# TYPE {PREFIX}{name} {kind}")
            lines.extend(f"{PREFIX}{name}{labels} {value}" for labels, value in values)

        requests = [
            (f'{{route="{route}",status="{status}"}}', n) for (route, status), n in sorted(self.requests.items())
        ]
        add("requests_total", "counter", "Requests answered", *requests)
        add("pending_requests", "gauge", "Requests that wait or are computed", ("", pending))
        add("most_pending_requests", "gauge", "How many may be pending", ("", most_pending))
        if budget is not None:
            add("memory_budget_bytes", "gauge", "Budget of the process", ("", budget))
        for name, (metric, kind, meaning) in FIGURES.items():
            if isinstance(value := stats.get(name), int | float):
                add(metric, kind, meaning, ("", value))
        throttled = stats.get("throttled")
        if isinstance(throttled, str):
            add(
                "throttled",
                "gauge",
                "Whether heat or a weak supply slows the processor down",
                ("", int(bool(throttled))),
            )
        return "\n".join(lines) + "\n"
