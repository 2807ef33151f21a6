"""The built-in model's tokenizer: byte-level BPE, one token per digit, trained on the generated text.

python -m tandem.launch.builtin.tokenizer --out DIR
"""

import argparse
import itertools
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from . import data
from .chat import CHAT_TEMPLATE, END, PAD, START

VOCABULARY = 1536
CONTEXT = 4096
_SAMPLE_DOCUMENTS = 60_000
_CONTROL = (PAD, START, END)
_MARKUP = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def train(documents: int = _SAMPLE_DOCUMENTS, seed: int = 0) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on `documents` generated documents; the same seed gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(_MARKUP),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in _CONTROL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = itertools.islice(data.documents(seed), documents)
    tokenizer.train_from_iterator(texts, trainer)
    # Markup stays visible in decoded text: clients read tool calls out of it.
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _MARKUP])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json and its companions")
    parser.add_argument("--documents", type=int, default=_SAMPLE_DOCUMENTS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = train(options.documents, options.seed)
    tokenizer.save_pretrained(options.out)
    print(f"{len(tokenizer)} tokens, saved to {options.out}")


if __name__ == "__main__":
    main()
