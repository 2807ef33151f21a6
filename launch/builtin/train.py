"""Trains the built-in model from scratch on generated data.

    python -m tandem.launch.builtin.train --out DIR --minutes 8

On a CUDA device the run takes bf16 autocast and compiled layers; on a CPU it runs in float32, slowly. The folder holds
a usable model from the first save on. A run that was stopped goes on from its checkpoint when it is started again with
the same arguments.
"""

import argparse
import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import data, evaluate
from . import tokenizer as tokenizer_training

WATCHED = (
    "addition, three digits each",
    "sorting five numbers",
    "multiplication, two digits by one",
    "spelling, made-up words too",
    "tool calls",
)
PROMPT_WEIGHT = 0.1
"""How much a prompt token counts in the loss, against 1 for a token of an answer."""

WARMUP_STEPS = 200
FLOOR = 0.01
"""The learning rate at the end, as a share of the peak."""


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The shape of the model: 4.7 M parameters, tied embeddings, heads of 64, context of 4,096."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=tokenizer_training.CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Stream(IterableDataset[data.Batch]):
    """Batches without end; every worker of a DataLoader draws its own."""

    def __init__(self, tokenizer_file: Path, seed: str, batch_tokens: int) -> None:
        self._tokenizer_file, self._seed, self._batch_tokens = tokenizer_file, seed, batch_tokens

    def __iter__(self) -> Iterator[data.Batch]:
        worker = get_worker_info()
        seed = f"{self._seed}/{worker.id if worker else 0}"
        return data.batches(Tokenizer.from_file(str(self._tokenizer_file)), seed, self._batch_tokens)


