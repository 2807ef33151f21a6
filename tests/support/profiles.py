"""How many examples the large state machines try: enough for every change, or for a night (TANDEM_TEST_PROFILE)."""

from __future__ import annotations

import os


def examples(ci: int, nightly: int) -> int:
    """`ci`, or `nightly` under the profile of that name; TANDEM_TEST_EXAMPLES sets another number for both."""
    chosen = nightly if os.environ.get("TANDEM_TEST_PROFILE") == "nightly" else ci
    return int(os.environ.get("TANDEM_TEST_EXAMPLES", chosen))


def most_s(examples: int) -> float:
    """How long so many may take, on a machine that is slow or busy with other things too."""
    return max(1_800.0, 6.0 * examples)
