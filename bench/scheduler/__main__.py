"""What the scheduler costs: `python -m tandem.bench.scheduler core`, and how many workers it carries: `… cluster`."""

from __future__ import annotations

import typer

from . import cluster, core

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.command("core")(core.main)
app.command("cluster")(cluster.main)

if __name__ == "__main__":
    app()
