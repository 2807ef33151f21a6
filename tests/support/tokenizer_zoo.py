"""Small tokenizers of each kind that decoder-only models use, as the files a model folder holds."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Hello, world! How are you today? I'm fine, thanks.",
    "def add(a, b):\n    return a + b\n",
    '{"name": "add", "arguments": {"a": 1, "b": 22}}',
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "你好，世界。今天天气很好。",
    "Привет, мир!",
] * 3

TEXTS = [
    "Hello, world!",
    " leading and  double spaces ",
    "naïve café, 你好世界, 😀👨‍👩‍👧 emoji, ภาษาไทย",
    "line one\nline two\n\n\ttabbed",
    "unknown ☃ snowman and \u0000 control",
    "text with <|im_end|> inside and </s> too",
    "",
    " ",
    "e\u0301 decomposed",
]

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _json(tokenizer: Tokenizer, config: dict[str, Any], **files: bytes) -> dict[str, bytes]:
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        **files,
    }


@cache
def byte_level() -> dict[str, bytes]:
    """As Qwen's or GPT-2's: tokens are bytes in GPT-2's alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("two words", normalized=False)])
    return _json(
        tokenizer,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "chat_template": CHATML,
            "clean_up_tokenization_spaces": False,
        },
    )


@cache
def byte_fallback(strip: bool = True) -> dict[str, bytes]:
    """As Llama 2's or Mistral's (with `strip`) or Gemma's: spaces are ▁, unknown characters byte tokens."""
    specials = ["<unk>", "<s>", "</s>"]
    plain = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    plain.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=specials, limit_alphabet=80)
    plain.train_from_iterator(CORPUS, trainer)
    trained = json.loads(plain.to_str())["model"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    names = specials + bytes_ + [token for token in trained["vocab"] if token not in specials]
    model = models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=[tuple(merge) for merge in trained["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    stages = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        stages.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(stages)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in specials])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {
            "__type": "AddedToken",
            "content": "</s>",
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        },
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    return _json(tokenizer, config)


@cache
def unigram() -> dict[str, bytes]:
    """SentencePiece unigram with the Metaspace decoder; its special tokens stand in special_tokens_map.json only."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = {"eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": ["<extra>"]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return _json(tokenizer, config, **{"special_tokens_map.json": json.dumps(special).encode()})


@cache
def word_piece() -> dict[str, bytes]:
    """As BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _json(tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"})


@cache
def suffixed() -> dict[str, bytes]:
    """As the first GPT's: the end of a word is part of its last token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _json(tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})


@cache
def undecoded() -> dict[str, bytes]:
    """No decoder at all: tokens are joined with spaces."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=100, special_tokens=["<unk>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _json(tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})


ZOO: dict[str, Callable[[], dict[str, bytes]]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "byte_fallback_unstripped": lambda: byte_fallback(strip=False),
    "unigram": unigram,
    "word_piece": word_piece,
    "suffixed": suffixed,
    "undecoded": undecoded,
}
