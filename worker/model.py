"""A transformers model, unchanged, over a paged KV cache: what every step runs.

It is checked when it is loaded: paged, it must compute what it computes by itself (inspection.py). Then it may be
compiled, gets its KV cache, and from a step's batch makes hidden states, of which those rows that want a token become
logits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from . import inspection, invariance, products, rope
from .attention import flashinfer, registry
from .attention.base import AttentionBackend
from .attention.invariant import InvariantAttention
from .attention.ops import OperatorRouter
from .attention.reference import ReferenceAttention
from .attention.sharing import Cutting
from .batch import Batch
from .compiling import Compiled, CompiledTrunk, compile_rows, compile_trunk
from .kv_cache import FP8, KVCache, LayerKV, kv_bytes_per_block
from .loading import Progress, check_weights, local_folder, read_config, resolve_dtype, weight_files
from .pieces import TrunkPieces
from .quantization import problem as quantization_problem
from .quantization import quantize_linears
from .sampler import greedy
from .sources import LoadError, ModelSource
from .traces import Shelf
from .trunk import trunk_and_head
from .weights import dummy_module, safetensors_module

log = logging.getLogger(__name__)

BackendName = Literal["auto", "flashinfer", "reference"]
Quantization = Literal["fp8"]
KVCacheDtype = Literal["auto", "fp8"]


class PagedModel:
    """A model that computes batches of tokens whose keys and values live in blocks.

    `hidden`, `logits` launch work on the current stream and never wait for the device. The KV cache must have been
    allocated before `hidden`.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        *,
        dtype: torch.dtype,
        device: torch.device,
        attention_backend: BackendName,
        batch_invariant: bool,
        lanes: int,
        quantization: Quantization | None = None,
        kv_cache_dtype: KVCacheDtype = "auto",
    ) -> None:
        self.config: PretrainedConfig = module.config
        self.dtype = dtype
        self.device = device
        self.lanes = lanes
        self.batch_invariant = batch_invariant
        self._by_row_kernels = batch_invariant and device.type == "cuda"
        self._fills_up = batch_invariant and not self._by_row_kernels
        """Steps are filled up to whole tiles of rows; see `invariance`."""
        self.module = module
        self.quantization: Quantization | None = None
        self.kv_dtype = FP8 if kv_cache_dtype == "fp8" else dtype
        self._trunk, self._head = trunk_and_head(module)
        with inspection.named_failures(module):
            self.kv_spec: tuple[LayerKV, ...] = inspection.inspect_layers(module, self._trunk, device)
        self.attention_backend = choose_backend(attention_backend, self.kv_spec, dtype, device, batch_invariant)
        self._layer_of = {layer.layer_idx: index for index, layer in enumerate(self.kv_spec)}
        self._cache: KVCache | None = None
        self._backend: AttentionBackend | None = None
        self._router = OperatorRouter(self._layer_of)
        self._compiled: _CompiledModel | None = None
        self._pieces: TrunkPieces | None = None
        with inspection.named_failures(module):
            self.vocab_size = self._check()
            if quantization is not None:
                _quantize(self._trunk, dtype, device, batch_invariant)
                self.quantization = quantization
                self._check()

    @property
    def compiled(self) -> bool:
        """Forward passes and greedy sampling run compiled code."""
        return self._compiled is not None

    @property
    def capturable(self) -> bool:
        """Steps of decoding rows can become CUDA graphs: their kernels do not depend on anything that the host reads
        from the device, as it may in a model's own code (batch-invariant mode refuses a model that does)."""
        return self.compiled or self._by_row_kernels

    def compile(self, traces: Path | None = None) -> None:
        """Compiles the trunk, and the head with greedy sampling, for any number of tokens. `traces`: a folder for what
        the next start need not trace again.

        A model that cannot be compiled, or that computes something else when it is, goes on as it was; a warning says
        so. Not for batch-invariant mode.
        """
        tokens = torch.zeros(2, dtype=torch.int64, device=self.device)
        rows = torch.zeros(2, self.config.hidden_size, dtype=self.dtype, device=self.device)
        try:
            self._compiled = _CompiledModel(
                trunk=compile_trunk(
                    self._trunk,
                    lambda ids, positions: inspection.run_trunk(self._trunk, ids, positions, self._router),
                    [tokens, tokens],
                    shelf=None if traces is None else Shelf(traces, f"trunk {self._router.caller} {self._layer_of}"),
                ),
                choose=compile_rows(
                    self._head,
                    lambda hidden: greedy(self.logits(hidden)),
                    [rows],
                    shelf=None if traces is None else Shelf(traces, "choice"),
                ),
            )
            self._check()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - of many kinds (no C compiler, …), and the model runs without
            self._compiled = None
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("%s runs uncompiled, and so without CUDA graphs: %s", type(self.module).__name__, first_line)

    def tune_products(self, rows: Sequence[int], tokens: Sequence[int], folder: Path, progress: Progress) -> None:
        """Tries which algorithms are the fastest for the products of a compiled model: those of `tokens` in the trunk
        and of `rows` in the head. Remembers them in `folder`; see products. Nothing else may run on the device."""
        if self._compiled is None:
            raise RuntimeError("the model is not compiled")
        uses = [(*use, tokens) for use in self._compiled.trunk.products]
        uses += [(*use, rows) for use in self._compiled.choose.products]
        products.prepare(uses, self.device, folder, progress)

    @property
    def cutting(self) -> Cutting | None:
        """See AttentionBackend.cutting. The KV cache must be allocated."""
        return self._allocated().cutting

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Bytes of KV cache that one block of `block_size` tokens takes."""
        return kv_bytes_per_block(self.kv_spec, block_size, self.kv_dtype)

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> None:
        """Allocate blocks 0..num_blocks - 1 and the scratch block num_blocks, zeroed. A former cache is given up."""
        self._cache = self._backend = None
        self._cache = KVCache(self.kv_spec, num_blocks, block_size, dtype=self.kv_dtype, device=self.device)
        if self.attention_backend == "flashinfer":
            self._backend = flashinfer.FlashInferAttention(
                self._cache, dtype=self.dtype, lanes=self.lanes, device=self.device
            )
        else:
            self._backend = self._plain_attention(self._cache)

    def _plain_attention(self, cache: KVCache) -> AttentionBackend:
        """That takes a cache of any shape."""
        if self.attention_backend == "invariant":
            return InvariantAttention(cache)
        return ReferenceAttention(cache, per_query=self.batch_invariant)

    def release_kv_cache(self) -> None:
        """Gives the cache's memory up; the model computes nothing until another is allocated."""
        self._cache = self._backend = None

    @property
    def scratch_block(self) -> int:
        """The block id that padding uses."""
        if self._cache is None:
            raise RuntimeError("the KV cache is not allocated yet")
        return self._cache.scratch_block

    def capture_pieces(self, sizes: Sequence[int], pool: Any, progress: Progress) -> None:
        """Captures CUDA graphs of the trunk for these numbers of tokens (see pieces), into a graphs' memory pool. The
        model must be compiled, and nothing else may run on the device."""
        if self._compiled is None:
            raise RuntimeError("the model is not compiled")
        self._pieces = TrunkPieces(self._compiled.trunk.begin, self._router.enter, sizes, pool, self.device, progress)

    def takes_pieces(self, tokens: int) -> bool:
        """A step of so many tokens runs by the graphs of `capture_pieces`."""
        return self._pieces is not None and self._pieces.takes(tokens)

    def hidden(self, batch: Batch, *, in_pieces: bool = False, wanted: Tensor | None = None) -> Tensor:
        """Write the keys and values of all tokens, attend, and return the final norm's output for the tokens `wanted`
        ([N] int64, their places in the batch), or for all: [N, hidden].

        `in_pieces`: by the graphs of `capture_pieces`, if the step is none too large; the result is then valid until
        the next such step.
        """
        backend = self._allocated()
        pieces = self._pieces if in_pieces and self.takes_pieces(batch.num_tokens) else None
        if pieces is None or self._compiled is None:
            return self._run(backend, backend.cache, batch, wanted)
        with torch.no_grad():
            begun = pieces.run(backend.begin(batch), batch.token_ids, batch.positions)
            return self._end(self._compiled.trunk, begun, wanted)

    def _allocated(self) -> AttentionBackend:
        if self._backend is None:
            raise RuntimeError("the KV cache is not allocated yet")
        return self._backend

    @torch.no_grad()
    def logits(self, hidden_rows: Tensor) -> Tensor:
        """The model's head over rows [N, hidden]: [N, vocab_size] float32, contiguous; soft caps and scales as the
        model does."""
        count = hidden_rows.shape[0]
        with invariance.mode_for(self.device) if self.batch_invariant else nullcontext():
            rows = invariance.pad_rows(hidden_rows) if self._fills_up else hidden_rows
            logits: Tensor = self._head(inputs_embeds=rows.unsqueeze(0), use_cache=False).logits
            return logits[0, :count].float().contiguous()  # some models cut padding off

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Of each row of float32 logits [N, vocab], in batch-invariant mode whatever the other rows are."""
        if self._by_row_kernels:
            from . import invariant_kernels

            return invariant_kernels.softmax(logits, torch.float32, log=True)
        return torch.log_softmax(logits, dim=-1)

    @torch.no_grad()
    def greedy(self, hidden_rows: Tensor) -> Tensor:
        """The likeliest token after each of rows [N, hidden]: [N] int64."""
        if self._compiled is not None:
            return self._compiled.choose(hidden_rows)
        return greedy(self.logits(hidden_rows))

    @torch.no_grad()
    def _run(self, backend: AttentionBackend, cache: KVCache, batch: Batch, wanted: Tensor | None = None) -> Tensor:
        if self._compiled is not None:
            self._router.enter(backend.begin(batch))
            trunk = self._compiled.trunk
            return self._end(trunk, trunk.begin(batch.token_ids, batch.positions), wanted)
        hidden = self._run_uncompiled(backend, cache, batch)
        return hidden if wanted is None else hidden[wanted]

    def _end(self, trunk: CompiledTrunk, begun: Sequence[Tensor], wanted: Tensor | None) -> Tensor:
        if wanted is not None and not len(wanted):  # compiled code takes a row at least
            return torch.empty((0, self.config.hidden_size), dtype=self.dtype, device=self.device)
        return trunk.end(begun, wanted)

    def _run_uncompiled(self, backend: AttentionBackend, cache: KVCache, batch: Batch) -> Tensor:
        count = batch.num_tokens
        if not self.batch_invariant:
            router = registry.LayerRouter(backend.begin(batch), self._layer_of)
            return inspection.run_trunk(self._trunk, batch.token_ids, batch.positions, router)
        if self._fills_up:
            batch = invariance.pad_batch(batch, cache.scratch_block)
        mode = invariance.mode_for(self.device)
        router = registry.LayerRouter(backend.begin(batch), self._layer_of, around=mode.own_work)
        with mode:
            return inspection.run_trunk(self._trunk, batch.token_ids, batch.positions, router)[:count]

    def _check(self) -> int:
        """Compare paged results with the model's own, and in batch-invariant mode bits across batches; returns the
        width of the logits."""
        if self.batch_invariant:
            invariance.check_tiles(self.module)
        name, vocab, device = type(self.module).__name__, self.config.vocab_size, self.device
        mixed = [self.logits(rows) for rows in self._probe(inspection.mixed_steps(vocab, device))]
        for sequence, logits in enumerate(mixed):
            tokens = inspection.probe_tokens(vocab, sequence, device)
            own = inspection.own_logits(self.module, tokens)
            inspection.check_same(name, logits, own, self.dtype, quantized=self.quantization is not None)
        if self.batch_invariant:
            alone = [self.logits(rows) for rows in self._probe(inspection.single_steps(vocab, device))]
            inspection.check_same_bits(name, mixed, alone)
        return mixed[0].shape[-1]

    def _probe(self, steps: list[inspection.ProbeStep]) -> list[Tensor]:
        """Run steps over a small cache of their own: each probe sequence's hidden rows [PROBE_TOKENS, hidden]."""
        blocks, block_size = inspection.PROBE_BLOCKS, inspection.PROBE_BLOCK_SIZE
        cache = KVCache(self.kv_spec, blocks, block_size, dtype=self.dtype, device=self.device)
        backend = self._plain_attention(cache)
        found: list[list[Tensor]] = [[] for _ in range(inspection.PROBE_SEQUENCES)]
        for step in steps:
            batch = step.batch(cache.scratch_block)
            rows = self._run(backend, cache, batch)
            if self._compiled is not None:  # whose rows must not depend on which others are wanted
                backwards = torch.arange(batch.num_tokens - 1, -1, -1, device=self.device)
                for wanted in (backwards[::2], backwards[1::2]):
                    rows[wanted] = self._run(backend, cache, batch, wanted)
            for sequence, part in zip(step.sequences, torch.split(rows, step.lengths), strict=True):
                found[sequence].append(part)
        return [torch.cat(parts) for parts in found]