def weighted_loss(hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, weighted by its kind.

    Args:
        hidden: last hidden states [rows, width, hidden].
        head: output embedding [vocabulary, hidden].
        ids: tokens [rows, width], int64.
        kinds: what each token is [rows, width], uint8, see `data`.
    """
    logits = functional.linear(hidden[:, :-1].reshape(-1, hidden.shape[-1]), head).float()
    losses = functional.cross_entropy(logits, ids[:, 1:].reshape(-1), reduction="none")
    target = kinds[:, 1:].reshape(-1)
    weights = (target == data.ANSWER).float() + PROMPT_WEIGHT * (target == data.PROMPT).float()
    return (losses * weights).sum() / weights.sum()


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up over WARMUP_STEPS, then a cosine over `progress` (0 to 1) down to FLOOR of the peak."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * cosine * min(1.0, (step + 1) / WARMUP_STEPS)


class Training:
    """A model, its optimizer, and how far they have come."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: torch.device, seed: int, compiled: bool) -> None:
        torch.manual_seed(seed)
        self.tokenizer, self.device = tokenizer, device
        self.model = LlamaForCausalLM(model_config(tokenizer))
        torch.nn.Module.to(self.model, device)
        self.model.config.use_cache = False
        # Evaluated and saved in the precision that users get; apart, so that generating never meets compiled layers.
        self._snapshot = LlamaForCausalLM(model_config(tokenizer))
        torch.nn.Module.to(self._snapshot, device, torch.bfloat16)
        self._snapshot.eval()
        self._snapshot.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        self.parameters = dict(self.model.named_parameters())
        matrices = [p for p in self.parameters.values() if p.ndim > 1]
        vectors = [p for p in self.parameters.values() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
        self._loss: Callable[..., torch.Tensor] = weighted_loss
        if compiled:
            for layer in self.model.model.layers:
                layer.compile(dynamic=True)
            self._loss = torch.compile(weighted_loss, dynamic=True)
        self.steps, self.seconds, self.tokens = 0, 0.0, 0

    def step(self, ids: torch.Tensor, kinds: torch.Tensor, rate: float) -> torch.Tensor:
        """One optimizer step on a batch; returns its loss, a scalar on the device."""
        ids, kinds = ids.to(self.device, torch.int64, non_blocking=True), kinds.to(self.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # CPUs without bf16 units take minutes for what float32 does in seconds.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = self.model.model(input_ids=ids).last_hidden_state
            loss = self._loss(hidden, self.model.lm_head.weight, ids, kinds)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.tokens += ids.numel()
        return loss.detach()

    def snapshot(self) -> LlamaForCausalLM:
        """The model as it is now, in bf16; the same object every time."""
        with torch.no_grad():
            for name, parameter in self._snapshot.named_parameters():
                parameter.copy_(self.parameters[name])
        return self._snapshot

    def save(self, folder: Path) -> None:
        """Writes a complete checkpoint of transformers' form; each file is replaced whole."""
        partial = folder / "partial"
        self.snapshot().save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            os.replace(file, folder / file.name)
        partial.rmdir()

    def save_checkpoint(self, file: Path) -> None:
        """Writes all that a later run needs to go on; the file is replaced whole."""
        tensors = {f"model.{name}": parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        metadata = {"steps": str(self.steps), "seconds": str(self.seconds), "tokens": str(self.tokens)}
        partial = file.with_suffix(".partial")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
        os.replace(partial, file)

    def load_checkpoint(self, file: Path) -> None:
        """Goes on from `save_checkpoint`.

        Raises:
            ValueError: if the file holds another model.
        """
        with safe_open(file, "pt") as stored:
            metadata, names = stored.metadata(), set(stored.keys())
            missing = {f"model.{name}" for name in self.parameters} - names
            if missing:
                raise ValueError(f"{file} holds no {min(missing)}: it is not a checkpoint of this model")
            for name, parameter in self.parameters.items():
                parameter.data.copy_(stored.get_tensor(f"model.{name}"))
                state = self.optimizer.state[parameter]
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    value = stored.get_tensor(f"optimizer.{key}.{name}")
                    on_host = key == "step" and self.device.type != "cuda"
                    state[key] = value if on_host else value.to(self.device)
        self.steps, self.tokens, self.seconds = (
            int(metadata["steps"]),
            int(metadata["tokens"]),
            float(metadata["seconds"]),
        )

    def load_weights(self, folder: Path) -> None:
        """Starts from the weights of a saved model, with a fresh optimizer."""
        stored = dict(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
        for name, parameter in self.parameters.items():
            parameter.data.copy_(stored[name])


def watch(training: Training, count: int) -> str:
    """Held-out accuracies of a few benchmarks, in one line."""
    model = training.snapshot()
    shares = (
        f"{name.partition(',')[0]} {evaluate.accuracy(model, training.tokenizer, benchmark, count):.1%}"
        for name, benchmark in zip(WATCHED, evaluate.by_name(*WATCHED), strict=True)
    )
    return ", ".join(shares)


def run(training: Training, batches: Iterator[Sequence[torch.Tensor]], options: argparse.Namespace) -> None:
    """Trains until the steps or the minutes are used up, saving and reporting on the way."""
    began = time.monotonic() - training.seconds
    budget = options.minutes * 60 if options.minutes else math.inf
    saved = watched = reported = time.monotonic()
    reported_tokens = training.tokens

    def progress() -> float:
        training.seconds = time.monotonic() - began
        return max(training.seconds / budget, training.steps / options.steps if options.steps else 0.0)

    while (done := progress()) < 1:
        rate = learning_rate(options.learning_rate, training.steps, done)
        ids, kinds = next(batches)
        loss = training.step(ids, kinds, rate)
        now = time.monotonic()
        if now - reported >= options.report_every or training.steps == 1:
            speed = (training.tokens - reported_tokens) / (now - reported)
            print(
                f"{done:6.1%}  step {training.steps}  loss {loss.item():.4f}  rate {rate:.2e}  "
                f"{training.tokens / 1e6:.0f} M tokens, {speed / 1e6:.2f} M/s  {training.seconds:.0f} s",
                flush=True,
            )
            reported, reported_tokens = time.monotonic(), training.tokens
        if now - watched >= options.watch_every:
            print(f"        held out: {watch(training, options.watch_count)}", flush=True)
            watched = time.monotonic()
        if now - saved >= options.save_every:
            training.save(options.out)
            training.save_checkpoint(options.checkpoint)
            saved = time.monotonic()
    training.save(options.out)
    training.save_checkpoint(options.checkpoint)
    print(
        f"saved {options.out} after {training.steps} steps; held out: {watch(training, options.watch_count)}",
        flush=True,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model; a tokenizer in it is kept")
    parser.add_argument("--minutes", type=float, help="wall-clock budget of the training, over all its runs")
    parser.add_argument("--steps", type=int, help="budget in optimizer steps")
    parser.add_argument("--batch-tokens", type=int, default=131_072, help="tokens per step, padding included")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes that make data"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--init-from", type=Path, help="folder of a model to start from")
    parser.add_argument("--checkpoint", type=Path, help="file to go on from (default: checkpoint.safetensors in --out)")
    parser.add_argument("--report-every", type=float, default=10, help="seconds")
    parser.add_argument("--watch-every", type=float, default=60, help="seconds")
    parser.add_argument("--watch-count", type=int, default=200, help="held-out cases per watched benchmark")
    parser.add_argument("--save-every", type=float, default=60, help="seconds")
    options = parser.parse_args()
    if not options.minutes and not options.steps:
        parser.error("give --minutes or --steps")
    options.checkpoint = options.checkpoint or options.out / "checkpoint.safetensors"
    return options


def main() -> None:
    """Command line."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "tokenizer.json").exists():
        if options.init_from:  # weights mean something with their own tokenizer only
            PreTrainedTokenizerFast.from_pretrained(options.init_from).save_pretrained(options.out)
        else:
            tokenizer_training.train().save_pretrained(options.out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.out)
    torch.set_float32_matmul_precision("high")
    # Rows come in ten widths, and cuDNN builds a plan for each; the flash kernel needs none.
    torch.backends.cuda.enable_cudnn_sdp(False)
    training = Training(tokenizer, torch.device(options.device), options.seed, options.compile)
    if options.checkpoint.exists():
        training.load_checkpoint(options.checkpoint)
        print(f"going on from {options.checkpoint}, step {training.steps}", flush=True)
    elif options.init_from:
        training.load_weights(options.init_from)
    total = sum(parameter.numel() for parameter in training.parameters.values())
    print(f"{total:,} parameters, {2 * total / 1e6:.2f} MB in bf16; device {training.device}", flush=True)
    # A run that goes on draws data that it has not seen.
    stream = Stream(options.out / "tokenizer.json", f"{options.seed}/{training.steps}", options.batch_tokens)
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=4 if options.workers else None,
        pin_memory=training.device.type == "cuda",
    )
    with contextlib.suppress(KeyboardInterrupt):
        run(training, iter(loader), options)


if __name__ == "__main__":
    main()
