"""The output of a response as it grows: messages and calls, and the events that tell of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .responses_schema import ItemStatus, OutputFunctionCall, OutputMessage, OutputText
from .tool_use import NamedCall, News
from .wire import as_dict, new_id

Told = tuple[str, dict[str, Any]]
"""An event's type, and what it holds besides."""


class Items:
    """Text grows one message until a call follows it. An answer of nothing is a message without text."""

    def __init__(self) -> None:
        self.found: list[OutputMessage | OutputFunctionCall] = []
        """Those that are whole."""
        self._message_id = ""
        """Of the message that grows; empty if none does."""
        self._texts: list[str] = []

    def take(self, news: News) -> Iterator[Told]:
        """What became of an answer. The iterator is to be exhausted."""
        if isinstance(news, NamedCall):
            if self._message_id:
                yield from self._end_message("completed")
            yield from self._call(news)
            return
        if not self._message_id:
            yield from self._begin_message()
        self._texts.append(news)
        yield "response.output_text.delta", {**self._place(), "delta": news, "logprobs": []}

    def end(self, *, cut: bool) -> Iterator[Told]:
        """The answer is over; `cut` before the model ended it. The iterator is to be exhausted."""
        if not self.found and not self._message_id:
            yield from self._begin_message()
        if self._message_id:
            yield from self._end_message("incomplete" if cut else "completed")

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": len(self.found), "content_index": 0}

    def _message(self, status: ItemStatus, texts: list[str]) -> OutputMessage:
        return OutputMessage(id=self._message_id, status=status, content=[OutputText(text=text) for text in texts])

    def _begin_message(self) -> Iterator[Told]:
        self._message_id = new_id("msg_")
        item = as_dict(self._message("in_progress", []))
        yield "response.output_item.added", {"output_index": len(self.found), "item": item}
        yield "response.content_part.added", {**self._place(), "part": as_dict(OutputText(text=""))}

    def _end_message(self, status: ItemStatus) -> Iterator[Told]:
        text, self._texts = "".join(self._texts), []
        place, item = self._place(), self._message(status, [text])
        yield "response.output_text.done", {**place, "text": text, "logprobs": []}
        yield "response.content_part.done", {**place, "part": as_dict(OutputText(text=text))}
        yield "response.output_item.done", {"output_index": len(self.found), "item": as_dict(item)}
        self.found.append(item)
        self._message_id = ""

    def _call(self, call: NamedCall) -> Iterator[Told]:
        index = {"output_index": len(self.found)}
        item = OutputFunctionCall(
            id=new_id("fc_"), status="completed", call_id=call.id, name=call.name, arguments=call.arguments
        )
        place = {"item_id": item.id, **index}
        begun = item.model_copy(update={"status": "in_progress", "arguments": ""})
        yield "response.output_item.added", {**index, "item": as_dict(begun)}
        yield "response.function_call_arguments.delta", {**place, "delta": call.arguments}
        done = {**place, "name": call.name, "arguments": call.arguments}
        yield "response.function_call_arguments.done", done
        yield "response.output_item.done", {**index, "item": as_dict(item)}
        self.found.append(item)
