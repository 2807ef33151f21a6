"""Structured output: requests, what a plain loop of transformers and llguidance answers to them, and generated JSON
schemas."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from transformers import PreTrainedModel

from tandem.protocol.structured import StructuredOutputsParams
from tandem.worker.grammars.compiler import open_tokenizer

from support.tiny_models import EOS, VOCAB

SCHEMA = (
    '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 6}, "tags": {"type": "array", "items": '
    '{"enum": ["a", "bc", "def"]}, "maxItems": 3}}, "required": ["name", "tags"], "additionalProperties": false}'
)
GRAMMARS: dict[str, StructuredOutputsParams | None] = {
    "json": StructuredOutputsParams(json=SCHEMA),
    "json_object": StructuredOutputsParams(json_object=True),
    "regex": StructuredOutputsParams(regex=r"[0-9]{3}-[a-f]+(\.[xyz]{2}){2,4}"),
    "choice": StructuredOutputsParams(choice=("yes", "no", "per/haps?", "y(e)s")),
    "grammar": StructuredOutputsParams(grammar='start: item ("," item)*\nitem: /[a-z]/ | "(" start ")"\n'),
    "compact": StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True),
    "none": None,
}


@dataclass(frozen=True)
class Constrained:
    """A greedy request that follows a grammar, or none."""

    prompt: tuple[int, ...]
    max_tokens: int
    structured: StructuredOutputsParams | None

    def sampling(self) -> dict[str, Any]:
        return {"temperature": 0.0, "max_tokens": self.max_tokens, "structured_outputs": self.structured}


def constrained_requests(count: int, seed: int, longest: int, most: int) -> list[Constrained]:
    """Prompts of 1 to `longest` tokens and up to `most` new ones; all kinds of grammars take turns."""
    rng = random.Random(seed)
    kinds = list(GRAMMARS.values())
    return [
        Constrained(
            tuple(rng.randrange(4, VOCAB) for _ in range(rng.randint(1, longest))),
            rng.randint(most // 2, most),
            kinds[index % len(kinds)],
        )
        for index in range(count)
    ]


@torch.no_grad()
def reference(model: PreTrainedModel, folder: Path, wanted: Constrained) -> list[int]:
    """Token by token: transformers' logits of the whole sequence, llguidance's mask, the likeliest token."""
    matcher = None
    if wanted.structured is not None:
        tokenizer = open_tokenizer((folder / "tokenizer.json").read_bytes(), VOCAB, (EOS,))
        matcher = LLMatcher(tokenizer, source(wanted.structured))
    tokens = list(wanted.prompt)
    for _ in range(wanted.max_tokens):
        logits = model(torch.tensor([tokens])).logits[0, -1].float().numpy()
        if matcher is not None:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            logits = np.where(bits[:VOCAB] > 0, logits, -np.inf)
        tokens.append(int(logits.argmax()))
        if tokens[-1] == EOS:
            break
        if matcher is not None:
            assert matcher.consume_token(tokens[-1])
    return tokens[len(wanted.prompt) :]


def source(wanted: StructuredOutputsParams) -> str:
    """The grammar as llguidance takes it, written by hand."""
    if wanted.json is not None:
        return LLMatcher.grammar_from_json_schema(
            wanted.json, overrides={"whitespace_flexible": not wanted.disable_any_whitespace}
        )
    if wanted.json_object:
        return LLMatcher.grammar_from_json_schema('{"type": "object"}')
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice:
        assert wanted.choice == ("yes", "no", "per/haps?", "y(e)s")
        return LLMatcher.grammar_from_lark('start: "yes" | "no" | "per/haps?" | "y(e)s"')
    assert wanted.grammar is not None
    return LLMatcher.grammar_from_lark(wanted.grammar)
