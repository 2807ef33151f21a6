"""The command line: `tandem serve | generate | chat | complete | demo | doctor | stats | drain | bench | gateway |
scheduler | worker | keys`. Each command's work is elsewhere; here are its flags, its help and its exit code (those of
`bench` are in bench/cli.py).

Exit codes: 0 done, or ended as asked; 1 something failed; 2 the options cannot work; 130 `generate` was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..gateway.config import GatewayConfig, keys_in_environment
from ..protocol.errors import ConfigurationError, TandemError
from ..scheduler.config import SchedulerConfig
from ..worker.config import WorkerConfig
from .config import merged, read_file
from .options import Group, flags, option_names, with_flags
from .progress import note
from .restarts import SupervisionConfig
from .sampling import request_flags, sample_flags, sampling_flags
from .structured import structured_flags, with_structure
from .terminal import UNWRITABLE, discard_stdout, prepare_stdio

app = typer.Typer(
    name="tandem",
    help="Serves large language models. Without --model, commands use a small built-in one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut long flags off on a narrow terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)

SCHEDULER = Group(SchedulerConfig, "Scheduler")
WORKER = Group(WorkerConfig, "Worker: model and device", without=("scheduler",))
GATEWAY = Group(GatewayConfig, "HTTP", without=("scheduler", "reuse_port"))
SERVE_FLAGS = flags(SCHEDULER, WORKER, GATEWAY, Group(SupervisionConfig, "Processes that end or hang"))
GATEWAY_FLAGS = flags(Group(GatewayConfig, "Gateway"))
SCHEDULER_FLAGS = flags(SCHEDULER)
EMBEDDED_FLAGS = flags(
    # `--seed` is the sampling's there, and a worker of one's own needs no name.
    Group(WorkerConfig, "If no running service is used", without=("scheduler", "name", "seed", "trace_dir"))
)
SAMPLING_FLAGS = [*sampling_flags(), *request_flags()]
SAMPLE_FLAGS = sample_flags()
STRUCTURED_FLAGS = structured_flags()
WORKER_FLAGS = flags(Group(WorkerConfig, "Worker"))

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with options, named like the flags; flags beat it.")
]
Connect = Annotated[
    str | None,
    typer.Option(
        help="Address of a running service (default: $TANDEM_ADDRESS, else your own running one, else one is started "
        "for this command)."
    ),
]
RunningService = Annotated[
    str | None, typer.Option("--connect", help="Address of the service (default: $TANDEM_ADDRESS, else your own).")
]
ServiceKeys = Annotated[
    str | None,
    typer.Option(
        "--keys",
        help="Key file or directory for a tcp address (see `tandem keys`); default: $TANDEM_KEYS or "
        "~/.config/tandem/keys.",
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow TCP without keys.")]
SystemMessage = Annotated[str | None, typer.Option("--system", help="The chat's system message.")]


ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        rich_help_panel="HTTP",
        help="Key that HTTP requests must bring; may be given several times. $TANDEM_API_KEY (separated by commas) "
        "shows them to nobody.",
    ),
]


def main() -> None:
    """Entry point of the `tandem` command. Errors that a user can mend are one sentence, never a traceback."""
    prepare_stdio()
    try:
        app(prog_name="tandem")
    except ConfigurationError as error:
        _fail(error, 2)
    except TandemError as error:
        _fail(error, 1)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        discard_stdout()
        _fail(f"cannot write the output: {error.strerror}", 1)


def _fail(error: object, code: int) -> None:
    note(f"tandem: {error}")
    sys.exit(code)


@app.callback(invoke_without_command=True)
def root(show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if show_version:
        try:
            print(version("tandem-serve"))
        except PackageNotFoundError:
            print("unknown (run from a source tree that is not installed)")
        raise typer.Exit


@app.command()
@with_flags(SERVE_FLAGS)
def serve(
    model_tag: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", show_default=False, help="The same as --model.")
    ] = None,
    config: ConfigFile = None,
    data_parallel_size: Annotated[
        int | None, typer.Option(help="How many workers; each needs a GPU of its own if it uses one (default 1).")
    ] = None,
    http: Annotated[
        bool | None,
        typer.Option("--http/--no-http", help="OpenAI-compatible HTTP (default: if its packages are installed)."),
    ] = None,
    api_server_count: Annotated[
        int | None,
        typer.Option(rich_help_panel="HTTP", help="How many gateway processes share the port of HTTP (default 1)."),
    ] = None,
    api_key: ApiKey = None,
    **options: Any,
) -> None:
    """Start a scheduler, its workers and an HTTP gateway, and serve until Ctrl-C."""
    from .serve import serve as run

    own = {
        "data_parallel_size": data_parallel_size,
        "http": http,
        "api_server_count": api_server_count,
        "api_key": api_key or None,
    }
    if model_tag is not None:
        if options.get("model") not in (None, model_tag):
            raise ConfigurationError(f"MODEL and --model name two models, {model_tag} and {options['model']}; give one")
        options["model"] = model_tag
    file = read_file(config, [*option_names(SERVE_FLAGS), *own]) if config else {}
    chosen = merged({**options, **own}, file)
    http, keys = _switch("http", chosen.pop("http", None)), _keys(chosen.pop("api_key", None))
    count = chosen.pop("api_server_count", None)
    gateways = None if count is None else _count("api_server_count", count)
    replicas = _count("data_parallel_size", chosen.pop("data_parallel_size", 1))
    run(chosen, replicas, http=http, api_server_count=gateways, api_keys=keys)


@app.command()
@with_flags(SCHEDULER_FLAGS)
def scheduler(config: ConfigFile = None, **options: Any) -> None:
    """Run only the scheduler, in this process: for those who place processes themselves."""
    from .serve import run_scheduler

    file = read_file(config, option_names(SCHEDULER_FLAGS)) if config else {}
    sys.exit(run_scheduler(merged(options, file)))


@app.command()
@with_flags(WORKER_FLAGS)
def worker(config: ConfigFile = None, **options: Any) -> None:
    """Run only a worker, in this process: for those who place processes themselves."""
    from .serve import run_worker
    from .tether import leave

    file = read_file(config, option_names(WORKER_FLAGS)) if config else {}
    leave(run_worker(merged(options, file)))


@app.command()
@with_flags(GATEWAY_FLAGS)
def gateway(config: ConfigFile = None, api_key: ApiKey = None, **options: Any) -> None:
    """Run only an HTTP gateway, in this process: for those who place processes themselves."""
    from .serve import run_gateway

    file = read_file(config, [*option_names(GATEWAY_FLAGS), "api_key"]) if config else {}
    chosen = merged({**options, "api_key": api_key or None}, file)
    keys = _keys(chosen.pop("api_key", None))
    sys.exit(run_gateway(chosen, keys))


@app.command()
@with_flags([*SAMPLING_FLAGS, *SAMPLE_FLAGS, *STRUCTURED_FLAGS, *EMBEDDED_FLAGS])
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", show_default=False)] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="File with more prompts, one a line; - is stdin.")
    ] = None,
    connect: Connect = None,
    system: SystemMessage = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt's text; no chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each answer.")] = False,
    config: ConfigFile = None,
    **options: Any,
) -> None:
    """Answer prompts. One is streamed; several are answered at once."""
    from .generate import generate as run
    from .generate import read_prompts

    sampling, worker_options = _split(options, config)
    given = [*(prompts or []), *(read_prompts(file) if file else [])]
    code = run(
        given,
        connect=connect,
        worker_options=worker_options,
        sampling=with_structure(sampling),
        system=system,
        raw=raw,
        as_json=as_json,
    )
    sys.exit(code)


@app.command()
@with_flags([*SAMPLING_FLAGS, *EMBEDDED_FLAGS])
def chat(connect: Connect = None, system: SystemMessage = None, config: ConfigFile = None, **options: Any) -> None:
    """Talk to a model in the terminal."""
    from .chat import chat as run

    sampling, worker_options = _split(options, config)
    run(connect=connect, worker_options=worker_options, sampling=sampling, system=system)


@app.command()
@with_flags([*SAMPLING_FLAGS, *EMBEDDED_FLAGS])
def complete(connect: Connect = None, config: ConfigFile = None, **options: Any) -> None:
    """Let a model continue texts in the terminal; no chat template."""
    from .complete import complete as run

    sampling, worker_options = _split(options, config)
    run(connect=connect, worker_options=worker_options, sampling=sampling)


@app.command()
@with_flags(EMBEDDED_FLAGS)
def demo(config: ConfigFile = None, **options: Any) -> None:
    """Watch the built-in model answer a dozen questions at once."""
    from .demo import demo as run

    sys.exit(run(_split(options, config)[1]))


@app.command()
def stats(
    connect: RunningService = None,
    keys: ServiceKeys = None,
    insecure: Insecure = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, max=3_600.0, help="Seconds between readings with --watch.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each reading.")] = False,
) -> None:
    """Show how a running service is: requests, workers, latencies, how long the GPU idles."""
    from .stats import stats as run

    run(connect, keys=keys, insecure=insecure, watch=watch, interval_s=interval, as_json=as_json)


@app.command()
@with_flags(EMBEDDED_FLAGS)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
    config: ConfigFile = None,
    **options: Any,
) -> None:
    """Show what is installed, what a service with these options would use and why, and what is in its way.

    Exit code 1 if it would not start.
    """
    from .doctor import doctor as run

    sys.exit(run(_split(options, config)[1], as_json=as_json))


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="Name of the worker, as `tandem stats` shows it.", show_default=False)],
    connect: Annotated[
        str | None, typer.Option(help="Address of the service, ipc only (default: $TANDEM_ADDRESS or your own).")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the worker is gone.")] = True,
) -> None:
    """Move a worker's requests to others as there is room, then end it."""
    from .drain import drain as run

    run(worker, connect, wait)


