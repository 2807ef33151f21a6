"""Chat templates: the text equals transformers' for templates in the styles that models use."""

import enum
import json
from dataclasses import dataclass
from typing import Any

import pytest

from tandem.client.chat import ChatTemplate
from tandem.client.tokenizer import Tokenizer
from tandem.protocol.errors import ConfigurationError, InvalidRequest

from support.tokenizer_zoo import CHATML, byte_level

HEADERS = """\
{%- if tools is defined and tools is not none %}{%- set has_tools = true %}{% endif %}
{{- bos_token }}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if has_tools %}{{- "Environment: ipython\\n" }}{% endif %}
{{- "Today: " + strftime_now("%d %b %Y") + "\\n\\n" }}
{%- for tool in tools or [] %}
    {{- tool | tojson(indent=4) }}
    {{- "\\n\\n" }}
{%- endfor %}
{{- system }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("one tool call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

HERMES = """\
{%- macro render(content, tag='') -%}
    {%- if content is string %}{{- content }}
    {%- else %}{%- for part in content if part.type == 'text' %}{{- part.text }}{%- endfor %}{%- endif %}
{%- endmacro -%}
{%- set ns = namespace(last=-1, multi_step=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" %}
        {%- set ns.multi_step = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.role == 'stop' %}{% break %}{% endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.reasoning_content is defined and loop.index0 >= ns.last %}
        {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {%- generation %}{{- render(message.content or '') }}{% endgeneration %}
    {%- for tool_call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.function.name }}{{- '", "arguments": ' }}
        {{- tool_call.function.arguments | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- for document in documents or [] %}{{ loop.index }}: {{ document.title|upper }} {{ document['text'] }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

ALTERNATING = """\
{{ bos_token }}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
[INST] {{ message['content'].strip() }} [/INST]
    {% elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {% endif %}
{% endfor %}
{{ "%s of %d" | format("text", 3) }} {{ "{:>6}".format("x") }} {{ ["a", "b"] | join(", ") }} {{ "ab" * 3 }} {{ 7 ** 2 }}
{{ messages | map(attribute="role") | unique | list }} {{ dict(a=1).items() | list }} {{ {"a": none} }}
{{ messages | selectattr("role", "equalto", "user") | list | length }} {{ "a&<b>" | tojson }} {{ [1, 2] + [3] }}
{{ "x y".split() | batch(1) | list }}
{{ messages[0:1]|length }} {{ messages[-1:]|length }} {{ ("a", "b")|join("-") }} {{ ", ".join(["x"]|map("upper")) }}
{{ "abc"[::-1] | center(9) | replace(" ", ".") }} {{ "" ~ none ~ undefined_name ~ 1 }}
"""


class Role(enum.StrEnum):
    USER = "user"


@dataclass
class Part:
    type: str
    text: str


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Weather <of> a "city" & more: Zürich',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "a": 1}}}

CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi <b> & ünïcode 你好 "}],
    "turns": [
        {"role": "user", "content": "  What is 2+2? "},
        {"role": "assistant", "content": "4", "name": None},
        {"role": "user", "content": "and 3+3?"},
    ],
    "system": [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "Hi"}],
    "tool_calls": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": '{"degrees": 21}'},
    ],
    "parts": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "one "}, {"type": "image"}, {"type": "text", "text": "two"}],
        }
    ],
    "reasoning": [
        {"role": "user", "content": "Think"},
        {"role": "assistant", "content": "Done", "reasoning": "\nwell\n"},
    ],
    "rich_objects": [{"role": Role.USER, "content": [Part("text", "from a dataclass")]}],
    "loop_controls": [
        {"role": "skip", "content": "x"},
        {"role": "user", "content": "kept"},
        {"role": "stop", "content": ""},
        {"role": "user", "content": "never"},
    ],
}
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "hermes": HERMES, "alternating": ALTERNATING}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def transformers_tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_buffer(byte_level()["tokenizer.json"])
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=backend, **SPECIAL)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False, "tools": [WEATHER]},
        {"add_generation_prompt": True, "documents": [{"title": "t", "text": "body"}], "enable_thinking": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
    ids=["prompt", "tools", "documents", "continue"],
)
def test_equals_transformers(transformers_tokenizer: Any, template: str, chat: str, options: dict[str, Any]) -> None:
    source, messages = TEMPLATES[template], CHATS[chat]
    try:
        expected = transformers_tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    except Exception as error:  # noqa: BLE001 - templates refuse in many ways; so must ours
        expected = error
    ours = dict(options)
    variables = {key: ours.pop(key) for key in ["enable_thinking"] if key in ours}
    if isinstance(expected, Exception):
        with pytest.raises(InvalidRequest):
            ChatTemplate(source, SPECIAL).render(messages, variables=variables, **ours)
    else:
        assert ChatTemplate(source, SPECIAL).render(messages, variables=variables, **ours) == expected


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}], "reasoning": "r"}]
    before = json.dumps(messages)
    ChatTemplate(HERMES, SPECIAL).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("text", "messages"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x"}, "text"], "messages[1]"),
        ([{"role": 7, "content": "x"}], "messages[0].role"),
    ],
)
def test_malformed_messages_are_named(messages: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as info:
        ChatTemplate(CHATML, SPECIAL).render(messages)
    assert info.value.field == field


def test_tools_are_schemas() -> None:
    tools: Any = [print]
    with pytest.raises(InvalidRequest, match="JSON schema") as info:
        ChatTemplate(CHATML, SPECIAL).render(CHATS["one"], tools=tools)
    assert info.value.field == "tools[0]"


def test_the_templates_own_refusal_reaches_the_user() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        ChatTemplate(ALTERNATING, SPECIAL).render([{"role": "assistant", "content": "x"}])


def test_deeply_nested_messages_are_refused() -> None:
    content: Any = "x"
    for _ in range(5_000):
        content = [content]
    with pytest.raises(InvalidRequest, match="100 levels"):
        ChatTemplate(CHATML, SPECIAL).render([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ x", "{% unknown_tag %}", "{{ 1 | no_such_filter }}", "{% endif %}"]
)
def test_what_is_no_template_is_a_configuration_error(source: str) -> None:
    with pytest.raises(ConfigurationError, match="chat template"):
        ChatTemplate(source, SPECIAL)


def test_template_is_found_in_files_and_configuration() -> None:
    files = byte_level()
    assert Tokenizer.from_files(files).chat_template().source == CHATML
    jinja = {**files, "chat_template.jinja": b"file"}
    assert Tokenizer.from_files(jinja).chat_template().source == "file"
    extra = {**jinja, "additional_chat_templates/tool_use.jinja": b"tools"}
    assert Tokenizer.from_files(extra).chat_template(tools=True).source == "tools"
    assert Tokenizer.from_files(extra).chat_template(tools=False).source == "file"
    listed = json.dumps(
        {"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}
    )
    named = Tokenizer.from_files({**files, "tokenizer_config.json": listed.encode()})
    assert (named.chat_template().source, named.chat_template(tools=True).source) == ("d", "t")
    assert named.chat_template(source="mine").render([{"role": "user"}]) == "mine"


def test_a_model_without_template_says_so() -> None:
    bare = {"tokenizer.json": byte_level()["tokenizer.json"]}
    with pytest.raises(ConfigurationError, match="no chat template"):
        Tokenizer.from_files(bare).chat_template()
