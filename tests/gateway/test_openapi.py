"""The OpenAPI document, and requests made from it: whatever they hold, no 5xx, and answers as described."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.gateway import Served

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


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


@pytest.mark.timeout(400)
def test_schemathesis_finds_nothing(served: Served, tmp_path: Path) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-P", "-W", "ignore", "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
            *("run", f"{served.url}/openapi.json", "--checks", CHECKS, "--max-examples", "25", "--seed", "1"),
            *("--phases", "fuzzing", "--request-timeout", "60", "--generation-database", "none"),
            *("--suppress-health-check", "all", "--no-color"),
        ],
        capture_output=True,
        text=True,
        timeout=350,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout[-4_000:] + run.stderr[-1_000:]
    served.require_healthy()
