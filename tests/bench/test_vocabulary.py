"""A folder made for a benchmark is one that a system serves, text and structured output included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from tandem.bench.vocabulary import main, make_tokenizer

from support.tiny_models import tiny_config


@pytest.mark.parametrize("size", [512, 513, 5_000])
def test_a_tokenizer_has_exactly_as_many_tokens_and_takes_any_text(size: int) -> None:
    tokenizer = make_tokenizer(size)
    assert tokenizer.get_vocab_size() == size
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))
    text = "plain, ünï, 漢字, \x00 \U0001f600\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert make_tokenizer(size).to_str() == tokenizer.to_str()
    assert make_tokenizer(size, seed=1).to_str() != tokenizer.to_str()


def test_it_serves_structured_output_for_a_share_of_a_load(tmp_path: Path, bench: Any) -> None:
    shape, made, out = tmp_path / "shape", tmp_path / "made", tmp_path / "out.json"
    config = tiny_config("llama")
    config.vocab_size, config.eos_token_id = 600, 599
    config.save_pretrained(shape)
    main(shape, made)
    system = tmp_path / "system.yaml"
    system.write_text(
        f"model: {made}\nload-format: dummy\ndtype: float32\ndevice: cpu\n"
        "max-num-seqs: 4\nthreads: 1\nmax-model-len: 128\n"
    )
    sampling = {"temperature": 0.8, "top_k": 20, "ignore_eos": False, "structured_outputs": {"regex": "[a-c]{9}"}}
    code, _, err = bench(
        *("offline", "--num-prompts", "6", "--prompt-tokens", "5", "--output-tokens", "40", "--num-warmups", "0"),
        *("--sampling-params", json.dumps(sampling), "--sampling-share", "0.5"),
        *("--backend", "sdk", "--backend", "openai", "--config", str(system), "--out", str(out)),
    )
    assert code == 0, err
    for result in json.loads(out.read_text())["results"]:
        figures = result["runs"][0]["figures"]
        assert result["runs"][0]["failures"] == {}
        assert (figures["completed"], figures["failed"]) == (6, 0)
        # Three go on to the end, three have nine letters and perhaps an end-of-sequence token.
        assert 3 * 40 + 3 <= figures["output_tokens"] <= 3 * 40 + 3 * 10


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="config.json"):
        main(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 5000}}')
    with pytest.raises(typer.BadParameter, match="has no vocab_size"):
        main(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    with pytest.raises(typer.BadParameter, match="a tokenizer of 100 tokens has no room"):
        main(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_parameter_that_http_does_not_know_is_refused_before_anything_is_sent(bench: Any, tmp_path: Path) -> None:
    config = tmp_path / "system.yaml"
    config.write_text("threads: 1\ndevice: cpu\nmax-num-seqs: 2\n")
    code, _, err = bench(
        *("offline", "--num-prompts", "2", "--backend", "openai", "--config", str(config)),
        *("--sampling-params", '{"bad_words_token_ids": [[5]]}'),
    )
    assert code != 0
    assert "bad_words_token_ids cannot be asked for over HTTP" in err
