"""Answers of a response in which text and calls alternate, however they are cut."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.response_items import Items
from tandem.gateway.responses_schema import OutputFunctionCall
from tandem.gateway.tool_use import NamedCall, News

NEWS = st.one_of(
    st.text(min_size=1, max_size=5), st.builds(NamedCall, st.just("call_1"), st.just("f"), st.just('{"a": 1}'))
)


def as_items(news: list[News]) -> list[object]:
    """Texts that follow one another are one message; nothing is an empty one."""
    found: list[object] = []
    for one in news:
        if isinstance(one, str) and found and isinstance(found[-1], str):
            found[-1] += one
        else:
            found.append(one if isinstance(one, str) else (one.name, one.arguments))
    return found or [""]


@given(st.lists(NEWS, max_size=8), st.booleans())
def test_events_tell_what_the_output_is(news: list[News], cut: bool) -> None:
    items = Items()
    told = [event for one in news for event in items.take(one)] + list(items.end(cut=cut))
    shown = [
        (item.name, item.arguments) if isinstance(item, OutputFunctionCall) else item.content[0].text
        for item in items.found
    ]
    assert shown == as_items(news)
    assert len({item.id for item in items.found}) == len(items.found)
    done = [content["item"] for kind, content in told if kind == "response.output_item.done"]
    assert done == [item.model_dump() for item in items.found]
    unfinished = [item for item in items.found if item.status != "completed"]
    assert unfinished == ([items.found[-1]] if cut and isinstance(shown[-1], str) else [])
    grown: dict[int, str] = {}
    for kind, content in told:
        index: Any = content["output_index"]
        match kind.removeprefix("response."):
            case "output_item.added":
                assert index == len(grown)  # one after the other
                grown[index] = ""
            case "output_text.delta" | "function_call_arguments.delta":
                assert content["item_id"] == items.found[index].id
                grown[index] += content["delta"]
            case "output_text.done":
                assert content["text"] == grown[index]
            case "function_call_arguments.done":
                assert content["arguments"] == grown[index]
    assert list(grown.values()) == [one if isinstance(one, str) else one[1] for one in shown]
