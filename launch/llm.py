"""Offline inference, called as vLLM's `LLM` is: a system of the program's own, and lists of prompts through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from ..protocol.errors import ConfigurationError, InvalidRequest

if TYPE_CHECKING:
    from ..client.prompts import ChatOptions, Message, Prompt
    from ..client.results import Choice, Completion, PositionLogprobs
    from ..client.tokenizer import Tokenizer
    from ..protocol.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was."""

    logprob: float
    rank: int
    """1 for the likeliest."""
    decoded_token: str


Logprobs: TypeAlias = dict[int, Logprob]
"""By token id: the token that stands there, and the likeliest ones."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the samples of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None
    logprobs: list[Logprobs] | None
    cumulative_logprob: float | None
    """The sum over the tokens; None without logprobs."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What became of one prompt."""

    request_id: str
    """Its place in the list of prompts."""
    prompt: Any
    """As it was given."""
    prompt_token_ids: list[int]
    prompt_logprobs: list[Logprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int


class LLM:
    """A model in this program's own system: scheduler and worker start as child processes, and end with it.

        with LLM(model="Qwen/Qwen3-0.6B") as llm:
            for output in llm.generate(["Hello", "Once upon a time"], SamplingParams(temperature=0, max_tokens=16)):
                print(output.outputs[0].text)

    `options` are the command line's, by name (`max_model_len`, `gpu_memory_utilization`, `enforce_eager`, …); without a
    model, the built-in one. Raises ConfigurationError for options that cannot be, ChildDied if the system does not
    start.
    """

    def __init__(self, model: str | None = None, *, data_parallel_size: int = 1, **options: Any) -> None:
        """Starts the system, and returns when it can answer."""
        from ..client.sync import Client
        from ..scheduler.config import SchedulerConfig
        from ..worker.config import WorkerConfig
        from .config import unknown_option
        from .embedded import EmbeddedSystem

        _refuse_what_is_vllms(options)
        of_worker, of_scheduler = WorkerConfig.model_fields, SchedulerConfig.model_fields
        for name in options:
            if name == "scheduler" or (name not in of_worker and name not in of_scheduler):
                raise ConfigurationError(unknown_option(name, {*of_worker, *of_scheduler} - {"scheduler", "address"}))
        worker = {name: value for name, value in options.items() if name in of_worker}
        if model is not None:
            worker["model"] = model
        self._system = EmbeddedSystem(
            worker,
            {name: value for name, value in options.items() if name in of_scheduler},
            data_parallel_size=data_parallel_size,
        )
        self._system.start()
        try:
            self._client = Client(self._system.address, name="LLM")
        except BaseException:
            self._system.stop()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        n: int = 1,
        **sampling: Any,
    ) -> list[RequestOutput]:
        """One output for each prompt, in order, with a progress bar on stderr. Prompts are text, token ids,
        `{"prompt": text}` or `{"prompt_token_ids": […]}`. What is not given comes from the model's
        generation_config.json; max_tokens is what the context leaves. Raises as Client.generate."""
        from ..client.prompts import is_batch

        if isinstance(prompts, Sequence) and len(prompts) == 0 and not isinstance(prompts, str):
            return []
        given: Sequence[Any] = prompts if is_batch(prompts) else [prompts]  # type: ignore[assignment]
        given = [_text(prompt) if isinstance(prompt, Mapping) else prompt for prompt in given]
        return self._run(given, sampling_params, None, use_tqdm, n, sampling)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        n: int = 1,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        **sampling: Any,
    ) -> list[RequestOutput]:
        """The same for one chat (a list of messages) or several."""
        from ..client.prompts import ChatOptions, is_chat

        given: Sequence[Any] = [messages] if is_chat(messages) else messages
        for chat in given:
            if not is_chat(chat):
                raise InvalidRequest("messages: expected a chat, or a list of chats", field="messages")
        options = ChatOptions(
            tools=tools,
            chat_template=chat_template,
            template_variables=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return self._run(given, sampling_params, options, use_tqdm, n, sampling)

    def get_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if it comes without one."""
        return self._client.tokenizer()

    def shutdown(self) -> None:
        """Ends the system. Idempotent; happens as well when the program ends."""
        self._client.close()
        self._system.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _run(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None,
        chat: ChatOptions | None,
        use_tqdm: bool,
        n: int,
        sampling: Mapping[str, Any],
    ) -> list[RequestOutput]:
        from .progress import prompt_bar

        if not prompts:
            return []  # no chats
        with prompt_bar(len(prompts)) if use_tqdm else nullcontext() as bar:
            done: list[Completion] = self._client.generate(
                prompts, params, n=n, chat=chat, on_done=None if bar is None else bar.one_done, **sampling
            )
        return [_output(str(i), prompt, one) for i, (prompt, one) in enumerate(zip(prompts, done, strict=True))]


_ONLY: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "tokenizer": None,
    "tokenizer_mode": "auto",
    "skip_tokenizer_init": False,
    "enable_lora": False,
    "enable_chunked_prefill": True,
    "cpu_offload_gb": 0,
    "speculative_config": None,
    "distributed_executor_backend": None,
    "disable_custom_all_reduce": False,
    "hf_overrides": None,
    "limit_mm_per_prompt": None,
}


def _text(prompt: Mapping[str, Any]) -> Any:
    """vLLM's TextPrompt as its text; anything else as it is."""
    return prompt["prompt"] if set(prompt) == {"prompt"} else prompt


def _refuse_what_is_vllms(options: dict[str, Any]) -> None:
    """Options of vLLM's that have one meaning here are dropped at that value, and refused at any other."""
    for name, only in _ONLY.items():
        value = options.pop(name, only)
        if value != only:
            raise ConfigurationError(f"{name}: {value!r} is not supported; only {only!r} is")


def _output(request_id: str, prompt: Any, done: Completion) -> RequestOutput:
    prompt_logprobs = done.prompt_logprobs
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=done.prompt_token_ids,
        prompt_logprobs=None
        if prompt_logprobs is None
        else [None if one is None else _logprobs(one) for one in prompt_logprobs],
        outputs=[_sample(choice) for choice in done.choices],
        finished=True,
        num_cached_tokens=done.usage.cached_tokens,
    )


def _sample(choice: Choice) -> CompletionOutput:
    found = choice.logprobs
    return CompletionOutput(
        index=choice.index,
        text=choice.text,
        token_ids=choice.token_ids,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        logprobs=None if found is None else [_logprobs(position) for position in found],
        cumulative_logprob=None if found is None else sum(position.token.logprob for position in found),
    )


def _logprobs(position: PositionLogprobs) -> Logprobs:
    return {one.token_id: Logprob(one.logprob, one.rank, one.text) for one in (position.token, *position.top)}