@dataclass(frozen=True, slots=True)
class _CompiledModel:
    trunk: CompiledTrunk
    """token ids [T], positions [T] -> hidden [N, hidden]"""
    choose: Compiled
    """hidden rows [N, hidden] -> the likeliest tokens [N]"""


def choose_backend(
    wanted: BackendName, spec: tuple[LayerKV, ...], dtype: torch.dtype, device: torch.device, batch_invariant: bool
) -> Literal["flashinfer", "reference", "invariant"]:
    """The attention backend of a model. Raises LoadError if the wanted one cannot serve it."""
    if batch_invariant and device.type == "cuda":
        if wanted != "auto":
            raise LoadError(
                f"attention backend {wanted!r} cannot be used: it is not batch-invariant on CUDA; use 'auto'"
            )
        return "invariant"
    problem = "it is not batch-invariant" if batch_invariant else flashinfer.problem(spec, dtype, device)
    if wanted == "flashinfer" and problem is not None:
        raise LoadError(f"attention backend 'flashinfer' cannot be used: {problem}; use 'auto' or 'reference'")
    return "flashinfer" if wanted != "reference" and problem is None else "reference"


def _quantize(trunk: nn.Module, dtype: torch.dtype, device: torch.device, batch_invariant: bool) -> None:
    problem = quantization_problem(device, dtype)
    if batch_invariant:
        problem = "batch-invariant mode does not know its products"
    if problem is not None:
        raise LoadError(f"--quantization fp8 cannot be used: {problem}")
    count = quantize_linears(trunk)
    log.info("%d linear layers are kept in 8 bits", count)


