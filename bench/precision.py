"""`python -m tandem.bench.precision`: how far 8 bits take a model's logits from those of 16.

The same weights, drawn from the same seed or loaded from a folder, compute the same tokens as `--dtype` alone, with
weights in 8 bits, and with the KV cache in 8 bits too. Told are the relative error of the logits (norm of the
difference over the norm), and for how many positions the likeliest token stays. Beside it stands what 16 bits
themselves are away from 32: a deep model of random weights takes any error many times further than a trained one.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..launch.builtin import MODEL_DIR
from ..worker.inspection import make_batch
from ..worker.model import PagedModel, load_model
from ..worker.sources import ModelSource
from .findings import write_findings

BLOCK_SIZE = 16
CASES: dict[str, dict[str, Any]] = {
    "weights": {"quantization": "fp8"},
    "weights and KV cache": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}


def logits_of(model: PagedModel, sequences: Sequence[Sequence[int]], chunk: int) -> Tensor:
    """Of all tokens of all sequences, each computed in chunks so that most attend to what the cache holds:
    [tokens, vocab] float32 on the CPU."""
    blocks = -(-max(map(len, sequences)) // BLOCK_SIZE)
    model.allocate_kv_cache(blocks, BLOCK_SIZE)
    found = []
    for tokens in sequences:
        ids = torch.tensor(tokens, device=model.device)
        for start in range(0, len(tokens), chunk):
            row = (ids, list(range(blocks)), start, min(start + chunk, len(tokens)))
            batch = make_batch([row], 0, BLOCK_SIZE, model.scratch_block, model.device, lane=0)
            found.append(model.logits(model.hidden(batch)).float().cpu())
    return torch.cat(found)


def compare(exact: Tensor, other: Tensor) -> dict[str, float]:
    """Of logits [tokens, vocab]: the relative error over all and of the worst position, and the share of positions
    whose likeliest token is the same."""
    error = (other - exact).norm(dim=-1) / exact.norm(dim=-1)
    return {
        "relative_error": float((other - exact).norm() / exact.norm()),
        "worst_position": float(error.max()),
        "same_likeliest": float((other.argmax(-1) == exact.argmax(-1)).float().mean()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tandem.bench.precision", description=__doc__)
    parser.add_argument("--model", default=str(MODEL_DIR), help="Hub id or folder (default: the built-in model)")
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of each sequence, random ones")
    parser.add_argument("--chunk", type=int, default=128, help="tokens computed at once")
    parser.add_argument("--out", default=None, help="JSON file to write")
    options = parser.parse_args(argv)

    def loaded(dtype: str = options.dtype, **more: Any) -> PagedModel:
        return load_model(
            ModelSource(options.model, load_format=options.load_format),
            dtype=dtype,
            device=options.device,
            attention_backend="auto",
            batch_invariant=False,
            lanes=1,
            progress=lambda _what, _share: None,
            **more,
        )

    model = loaded()
    rng = random.Random(0)
    sequences = [[rng.randrange(model.vocab_size) for _ in range(options.tokens)] for _ in range(options.sequences)]
    exact = logits_of(model, sequences, options.chunk)
    del model
    gc.collect()
    model = loaded("float32")
    wide = compare(logits_of(model, sequences, options.chunk), exact)
    found = {}
    for name, more in CASES.items():
        del model
        gc.collect()
        model = loaded(**more)
        found[name] = compare(exact, logits_of(model, sequences, options.chunk))
    findings = {"16 bits against 32": wide, "8 bits against 16": found}
    print(json.dumps(findings, indent=1))
    write_findings(options, findings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
