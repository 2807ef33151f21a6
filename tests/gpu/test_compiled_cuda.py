"""Compiled models and CUDA graphs give what the uncompiled model gives."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem import AsyncClient
from tandem.launch.embedded import EmbeddedSystem
from tandem.worker.inspection import make_batch
from tandem.worker.pieces import piece_size, piece_sizes

from support.cuda import no_waiting
from support.observe import Observer, settled
from support.paged import Sequences, compute_randomly, load, quiet, random_tokens
from support.tiny_models import VOCAB, save_flashinfer_sized, save_tiny

pytestmark = pytest.mark.gpu

ROWS = 40
"""Beyond several sizes of graphs, the last of which is none of the usual ones."""


def requests() -> list[tuple[list[int], dict[str, Any]]]:
    """Ragged: all numbers of running rows from 1 to ROWS occur, and some rows draw random numbers."""
    rng = random.Random(3)
    made = []
    for index in range(90):
        prompt = [rng.randrange(4, VOCAB) for _ in range(rng.randint(1, 60))]
        sampling: dict[str, Any] = {"max_tokens": rng.randint(1, 60), "ignore_eos": True, "temperature": 0.0}
        if index % 9 == 0:
            sampling |= {"temperature": 1.0, "top_p": 0.9, "seed": index}
        made.append((prompt, sampling))
    return made


def generated(folder: Path, **options: Any) -> tuple[list[list[int]], int]:
    """What a system answers to all requests at once, and how often it preempted one."""

    async def run(address: str) -> list[list[int]]:
        async with AsyncClient(address, max_concurrency=100) as client:
            done = await asyncio.gather(*(client.generate(prompt, **sampling) for prompt, sampling in requests()))
            return [list(one.token_ids) for one in done]

    options |= {"model": str(folder), "device": "cuda", "max_model_len": 128, "max_num_seqs": ROWS}
    options.setdefault("block_size", 8)
    with EmbeddedSystem(options) as system:
        tokens = asyncio.run(run(system.address))
        observer = Observer(system.address)
        stats = observer.wait_until(settled)
        observer.close()
    return tokens, stats.preemptions


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_graphs_and_compiled_code_choose_the_same_tokens(
    arch: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_tiny(arch, tmp_path)
    plain, _ = generated(tmp_path, dtype="float32", enforce_eager=True)
    roomy, _ = generated(tmp_path, dtype="float32")
    tight, preemptions = generated(tmp_path, dtype="float32", num_gpu_blocks_override=120, lookahead=2)
    some, _ = generated(tmp_path, dtype="float32", max_cudagraph_capture_size=5)
    assert roomy == plain
    assert tight == plain
    assert some == plain
    assert preemptions > 0
    assert "uncompiled" not in capfd.readouterr().err


def test_captured_steps_with_chunks_give_what_launches_give(tmp_path: Path) -> None:
    """Full ones, one that is filled up, and small ones; what lies between the attention calls is captured."""
    most = 1300
    save_tiny("llama", tmp_path)
    model = load(tmp_path, device="cuda", dtype="float32")
    model.compile()
    found = []
    for in_pieces in (False, True):
        sequences = Sequences(model, num_blocks=500, in_pieces=in_pieces)
        if in_pieces:
            model.capture_pieces(piece_sizes(most), torch.cuda.graph_pool_handle(), quiet)
        for number in range(4):
            sequences.add(random_tokens(900, VOCAB, number))
        steps = (
            [(0, 800), (1, most - 800)],
            [(0, 1), (2, 700), (3, 560)],
            [(0, 1), (2, 1), (3, 200)],
            [(1, 400), (2, 199), (3, 1)],
        )
        assert [piece_size(sum(count for _, count in step), piece_sizes(most)) for step in steps] == [
            most, most, 256, 768,
        ]  # fmt: skip
        found.append([logits for step in steps for logits in sequences.step(step).values()])
    for launched, captured in zip(*found, strict=True):
        torch.testing.assert_close(captured, launched, rtol=1e-4, atol=1e-4)


def test_a_step_with_chunks_waits_for_nothing(tmp_path: Path) -> None:
    """So it is queued ahead as any other: planning its attention on the host needs nothing of the device."""
    save_flashinfer_sized(tmp_path)
    model = load(tmp_path, device="cuda", dtype="bfloat16")
    model.compile()
    model.allocate_kv_cache(20, 16)
    model.capture_pieces([64], torch.cuda.graph_pool_handle(), quiet)
    tokens = torch.tensor(random_tokens(60, VOCAB, 0), device="cuda")
    rows = [(tokens, [3, 4], 20, 21), (tokens, [7, 1, 9], 0, 33), (tokens, [5, 6], 4, 30)]
    batch = make_batch(rows, 1, 16, model.scratch_block, model.device)
    last = torch.tensor([0, 33, 59, 0], device="cuda")
    for in_pieces, wanted in itertools.product((False, True), (None, last, last[:0])):
        whole = model.hidden(batch, in_pieces=in_pieces).clone()
        model.hidden(batch, in_pieces=in_pieces, wanted=wanted)
        with no_waiting():
            got = model.hidden(batch, in_pieces=in_pieces, wanted=wanted)
        expected = whole if wanted is None else whole[wanted]
        assert got.shape == expected.shape
        assert (got - expected).float().norm() <= 0.02 * expected.float().norm()


def test_16_bits_compiled_are_as_close_as_uncompiled(tmp_path: Path) -> None:
    save_flashinfer_sized(tmp_path)
    results: dict[str, list[torch.Tensor]] = {}
    for name, options in {
        "exact": {"dtype": "float32"},
        "plain": {"dtype": "bfloat16"},
        "compiled": {"dtype": "bfloat16"},
    }.items():
        model = load(tmp_path, device="cuda", **options)
        if name == "compiled":
            model.compile()
            assert model.compiled
        sequences = Sequences(model)
        for number, length in enumerate((1, 16, 17, 41, 90)):
            sequences.add(random_tokens(length, VOCAB, number))
        results[name] = [logits.float() for logits in compute_randomly(sequences, seed=1)]
    far = {
        name: max(
            float((one - exact).norm() / exact.norm()) for one, exact in zip(logits, results["exact"], strict=True)
        )
        for name, logits in results.items()
    }
    assert far["compiled"] < 1.5 * far["plain"] + 1e-3


def test_16_bits_first_differ_from_uncompiled_where_two_tokens_are_nearly_as_likely(tmp_path: Path) -> None:
    """Both ways round, so greedy tokens may part; but only where the exact logits of the two tokens are closer than
    rounding takes them."""
    save_flashinfer_sized(tmp_path)
    plain, _ = generated(tmp_path, dtype="bfloat16", block_size=16, enforce_eager=True)
    compiled, _ = generated(tmp_path, dtype="bfloat16", block_size=16)
    exact = load(tmp_path, device="cuda", dtype="float32")
    parted = 0
    for (prompt, sampling), ours, theirs in zip(requests(), compiled, plain, strict=True):
        assert len(ours) == len(theirs) == sampling["max_tokens"]
        if sampling["temperature"] or ours == theirs:
            continue
        at = next(index for index, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
        sequences = Sequences(exact, block_size=16)
        tokens = [*prompt, *ours[:at]]
        logits = sequences.step([(sequences.add(tokens), len(tokens))])[0][-1].float()
        of_both = logits[[ours[at], theirs[at]]]
        assert float(logits.max() - of_both.min()) < 0.1 * float(logits.square().mean().sqrt())
        parted += 1
    assert parted < len(compiled) // 2
