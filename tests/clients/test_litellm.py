"""litellm as its users call it. In a process of its own: it warns of itself and starts threads on import."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from support.deadlines import DEADLINE_S
from support.gateway import MODEL, Served

SCRIPT = """
import asyncio, json, sys
import litellm

litellm.suppress_debug_info = True
base, model = sys.argv[1:]
sum = [{"role": "user", "content": "What is 123 + 456?"}]
weather = [{"role": "user", "content": "What is the weather in Paris?"}]
city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
tools = [{"type": "function", "function": {"name": "get_weather", "parameters": city}}]
found = {}
for provider in ("openai", "hosted_vllm"):
    common = dict(model=f"{provider}/{model}", api_base=base, api_key="unused", num_retries=0)
    whole = litellm.completion(messages=sum, temperature=0, **common)
    stream = litellm.completion(messages=sum, temperature=0, stream=True, **common)
    called = litellm.completion(messages=weather, tools=tools, temperature=0, **common)
    several = asyncio.run(litellm.acompletion(messages=sum, temperature=1, n=2, max_tokens=5, seed=1, **common))
    (call,) = called.choices[0].message.tool_calls
    try:
        litellm.completion(messages=sum, temperature=-1, **common)
        error = "none"
    except litellm.BadRequestError as failed:
        error = type(failed).__name__
    try:
        litellm.completion(messages=[{"role": "user", "content": "word " * 5_000}], **common)
        too_long = "none"
    except litellm.BadRequestError as failed:
        too_long = type(failed).__name__
    found[provider] = {
        "text": whole.choices[0].message.content,
        "tokens": whole.usage.completion_tokens,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
        "call": [call.function.name, json.loads(call.function.arguments)],
        "several": len(several.choices),
        "error": error,
        "too_long": too_long,
    }
print(json.dumps(found))
"""


def test_litellm(served: Served) -> None:
    run = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", SCRIPT, served.api, MODEL],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )
    assert run.returncode == 0, run.stderr[-3_000:]
    found = json.loads(run.stdout.splitlines()[-1])
    for provider in ("openai", "hosted_vllm"):
        assert found[provider] == {
            "text": "123 + 456 = 579",
            "tokens": 14,
            "streamed": "123 + 456 = 579",
            "call": ["get_weather", {"city": "Paris"}],
            "several": 2,
            "error": "BadRequestError",
            "too_long": "ContextWindowExceededError",
        }
