"""Rules that hold for every test: no leaks, no network, one thread, warnings are errors, a GPU or a skip."""

import gc
import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of hundreds of processes compiles Tandem anew
os.environ["TANDEM_KEYS"] = "/nonexistent/keys"  # those of whoever runs the tests are none of their business

import pytest
from hypothesis import HealthCheck, settings

from support.deadlines import DEADLINE_S
from support.gateway import Served, service
from support.grids import whole_grid
from support.leaks import end_descendants, leaked, mark_descendants, snapshot

mark_descendants()
gc.disable()  # till all modules are imported: three thousand with torch, of which nothing becomes garbage
ROOT = Path(__file__).resolve().parents[1]
LEAK_DEADLINE_S = DEADLINE_S / 5
FAILED = pytest.StashKey[bool]()
THOROUGH = ("bench", "chaos", "clients", "fuzz", "hostile")
"""Folders whose tests are all marked so."""

# `python -m pytest` in the root puts the root itself on the path, where `client` or `launch` would import once more.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.register_profile(
    "nightly", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("TANDEM_TEST_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Declare markers and turn warnings into errors."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none, and only there")
    config.addinivalue_line("markers", "thorough: runs under `make test-thorough` and in CI, not under `make test`")
    config.addinivalue_line("markers", "slow: runs under `make test-all` (TANDEM_TEST_GRID=full) only")
    config.addinivalue_line("filterwarnings", "error")
    # torch scripts some of its own helpers on import, which it deprecates itself from 2.12 on.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow tests unless asked for; skip GPU tests where there is no GPU (torch is imported for those only)."""
    for item in items:
        if item.path.relative_to(ROOT / "tests").parts[0] in THOROUGH:
            item.add_marker(pytest.mark.thorough)
    if not whole_grid() and "slow" not in config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [item for item in items if not item.get_closest_marker("slow")]
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _cuda():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Let the cycle collector look at what the tests make, and no more at the modules."""
    gc.freeze()
    gc.enable()


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note for `no_leaks` that a test failed."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(settings: Any) -> Generator[None, object, object]:
    """Let pytest-timeout's alarm go off again and again: what ends a test that hangs may hang too."""
    result = yield
    if signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.setitimer(signal.ITIMER_REAL, settings.timeout, DEADLINE_S)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, object, object]:
    """Give the teardown of a failed test an alarm: pytest-timeout takes its own away with the failure."""
    if signal.getitimer(signal.ITIMER_REAL)[0]:
        return (yield)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"the teardown has hung for {DEADLINE_S:g} s"))
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_S, DEADLINE_S)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a thread, a child process or an open file behind; kill what a failed test left.

    Fixtures of a wider scope are set up before this one and so belong to nobody's test. CUDA opens files of its own
    on first use, so GPU tests are held to threads and processes only.
    """
    before = snapshot()
    yield
    if request.node.stash.get(FAILED, False):
        end_descendants(before)  # or they would slow down whatever comes next
    found = leaked(before, LEAK_DEADLINE_S, check_files=request.node.get_closest_marker("gpu") is None)
    if found:
        end_descendants(before)
        pytest.fail("the test left behind:\n  " + "\n  ".join(found), pytrace=False)


@pytest.fixture(autouse=True, scope="session")
def one_name_per_module() -> Iterator[None]:
    """Fail a run that imported one of our modules under a second name (reported with the last test)."""
    yield
    twice = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or not os.path.isabs(file) or name == "tandem" or name.startswith("tandem."):
            continue
        path = Path(file).resolve()
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in ("tests", ".venv", "scripts"):
            twice.append(f"{path.relative_to(ROOT)} as {name}")
    if twice:
        pytest.fail("modules of tandem imported under a second name: " + ", ".join(sorted(twice)), pytrace=False)


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """One service with HTTP for all tests that leave it as it was."""
    with service() as found:
        yield found
