"""What an operator decides about scheduling; see SchedulerConfig for each option's meaning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    max_waiting_requests: int = 10_000
    max_waiting_tokens: int = 64_000_000
    max_requests_per_client: int = 8_192
    max_n: int = 128
    watermark: float = 0.01
    enable_prefix_caching: bool = True
    priority_aging_s: float = 30.0
    mixed_step_target_s: float = 0.1
