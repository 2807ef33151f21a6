"""The paged model on CUDA: what transformers gives, without waiting, capturable; and the sampler there."""

from pathlib import Path

import pytest
import torch

from tandem.worker.inspection import make_batch
from tandem.worker.sampler import SamplingColumns, random_bits, sample

from support.cuda import no_waiting, replayed
from support.paged import Sequences, compute_randomly, load, load_tiny, random_tokens
from support.tiny_models import ARCHITECTURES, VOCAB, save_flashinfer_sized

pytestmark = pytest.mark.gpu

LENGTHS = (1, 16, 17, 41, 90)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_float32_equals_transformers(arch: str, tmp_path: Path) -> None:
    model, own = load_tiny(arch, tmp_path, device="cuda")
    assert model.attention_backend == "reference"
    sequences = Sequences(model)
    for number, length in enumerate(LENGTHS):
        sequences.add(random_tokens(length, VOCAB, number))
    for tokens, logits in zip(sequences.tokens, compute_randomly(sequences, seed=1), strict=True):
        with torch.no_grad():
            expected = own(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_bfloat16_through_flashinfer_is_close(tmp_path: Path) -> None:
    save_flashinfer_sized(tmp_path)
    results = {}
    for name, options in {
        "exact": {"dtype": "float32"},
        "reference": {"dtype": "bfloat16", "attention_backend": "reference"},
        "flashinfer": {"dtype": "bfloat16"},
    }.items():
        model = load(tmp_path, device="cuda", **options)
        assert model.attention_backend == ("flashinfer" if name == "flashinfer" else "reference")
        sequences = Sequences(model, block_size=16)
        for number, length in enumerate(LENGTHS):
            sequences.add(random_tokens(length, VOCAB, number))
        results[name] = torch.cat(compute_randomly(sequences, seed=2))

    def relative(name: str) -> float:
        return float((results[name] - results["exact"]).norm() / results["exact"].norm())

    assert relative("flashinfer") < 3e-2
    assert relative("flashinfer") < 1.5 * relative("reference") + 1e-3


@pytest.mark.parametrize("backend", ["reference", "flashinfer"])
def test_a_step_waits_for_nothing(backend: str, tmp_path: Path) -> None:
    save_flashinfer_sized(tmp_path)
    model = load(tmp_path, device="cuda", dtype="bfloat16", attention_backend=backend)
    model.allocate_kv_cache(20, 16)
    tokens = torch.tensor(random_tokens(60, VOCAB, 0), device="cuda")
    rows = [(tokens, [3, 4], 20, 21), (tokens, [7, 1, 9], 0, 33)]
    batch = make_batch(rows, 1, 16, model.scratch_block, model.device)
    ones = torch.ones(2, device="cuda")
    zeros = torch.zeros(2, dtype=torch.int32, device="cuda")
    columns = SamplingColumns(ones, zeros + 5, ones * 0.9, zeros.long(), zeros, zeros)

    def step() -> torch.Tensor:
        return sample(model.logits(model.hidden(batch)[:2]), columns)

    step()
    with no_waiting():
        step()


def test_a_reference_decode_step_can_be_captured(tmp_path: Path) -> None:
    model, _ = load_tiny("gemma2", tmp_path, device="cuda")
    for captured, wanted in replayed(model):
        torch.testing.assert_close(captured, wanted, rtol=1e-4, atol=1e-4)


def test_random_numbers_are_the_same_bits_as_on_the_cpu() -> None:
    n = 4096
    seed = torch.randint(-(2**62), 2**62, (n,))
    index, position = torch.arange(n, dtype=torch.int32) % 7, torch.arange(n, dtype=torch.int32)
    expected = random_bits(seed, index, position)
    assert torch.equal(random_bits(seed.cuda(), index.cuda(), position.cuda()).cpu(), expected)


def test_sampling_does_not_depend_on_company() -> None:
    torch.manual_seed(0)
    n, vocab = 48, 50_000
    logits = torch.randn(n, vocab, device="cuda") * 2
    columns = SamplingColumns(
        temperature=torch.full((n,), 0.8, device="cuda"),
        top_k=torch.arange(n, dtype=torch.int32, device="cuda") % 3 * 50,
        top_p=torch.where(torch.arange(n, device="cuda") % 2 == 0, 1.0, 0.95),
        seed=torch.arange(n, device="cuda"),
        sample_index=torch.zeros(n, dtype=torch.int32, device="cuda"),
        position=torch.arange(n, dtype=torch.int32, device="cuda"),
    )
    together = sample(logits, columns)
    for row in range(n):
        own = slice(row, row + 1)
        alone = SamplingColumns(
            columns.temperature[own],
            columns.top_k[own],
            columns.top_p[own],
            columns.seed[own],
            columns.sample_index[own],
            columns.position[own],
        )
        assert sample(logits[own], alone).item() == together[row].item()
