"""lm-eval's `local-completions`: log-likelihoods of given answers, and generated ones, on a task made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tandem.launch.builtin import MODEL_DIR

from support.deadlines import DEADLINE_S
from support.gateway import MODEL, Served

PROBLEMS = [(12, 30), (45, 54), (7, 8), (123, 456), (200, 99), (61, 3), (314, 15), (92, 65)]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
doc_to_target: 0
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
UNTIL = """
doc_to_target: "{{choices[0]}}"
target_delimiter: ""
generation_kwargs: {until: ["<|im_end|>", "\\n"], max_gen_toks: 32, do_sample: false, temperature: 0.0}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def test_lm_eval(served: Served, tmp_path: Path) -> None:
    data = tmp_path / "sums.jsonl"
    with data.open("w") as file:
        for a, b in PROBLEMS:
            question = f"<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n"
            right = f"{a} + {b} = {a + b}"
            choices = [right, f"{a} + {b} = {a + b + 1}", f"{a} + {b} = {a + b - 2}"]  # none begins another
            file.write(json.dumps({"question": question, "choices": choices}) + "\n")
    for name, kind, rest in (("sums_choice", "multiple_choice", CHOICE), ("sums_until", "generate_until", UNTIL)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind) + rest)
    model_args = {
        "model": MODEL,
        "base_url": f"{served.api}/completions",
        "tokenizer": str(MODEL_DIR),
        "tokenizer_backend": "huggingface",
        "num_concurrent": "4",
        "max_retries": "1",
    }
    arguments = [
        *("--model", "local-completions", "--tasks", "sums_choice,sums_until", "--include_path", str(tmp_path)),
        *("--model_args", ",".join(f"{key}={value}" for key, value in model_args.items())),
        *("--output_path", str(tmp_path / "out"), "--batch_size", "2"),
    ]
    run = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-m", "lm_eval", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "unused"},
    )
    assert run.returncode == 0, run.stderr[-3_000:]
    (written,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(written.read_text())["results"]
    assert results["sums_choice"]["acc,none"] == 1.0
    assert results["sums_until"]["exact_match,none"] == 1.0
