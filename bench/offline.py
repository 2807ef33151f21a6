"""All requests at once, through the whole system: client SDK → scheduler → worker → client.

    python -m tandem.bench.offline --model bench/shapes/llama-3.1-8b --load-format dummy --dtype bfloat16 \\
        --requests 32 --prompt-tokens 256 --output-tokens 256 --lookahead 0 --lookahead 1

Each lookahead gets a system of its own, and `--repeats` runs on it after one of warm-up. Greedy, stop tokens ignored,
random prompts of a fixed seed. The idle share is the worker's own measure: time on the device between the end of a step
and the start of the next while there was work, as part of the time with work.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from ..client.aio import AsyncClient
from ..launch.embedded import EmbeddedSystem
from ..protocol.messages import Stats
from .machine import describe_machine
from .observer import Observer

app = typer.Typer(add_completion=False)


async def _run(
    client: AsyncClient, observer: Observer, prompts: list[list[int]], output_tokens: int
) -> dict[str, float]:
    before = observer.stats()
    start = time.perf_counter()
    completions = await client.generate(prompts, temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    seconds = time.perf_counter() - start
    after = observer.stats()
    tokens = sum(len(completion.token_ids) for completion in completions)
    return {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds, **_device(before, after)}


def _device(before: Stats, after: Stats) -> dict[str, float]:
    """Steps, and how the workers' device time with work divides into steps and gaps, between two readings."""
    earlier = {worker.registration: worker for worker in before.workers}
    steps = busy = gap = 0
    for worker in after.workers:
        then = earlier[worker.registration]
        steps += worker.steps - then.steps
        busy += worker.busy_us - then.busy_us
        gap += worker.gap_us - then.gap_us
    return {"steps": steps, "step_ms": busy / 1e3 / max(1, steps), "idle_share": gap / max(1, busy + gap)}


def _prompts(requests: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [row.tolist() for row in rng.integers(0, vocab, (requests, length))]


async def _measure(
    address: str, requests: int, prompt_tokens: int, output_tokens: int, repeats: int
) -> list[dict[str, float]]:
    async with AsyncClient(address, max_concurrency=requests) as client:
        observer = Observer(address)
        vocab = client.model.vocab_size
        await _run(client, observer, _prompts(requests, prompt_tokens, vocab, seed=1_000), min(16, output_tokens))
        runs = [
            await _run(client, observer, _prompts(requests, prompt_tokens, vocab, seed), output_tokens)
            for seed in range(repeats)
        ]
        observer.close()
        return runs


@app.command()
def main(
    model: Annotated[str | None, typer.Option(help="Folder or hub id; the built-in model without it.")] = None,
    load_format: Annotated[str, typer.Option(help="auto, safetensors or dummy.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    requests: Annotated[int, typer.Option(min=1, help="Requests, all sent at once.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 256,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each.")] = 256,
    lookahead: Annotated[list[int] | None, typer.Option(help="May be given several times; 0 and 1 by default.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs; the median is shown.")] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure generated tokens per second and the device's idle share."""
    results: list[dict[str, Any]] = []
    options: dict[str, Any] = {"load_format": load_format, "dtype": dtype, "max_num_seqs": max(requests, 1)}
    options |= {"max_model_len": prompt_tokens + output_tokens, "max_num_batched_tokens": max(2048, requests)}
    if model is not None:
        options["model"] = model
    for depth in [0, 1] if lookahead is None else lookahead:
        begun = time.perf_counter()
        with EmbeddedSystem({**options, "lookahead": depth}) as system:
            ready_s = time.perf_counter() - begun
            runs = asyncio.run(_measure(system.address, requests, prompt_tokens, output_tokens, repeats))
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        results.append({"lookahead": depth, "ready_s": ready_s, "median": median, "runs": runs})
    report: dict[str, Any] = {
        "load": {**options, "requests": requests, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    }
    report |= {"results": results, "machine": describe_machine()}
    _show(results)
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


def _show(results: list[dict[str, Any]]) -> None:
    table = Table(
        "lookahead", "tokens/s", "step ms", "device idle", "ready s", "of lookahead " + str(results[0]["lookahead"])
    )
    base = results[0]["median"]["tokens_per_s"]
    for result in results:
        median = result["median"]
        table.add_row(
            str(result["lookahead"]),
            f"{median['tokens_per_s']:,.0f}",
            f"{median['step_ms']:.2f}",
            f"{median['idle_share']:.2%}",
            f"{result['ready_s']:.1f}",
            f"{median['tokens_per_s'] / base:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    app()
