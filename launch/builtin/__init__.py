"""The built-in model: a small Llama trained from scratch by this package, used when no model is named."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
"""The folder of the built-in model: a transformers checkpoint (safetensors, tokenizer.json, chat template)."""

__all__ = ["MODEL_DIR"]
