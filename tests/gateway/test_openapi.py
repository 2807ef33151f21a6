"""The OpenAPI document, and requests made from it: whatever they hold, no 5xx, and answers as described."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.gateway import Served, events, service

pytestmark = pytest.mark.thorough

NOT_CHECKED = "positive_data_acceptance"
"""What a schema cannot say makes a request one that is refused: ids beyond the vocabulary, prompts beyond the context,
JSON schemas that are none, fields that only go together."""


@pytest.fixture(scope="module")
def small() -> Iterator[Served]:
    """Answers end soon however much is asked for, and the most prompts of one request are more than it takes."""
    with service("--max-model-len", "96", "--max-requests-per-client", "64") as found:
        yield found


def test_the_document_describes_every_path(served: Served) -> None:
    document = served.get("/openapi.json").json()
    assert set(document["paths"]) == set(
        """
        /v1/completions /v1/chat/completions /v1/responses /tokenize /detokenize /v1/models /v1/models/{model} /health
        /ping /version /metrics
        """.split()
    )
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"] or operation["description"]
            if method == "post":
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                assert schema["$ref"].rpartition("/")[2] in document["components"]["schemas"], path


def test_the_examples_are_requests(served: Served) -> None:
    """Each is answered with what it is an example of."""
    document = served.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if "requestBody" not in operation:
                continue
            examples = operation["requestBody"]["content"]["application/json"]["examples"]
            assert examples, path
            for name, example in examples.items():
                answer = served.post(path, example["value"])
                assert answer.status_code == 200, (path, name, answer.text)
                if example["value"].get("stream"):
                    assert len(events(answer)) > 2, (path, name)


def test_the_bounds_of_sampling_are_told(served: Served) -> None:
    schemas = served.get("/openapi.json").json()["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest"):
        fields = schemas[name]["properties"]
        assert {"type": "number", "exclusiveMinimum": 0, "maximum": 1} in fields["top_p"]["anyOf"]
        assert {"type": "string", "minLength": 1, "maxLength": 256} in fields["stop"]["anyOf"]
        (bias,) = [one for one in fields["logit_bias"]["anyOf"] if one["type"] == "object"]
        assert (bias["maxProperties"], bias["additionalProperties"]["minimum"]) == (1_024, -100)
    (most,) = [one for one in schemas["ResponsesRequest"]["properties"]["max_output_tokens"]["anyOf"] if len(one) > 1]
    assert most == {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}


ALONE = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize")
"""Operations that a process each tries, the others one more. Not threads of one: Python 3.11 fails with
"AST constructor recursion depth mismatch" when two threads parse code at once, which hypothesis does."""


@pytest.mark.timeout(3_600)
def test_schemathesis_finds_nothing(small: Served, tmp_path: Path) -> None:
    """What its examples, the edges of every field and random requests do: no 5xx, nothing that the document does not
    describe, nothing taken that it forbids."""
    script = "from schemathesis.cli import schemathesis; schemathesis()"
    paths = [("--include-path", path) for path in ALONE]
    others = tuple(word for path in ALONE for word in ("--exclude-path", path))
    runs = [
        subprocess.Popen(
            [
                *(sys.executable, "-P", "-W", "ignore", "-c", script),
                *("run", f"{small.url}/openapi.json", "--exclude-checks", NOT_CHECKED, "--max-examples", "8", *chosen),
                *("--phases", "examples,coverage,fuzzing", "--seed", "1", "--workers", "1", "--request-timeout", "300"),
                *("--generation-database", "none", "--suppress-health-check", "all", "--no-color"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )
        for chosen in (*paths, others)
    ]
    try:
        ended = [(run.communicate(timeout=3_300)[0], run.returncode) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert {code for _, code in ended} == {0}, "\n".join(said[-4_000:] for said, code in ended if code)
    tried = sum(int(count) for said, _ in ended for count in re.findall(r"Selected: (\d+)/", said))
    assert tried == sum(map(len, small.get("/openapi.json").json()["paths"].values())), "each operation was somebody's"
    small.require_healthy()
