"""generation_config.json: which tokens end a generation, and how the model's authors would have it sampled."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from transformers import PretrainedConfig

from ..protocol.sampling import SamplingParams
from .loading import local_folder
from .sources import LoadError, ModelSource

_TokenId = Annotated[int, Field(strict=True)]
_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class _File(BaseModel):
    """What is read of it; the rest is for transformers."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    eos_token_id: _TokenId | list[_TokenId] | None = None
    do_sample: Annotated[bool, Field(strict=True)] | None = None
    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    repetition_penalty: Any = None


def stop_token_ids(source: ModelSource, config: PretrainedConfig) -> tuple[int, ...]:
    """The ids that end a generation: generation_config.json's eos_token_id, else the config's; none that the model
    cannot give. Raises LoadError if the file cannot be read."""
    given = _read(source).eos_token_id
    if given is None:
        given = getattr(config, "eos_token_id", None)
    ids = given if isinstance(given, list) else [] if given is None else [given]
    return tuple(one for one in ids if 0 <= one < config.vocab_size)


def default_sampling(source: ModelSource) -> dict[str, float | int]:
    """temperature, top_k, top_p, min_p and repetition_penalty, where they are given; greedy if the file says
    do_sample: false. Raises LoadError if it cannot be read, or a value is over the limits of SamplingParams."""
    read = _read(source)
    given = {name: value for name in _SAMPLING if (value := getattr(read, name)) is not None}
    try:
        checked = _PARAMS.validate_python(given)
    except ValidationError as error:
        raise _refused(source, error) from error
    found: dict[str, float | int] = {name: getattr(checked, name) for name in given}
    if read.do_sample is False:
        penalty = {name: value for name, value in found.items() if name == "repetition_penalty"}
        return {"temperature": 0.0, **penalty}
    return found


_PARAMS: Final = TypeAdapter(SamplingParams)


def _read(source: ModelSource) -> _File:
    path = local_folder(source) / "generation_config.json"
    if not path.is_file():
        return _File()
    try:
        return _File.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise _refused(source, error) from error


def _refused(source: ModelSource, error: ValidationError) -> LoadError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][:1]) or "the file"
    return LoadError(
        f"{source.model}: generation_config.json cannot be used: {where}: {first['msg']}, got {first['input']!r:.100}"
    )
