"""How long a test waits for what must happen before it fails: for a hang, and never for a machine that is slow."""

from __future__ import annotations

import os

DEADLINE_S = float(os.environ.get("TANDEM_TEST_DEADLINE_S", "300"))
"""For any one event. pytest's own timeout (pytest.ini) leaves room for three of them."""

LONG_LEASE_S = 3_600.0
"""For clients and workers where nobody is meant to lose one: on a slow machine a process, or a test's own loop, may be
kept from saying anything for longer than leases are by default."""
