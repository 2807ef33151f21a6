"""What a model's generation_config.json may say, and what is refused when the model is loaded rather than with every
request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.worker.generation_config import default_sampling, stop_token_ids
from tandem.worker.loading import read_config
from tandem.worker.sources import LoadError, ModelSource

from support.tiny_models import EOS, VOCAB, save_tiny


def source_with(folder: Path, text: str | None) -> ModelSource:
    save_tiny("llama", folder)
    path = folder / "generation_config.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    return ModelSource(str(folder))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (EOS,)),
        ({"eos_token_id": None}, (EOS,)),
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [7, 9]}, (7, 9)),
        ({"eos_token_id": [7, -1, VOCAB, VOCAB - 1]}, (7, VOCAB - 1)),
        (None, (EOS,)),
    ],
)
def test_tokens_that_end_a_generation(given: dict[str, Any] | None, expected: tuple[int, ...], tmp_path: Path) -> None:
    source = source_with(tmp_path, None if given is None else json.dumps(given))
    config = read_config(source, tmp_path)
    assert stop_token_ids(source, config) == expected
    config.eos_token_id = None
    assert stop_token_ids(source, config) == (expected if given and given.get("eos_token_id") else ())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0},
        ),
        ({"temperature": None, "top_k": None, "repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
        (
            {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.1},
            {"temperature": 0.0, "repetition_penalty": 1.1},
        ),
        ({"do_sample": True, "temperature": 1}, {"temperature": 1.0}),
    ],
)
def test_how_its_authors_sample(given: dict[str, Any], expected: dict[str, float], tmp_path: Path) -> None:
    assert default_sampling(source_with(tmp_path, json.dumps(given))) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"top_p": 1.5}', "top_p: .* got 1.5"),
        ('{"top_p": 0}', "top_p"),
        ('{"temperature": -1}', "temperature: .* got -1"),
        ('{"temperature": "warm"}', "temperature: .* got 'warm'"),
        ('{"temperature": NaN}', "temperature"),
        ('{"top_k": 1.5}', "top_k"),
        ('{"repetition_penalty": 1e400}', "repetition_penalty"),
        ('{"do_sample": "no"}', "do_sample"),
        ('{"eos_token_id": "x"}', "eos_token_id: .* got 'x'"),
        ('{"eos_token_id": [[1]]}', "eos_token_id"),
        ('{"eos_token_id": true}', "eos_token_id"),
        ("", "the file"),
        ("[]", "the file"),
        ("{", "the file"),
        ('"\\ud800"', "the file"),
    ],
)
def test_files_that_are_refused(text: str, named: str, tmp_path: Path) -> None:
    source = source_with(tmp_path, text)
    with pytest.raises(LoadError, match=rf"generation_config.json cannot be used: {named}"):
        default_sampling(source)
