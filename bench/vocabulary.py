"""`python -m tandem.bench.vocabulary SHAPE OUT`: a model folder with a tokenizer as large as its vocabulary.

Text, stop strings and structured output need a tokenizer, which bench/shapes lack. What they cost goes by the number of
tokens and by what bytes these have. So the tokenizer is byte-level BPE, as Llama's: 256 tokens of a byte, then tokens
that are two others put together, made at random from a seed: words, some with a space before them, of lengths as real
ones have them, and a few of digits and punctuation. The last are the model's special tokens.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LENGTHS: Final = dict(zip(range(2, 17), (30, 80, 130, 150, 150, 130, 110, 80, 55, 35, 20, 12, 8, 5, 5), strict=True))
"""How many of a thousand tokens have so many characters: mostly 4 to 8, as in vocabularies of some 100,000 tokens."""
WORDS: Final = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
OTHERS: Final = ".,;:!?'\"-_/()[]{}<>=+*\n0123456789"
WORD_SHARE: Final = 0.9
"""Of the tokens, the others are digits, punctuation and ends of lines."""
SPECIAL: Final = 256
"""Tokens, at most."""


def make_tokenizer(vocab_size: int, seed: int = 0) -> Tokenizer:
    """Of exactly so many tokens, at least 512. Raises ValueError for fewer."""
    if vocab_size < 512:
        raise ValueError(
            f"a tokenizer of {vocab_size} tokens has no room for its 256 bytes and special tokens; 512 has"
        )
    special = min(SPECIAL, vocab_size // 8)
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    rng, ids, merges = random.Random(seed), {token: number for number, token in enumerate(byte_tokens)}, []
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    space = level.pre_tokenize_str(" ")[0][0]
    words, others = ({1: [level.pre_tokenize_str(char)[0][0] for char in kind]} for kind in (WORDS, OTHERS))
    lengths, weights = list(LENGTHS), list(LENGTHS.values())
    while len(ids) < vocab_size - special:
        parts = words if rng.random() < WORD_SHARE else others
        length = rng.choices(lengths, weights)[0]
        of_left = rng.choice([known for known in parts if known < length])
        if length - of_left not in parts:
            continue
        left, right = rng.choice(parts[of_left]), rng.choice(parts[length - of_left])
        if right.startswith(space) or left + right in ids:
            continue
        ids[left + right] = len(ids)
        merges.append((left, right))
        parts.setdefault(length, []).append(left + right)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|special_{number}|>", special=True) for number in range(special)])
    return tokenizer


def make_folder(shape: Path, out: Path, seed: int = 0) -> None:
    """Copies the files of `shape` and adds tokenizer.json and tokenizer_config.json. Raises FileNotFoundError if it has
    no config.json, FileExistsError if `out` is there, ValueError if the config tells no vocabulary, or too small a one.
    """
    config: dict[str, Any] = json.loads((shape / "config.json").read_text())
    if "vocab_size" not in config:
        raise ValueError(f"{shape / 'config.json'} has no vocab_size, so it does not tell how many tokens to make")
    tokenizer = make_tokenizer(config["vocab_size"], seed)
    end = config.get("eos_token_id")
    shutil.copytree(shape, out)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(end, int):
        told["eos_token"] = tokenizer.id_to_token(end)
    (out / "tokenizer_config.json").write_text(json.dumps(told, indent=1) + "\n")


def main(
    shape: Annotated[Path, typer.Argument(help="A folder with a config.json.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    seed: Annotated[int, typer.Option(help="Of the tokens.")] = 0,
) -> None:
    """Makes a model folder with a tokenizer as large as its vocabulary."""
    try:
        make_folder(shape, out, seed)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
