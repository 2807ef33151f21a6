"""How long a step takes on one H200, fitted to measured figures of Llama-3.1-8B's shape in bfloat16.

    step = fixed + rows · per_row + context tokens · per_context_token + prefill tokens · per_prefill_token

fixed and per_row: all weight GEMMs took 3.97, 4.17 and 6.00 ms at 1, 32 and 256 rows, which is 3.95 ms + 8 µs a row;
    the small kernels between them took 0.9 ms, and 0.13 ms went to the reductions of split GEMMs.
per_context_token: attention of 32 rows over 4,096 tokens each took 4.2 ms.
per_prefill_token: 16 GFLOP at the measured 790 TFLOP/s.

What it gives, beside what was measured: 6.0 ms for 32 rows × 768 tokens (5.95 by the fastest engines measured), 9.4 ms
for 32 × 4,096 (9.21). At 256 rows × 512 tokens it gives 11.2 ms, where engines took about 13. Beyond 256 rows the GEMMs
are bound by arithmetic and cost more than this line says.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds each."""

    fixed: float = 4.98e-3
    per_row: float = 8.0e-6
    per_context_token: float = 32.0e-9
    per_prefill_token: float = 20.3e-6

    def seconds(self, rows: int, context_tokens: int, prefill_tokens: int) -> float:
        """A step that decodes `rows` rows with `context_tokens` in all, and computes `prefill_tokens` of chunks."""
        return (
            self.fixed
            + rows * self.per_row
            + context_tokens * self.per_context_token
            + prefill_tokens * self.per_prefill_token
        )

    @classmethod
    def constant(cls, seconds: float) -> StepTime:
        """Every step takes the same."""
        return cls(seconds, 0.0, 0.0, 0.0)