def load_model(
    source: ModelSource,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device,
    attention_backend: BackendName,
    batch_invariant: bool,
    lanes: int,
    progress: Progress,
    quantization: Quantization | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
) -> PagedModel:
    """Load a model onto a device and check that it computes the same when paged.

    Raises LoadError naming what is missing, malformed or not supported. `progress` is called with a phrase and a
    share from 0 to 1.
    """
    registry.register()
    device = torch.device(device)
    progress("reading the config", 0.0)
    folder = local_folder(source)
    config = read_config(source, folder)
    weights = [] if source.load_format == "dummy" else weight_files(source, folder, progress)
    check_weights(weights)
    dtype = resolve_dtype(dtype, config, device, weights)
    experts = invariance.experts_implementation(device) if batch_invariant else None
    if source.load_format == "dummy":
        progress("making random weights", 0.0)
        module = dummy_module(source, config, dtype, device, experts)
    else:
        module = safetensors_module(source, folder, config, dtype, device, experts, progress)
    rope.fix(module)
    progress("checking the model", 0.0)
    model = PagedModel(
        module,
        dtype=dtype,
        device=device,
        attention_backend=attention_backend,
        batch_invariant=batch_invariant,
        lanes=lanes,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
    )
    progress("model loaded", 1.0)
    return model
