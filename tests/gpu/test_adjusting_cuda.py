"""Masks, bad words, biases and penalties by kernels, against plain torch: the same logits, the same tables."""

from __future__ import annotations

import pytest
import torch

from support.adjusting_cases import Case, Tried, cases
from support.cuda import no_waiting

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("vocab", [5, 2049, 50_257, 128_256])
def test_the_kernels_do_what_plain_torch_does(vocab: int) -> None:
    for number, case in enumerate(cases((vocab,), 6, (0, 3, 1024), (0, 2, 256))):
        assert not list(Tried(case, torch.device("cuda"), number).differences()), case


def test_the_kernels_wait_for_nothing() -> None:
    from tandem.worker import adjusting

    tried = Tried(Case(128_256, 6, "half", True, 40, 20), torch.device("cuda"), 0)
    tables = tried.tables._tables()

    def run() -> None:
        adjusting.adjust(
            tried.logits, tried.slots, tried.position, tables, masks=True, penalties=True, biases=40, sequences=20
        )
        adjusting.note(tried.slots, tried.position, tried.slots, tables, penalties=True, sequences=True, most=2)

    run()
    with no_waiting():
        run()
