"""The scheduler process under cProfile: `python -m tandem.bench.scheduler.profiled FILE …`, the rest as for
`tandem.scheduler.main`. The profile is written when it ends."""

from __future__ import annotations

import cProfile
import sys

from ...scheduler.main import main as scheduler_main


def main() -> int:
    file, *arguments = sys.argv[1:]
    profile = cProfile.Profile()
    try:
        return profile.runcall(scheduler_main, arguments)
    finally:
        profile.dump_stats(file)


if __name__ == "__main__":
    sys.exit(main())