def _bench_app() -> typer.Typer:
    from ..bench.cli import app as bench

    return bench


def _keys_app() -> typer.Typer:
    from .keys import app as keys

    return keys


def _add_later(name: str, load: Callable[[], typer.Typer], says: str) -> None:
    """`tandem NAME …`, whose commands are imported when one is asked for: the others need not wait for them."""

    class Later(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return list(typer.main.get_group(load()).commands)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            return typer.main.get_group(load()).commands.get(cmd_name)

    app.add_typer(typer.Typer(cls=Later, no_args_is_help=True), name=name, help=says)


_add_later(
    "bench",
    _bench_app,
    "Measure throughput and latencies: all requests at once, arriving over time, or at several loads.",
)
_add_later("keys", _keys_app, "Make, list, replace and revoke the keys that TCP addresses need.")


def _split(options: dict[str, Any], config: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a request says, and the options for a worker, of flags and configuration file together."""
    chosen = merged(options, read_file(config, list(options)) if config else {})
    sampling_names = set(option_names([*SAMPLING_FLAGS, *SAMPLE_FLAGS, *STRUCTURED_FLAGS]))
    sampling = {name: value for name, value in chosen.items() if name in sampling_names}
    return sampling, {name: value for name, value in chosen.items() if name not in sampling_names}


def _switch(name: str, value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise ConfigurationError(f"--{name}: must be true or false, not {value!r}")


def _keys(given: object) -> list[str]:
    """API keys of flags or file, else those of the environment."""
    keys = [given] if isinstance(given, str) else given
    if keys is None:
        return keys_in_environment()
    if not isinstance(keys, list) or not all(isinstance(key, str) and key.strip() for key in keys):
        raise ConfigurationError("--api-key: must be text, or a list of texts, none of them empty")
    if any("," in key for key in keys):
        raise ConfigurationError("--api-key: a key must not hold a comma")
    return keys


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(f"--{name.replace('_', '-')}: must be a whole number, not {value!r}")
    return value


if __name__ == "__main__":
    main()
