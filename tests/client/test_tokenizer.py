"""The tokenizer equals transformers' on the same files, conventions of tokenizer_config.json included."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.client.prompts import LONG_TEXT
from tandem.client.tokenizer import Tokenizer
from tandem.protocol.errors import ConfigurationError, InvalidRequest

from support.deadlines import DEADLINE_S
from support.tokenizer_zoo import TEXTS, ZOO, byte_fallback, byte_level, unigram


def reference(files: dict[str, bytes], folder: Path) -> Any:
    from transformers import AutoTokenizer

    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


def with_config(files: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    config = json.loads(files["tokenizer_config.json"]) | changes
    return {**files, "tokenizer_config.json": json.dumps(config).encode()}


def truncating() -> dict[str, bytes]:
    """tokenizer.json may come with truncation and padding switched on; neither applies to prompts."""
    from tokenizers import Tokenizer as Backend

    files = byte_level()
    backend = Backend.from_buffer(files["tokenizer.json"])
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    return {**files, "tokenizer.json": backend.to_str().encode()}


VARIANTS: dict[str, Callable[[], dict[str, bytes]]] = {
    **ZOO,
    "no_bos": lambda: with_config(byte_fallback(), add_bos_token=False),
    "bos_and_eos": lambda: with_config(byte_fallback(), add_bos_token=True, add_eos_token=True),
    "bos_of_byte_level": lambda: with_config(byte_level(), bos_token="<|endoftext|>", add_bos_token=True),
    "bos_wanted_but_none": lambda: with_config(byte_level(), add_bos_token=True),
    "special_not_in_vocabulary": lambda: with_config(byte_level(), extra_special_tokens=["<|new|>"], sep_token="<sep>"),
    "named_extra_tokens": lambda: with_config(byte_level(), extra_special_tokens={"image_token": "<image>"}),
    "added_tokens_decoder": lambda: with_config(
        byte_level(),
        added_tokens_decoder={
            "410": {"content": "<late>", "special": True, "normalized": False, "lstrip": False, "rstrip": True},
            "409": {"content": "plain added", "special": False, "normalized": False},
        },
    ),
    "split_special_tokens": lambda: with_config(byte_level(), split_special_tokens=True),
    "truncating": truncating,
}
PROBES = [*TEXTS, "<|new|><sep><image>", "a <late>  b plain added c", "<|im_start|>user\nhi<|im_end|>", "x" * 2_000]


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    files = VARIANTS[name]()
    ours, theirs = Tokenizer.from_files(files), reference(files, tmp_path)
    for text in PROBES:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    assert set(theirs.all_special_ids) <= ours.special_ids


@pytest.mark.parametrize(
    ("generation", "expected"), [({"eos_token_id": 7}, (7,)), ({"eos_token_id": [7, 9]}, (7, 9)), ({}, None)]
)
def test_eos_ids(generation: dict[str, Any], expected: tuple[int, ...] | None) -> None:
    files = {**byte_level(), "generation_config.json": json.dumps(generation).encode()}
    tokenizer = Tokenizer.from_files(files)
    assert tokenizer.eos_token_ids == (expected or (tokenizer.token_id("<|im_end|>"),))


def test_special_tokens_map_file_is_read() -> None:
    tokenizer = Tokenizer.from_files(unigram())
    assert tokenizer.special_tokens == {"eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.encode("<extra>", add_special_tokens=False)[-1] in tokenizer.special_ids


def test_lone_surrogates_are_refused() -> None:
    for text in ("bad \ud800 text", "x" * LONG_TEXT + "\ud800"):
        with pytest.raises(InvalidRequest, match=r"no valid Unicode text: it holds the lone surrogate U\+D800") as info:
            Tokenizer.from_files(byte_level()).encode(text)
        assert info.value.field == "prompt"


def test_long_text_is_encoded_as_short_text_is() -> None:
    tokenizer = Tokenizer.from_files(byte_level())
    words = "Hello wörld, 3 <|im_end|>\n"
    text = words * (LONG_TEXT // len(words) + 1)
    assert len(text) >= LONG_TEXT
    assert tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(words, add_special_tokens=False) * (
        len(text) // len(words)
    )


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
def test_long_text_takes_another_way_to_the_same_ids_and_back(make: Callable[[], dict[str, bytes]]) -> None:
    tokenizer = Tokenizer.from_files(make())
    text = "\n".join(TEXTS) + " "
    text *= LONG_TEXT // len(text) + 1
    for special in (True, False):
        plain = tokenizer._backend.encode(text, add_special_tokens=special).ids
        assert tokenizer.encode(text, add_special_tokens=special) == plain
    for skip in (True, False):
        assert tokenizer.decode(plain, skip) == tokenizer._backend.decode(plain, skip_special_tokens=skip)


@pytest.mark.parametrize("text", ["Hello", "Hello " * LONG_TEXT])
def test_a_count_may_be_refused_before_there_are_ids(text: str) -> None:
    tokenizer = Tokenizer.from_files(byte_level())
    counts: list[int] = []
    ids = tokenizer.encode(text, admit=counts.append)
    assert counts == [len(ids)]

    def refuse(count: int) -> None:
        raise InvalidRequest(f"{count} are too many")

    with pytest.raises(InvalidRequest, match=f"{len(ids)} are too many"):
        tokenizer.encode(text, admit=refuse)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer.json": None}, "tokenizer.json"),
        ({"tokenizer.json": b"{"}, "tokenizer.json"),
        ({"tokenizer.json": b"\xff"}, "tokenizer.json"),
        ({"tokenizer_config.json": b"{"}, "tokenizer_config.json"),
        ({"tokenizer_config.json": b"[]"}, "tokenizer_config.json"),
        ({"tokenizer_config.json": b'{"added_tokens_decoder": {"x": 1}}'}, "added_tokens_decoder"),
        ({"tokenizer_config.json": b'{"extra_special_tokens": 5}'}, "extra_special_tokens"),
        ({"tokenizer_config.json": b'{"chat_template": [{"name": "default"}]}'}, "chat_template"),
        ({"generation_config.json": b"\x00"}, "generation_config.json"),
        ({"chat_template.jinja": b"\xff\xfe"}, "chat_template.jinja"),
    ],
)
def test_broken_files_are_named(changes: dict[str, bytes | None], named: str) -> None:
    files = {name: content for name, content in (byte_level() | changes).items() if content is not None}
    with pytest.raises(ConfigurationError, match=named.replace(".", r"\.")):
        Tokenizer.from_files(files)


@pytest.mark.parametrize("length", [1, LONG_TEXT])
def test_what_a_tokenizer_has_no_tokens_for_is_the_requests_fault(length: int) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    backend = Backend(WordLevel({"a": 0}, unk_token="<unk>"))  # which it lacks
    tokenizer = Tokenizer.from_files({"tokenizer.json": backend.to_str().encode()})
    assert tokenizer.encode("a") == [0]
    with pytest.raises(InvalidRequest, match="prompt: the model's tokenizer cannot encode it: .*UNK"):
        tokenizer.encode("b" * length)


def test_text_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    for name, content in byte_level().items():
        (tmp_path / name).write_bytes(content)
    code = (
        "import sys; from pathlib import Path; from tandem.client.tokenizer import Tokenizer\n"
        f"t = Tokenizer.from_files({{p.name: p.read_bytes() for p in Path({str(tmp_path)!r}).iterdir()}})\n"
        "text = t.chat_template().render([{'role': 'user', 'content': 'hi'}])\n"
        "ids = t.encode(text, add_special_tokens=False); d = t.detokenizer(skip_special_tokens=False)\n"
        "assert d.push(ids) + d.finish() == text\n"
        "print(*sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=DEADLINE_S)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
