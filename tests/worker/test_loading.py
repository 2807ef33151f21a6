"""From a folder to a model and a tokenizer; and everything that is refused, by name."""

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, dynamic_module_utils
from transformers.models.llama.modeling_llama import LlamaMLP

from tandem.worker.config import WorkerConfig
from tandem.worker.describe import choose_max_model_len
from tandem.worker.loading import read_config, resolve_dtype, tokenizer_files
from tandem.worker.model import PagedModel, load_model
from tandem.worker.sources import LoadError, ModelSource

from support.paged import Sequences, load, quiet, random_tokens
from support.remote_code import MARK, save_with_code
from support.tiny_models import VOCAB, save_tiny, tiny_config, tiny_tokenizer

CPU = torch.device("cpu")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_weights_are_those_of_the_files_and_progress_reaches_the_end(tmp_path: Path) -> None:
    own = save_tiny("llama", tmp_path)
    seen: list[tuple[str, float]] = []
    model = load_model(
        ModelSource(str(tmp_path)),
        dtype="auto",
        device="cpu",
        attention_backend="auto",
        batch_invariant=False,
        lanes=1,
        progress=lambda what, share: seen.append((what, share)),
    )
    loaded = dict(model.module.named_parameters())
    for name, parameter in own.named_parameters():
        assert torch.equal(loaded[name], parameter)
        assert not loaded[name].requires_grad
    assert seen[-1][1] == 1.0
    assert all(0.0 <= share <= 1.0 for _, share in seen)
    assert len({share for what, share in seen if what == "Loading weights"}) > 3


def test_sharded_weights(tmp_path: Path) -> None:
    own = save_tiny("qwen3_moe", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    own.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sequences = Sequences(load(tmp_path))
    tokens = random_tokens(12, VOCAB, 0)
    sequences.add(tokens)
    with torch.no_grad():
        expected = own(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(sequences.step([(0, 12)])[0], expected, rtol=1e-4, atol=1e-4)


def dummy(folder: Path, seed: int, **changes: Any) -> PagedModel:
    options: dict[str, Any] = {
        "dtype": "auto",
        "device": "cpu",
        "attention_backend": "auto",
        "batch_invariant": False,
        "lanes": 1,
        "progress": quiet,
    }
    return load_model(ModelSource(str(folder), load_format="dummy", seed=seed), **{**options, **changes})


def test_dummy_weights_need_only_a_config_and_follow_the_seed(tmp_path: Path) -> None:
    tiny_config("gemma2").save_pretrained(tmp_path)
    state = torch.get_rng_state()
    one, same, other = (dict(dummy(tmp_path, seed).module.named_parameters()) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[weight], same[weight])
    assert not torch.equal(one[weight], other[weight])
    assert float(one[weight].std()) == pytest.approx(0.3, rel=0.1)
    assert tokenizer_files(ModelSource(str(tmp_path))) == {}


def test_code_that_comes_with_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "model"
    own = save_with_code(folder)
    with pytest.raises(LoadError, match=r"modeling_doubled\.DoubledForCausalLM.*--trust-remote-code"):
        load(folder)
    with pytest.raises(LoadError, match="--trust-remote-code"):
        dummy(folder, 1)
    assert not (folder / MARK).exists()
    sequences = Sequences(load(folder, trust_remote_code=True))
    assert (folder / MARK).exists()
    tokens = random_tokens(12, VOCAB, 0)
    sequences.add(tokens)
    with torch.no_grad():
        expected = own(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(sequences.step([(0, 12)])[0], expected, rtol=1e-4, atol=1e-4)


def test_code_that_is_not_needed_is_not_run(tmp_path: Path) -> None:
    """transformers knows the architecture itself."""
    save_with_code(tmp_path)
    edit_config(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"])
    assert load(tmp_path).vocab_size == VOCAB
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, dtype=dtype)
    assert model.dtype == getattr(torch, dtype)
    sequences = Sequences(model)
    sequences.add(random_tokens(9, VOCAB, 0))
    logits = sequences.step([(0, 9)])[0]
    assert logits.dtype == torch.float32
    assert {p.dtype for p in model.module.parameters()} == {model.dtype}


def test_auto_dtype(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    config = read_config(ModelSource(str(tmp_path)), tmp_path)
    for given, cpu, cuda in (
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float32, torch.float32),
        (None, torch.float32, torch.bfloat16),
    ):
        config.dtype = given
        assert resolve_dtype("auto", config, CPU, []) == cpu
        assert resolve_dtype("auto", config, torch.device("cuda"), []) == cuda
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "other.safetensors")
    assert resolve_dtype("auto", config, torch.device("cuda"), [tmp_path / "other.safetensors"]) == torch.bfloat16
    with pytest.raises(LoadError, match="'int8' is unknown"):
        resolve_dtype("int8", config, CPU, [])


def test_missing_weights_are_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"missing_keys: model.layers.1.mlp.up_proj.weight"):
        load(tmp_path)


def edit_weights(folder: Path, changes: dict[str, torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **changes}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.norm.weight": torch.ones(65)}, r"mismatched_keys: model.norm.weight has shape \(65,\) instead"),
        ({"lm_head.weight": torch.ones(VOCAB, 64, dtype=torch.int8)}, "lm_head.weight is kept as I8: it is quantized"),
        ({"lm_head.weight": torch.full((VOCAB, 64), torch.nan)}, "computes NaN .*: its weights are damaged"),
        ({"lm_head.weight": torch.full((VOCAB, 64), torch.inf)}, "computes .*by itself too: its weights are damaged"),
    ],
)
def test_weights_that_cannot_be_used_are_named(changes: dict[str, torch.Tensor], named: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    edit_weights(tmp_path, changes)
    with pytest.raises(LoadError, match=named):
        load(tmp_path)


def test_weights_that_no_model_asks_for_are_left(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    edit_weights(tmp_path, {"model.layers.7.norm.weight": torch.ones(3)})
    assert load(tmp_path).vocab_size == VOCAB


@pytest.mark.parametrize("length", [0, 5, 100, 5_000, -1])
def test_a_damaged_weight_file_is_named(length: int, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(LoadError, match=r"model.safetensors is no whole safetensors file: .*copy or download it again"):
        load(tmp_path)
    with pytest.raises(LoadError, match="is no whole safetensors file"):
        resolve_dtype("auto", tiny_config_without_dtype(), torch.device("cuda"), [path])
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(LoadError, match="run git lfs pull"):
        load(tmp_path)


def tiny_config_without_dtype() -> Any:
    config = tiny_config("llama")
    config.dtype = None
    return config


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "cannot be read: "),
        ("[1]", "has no weight_map"),
        ('{"metadata": {}, "weight_map": {}}', "has no weight_map"),
        ('{"metadata": {}, "weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"a": "b.safetensors"}}', 'add "metadata": {}'),
        ('{"metadata": {}, "weight_map": {"a": "../b.safetensors"}}', r"names '\.\./b.safetensors'"),
        ('{"metadata": {}, "weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd'"),
        ('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}', r"lacks 1 of the 1 files .*\(b.safetensors\)"),
    ],
)
def test_indexes_of_shards_that_are_refused(text: str, named: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    load(tmp_path)  # of a file with everything, which transformers prefers as well
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=named):
        load(tmp_path)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no such folder: /nowhere/at/all"):
        load("/nowhere/at/all")
    with pytest.raises(LoadError, match=r"holds no config.json"):
        load(tmp_path)
    with pytest.raises(LoadError, match=r"OWNER/NAME.*HF_HUB_OFFLINE"):
        load("nobody/no-such-model")
    (tmp_path / "Llama-3-8B").mkdir()
    with pytest.raises(LoadError) as missing:
        load(tmp_path / "Lama-3-8B")
    assert str(missing.value) == f"no such folder: {tmp_path}/Lama-3-8B; did you mean {tmp_path}/Llama-3-8B?"
    for name in ("~no.such.user/model", str(tmp_path / ("m" * 300))):
        with pytest.raises(LoadError, match=f"--model {name} cannot be looked up: "):
            load(name)
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"lacks model.safetensors; convert"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(LoadError, match=r"found pytorch_model.bin"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(LoadError, match="no_such_type"):
        load(tmp_path)


def test_a_hub_id_is_served_from_the_cache_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / commit
    save_tiny("llama", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load("someone/tiny").vocab_size == VOCAB
    assert "tokenizer.json" in tokenizer_files(ModelSource("someone/tiny"))
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"someone/tiny lacks model.safetensors"):
        load("someone/tiny")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "'chunked_attention'"),
        ({"attention_chunk_size": 128}, "attention_chunk_size"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(LoadError, match=named):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"use_cache": 1.5}, "use_cache"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"quantization_config": [7]}, "its config cannot be read"),
        ({"architectures": 7}, "its architectures are no list of names: 7"),
        ({"architectures": {"a": 1}}, "its architectures are no list of names"),
        ({"model_type": ["llama"], "auto_map": {"AutoConfig": "own.Config"}}, "trust-remote-code"),
        ({"num_key_value_heads": 0}, "its weights cannot be loaded"),
        ({"head_dim": 0}, "its weights cannot be loaded"),
        ({"vocab_size": -1}, "its weights cannot be loaded"),
        ({"num_hidden_layers": 0}, "has 0 layers by its config"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "its config has a value that cannot be"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": -1}, "has a window of -1 tokens"),
    ],
)
def test_configs_with_values_that_cannot_be(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(LoadError, match=named):
        load(tmp_path)


def tiny_of(kind: str, **changes: Any) -> Any:
    """A tiny config of a model type that is not supported."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return AutoConfig.for_model(kind, **{**sizes, **heads, **changes})


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("t5", {"num_layers": 2}, "encoder-decoder"),
        ("bert", {}, r"BertSelfAttention \(layer 0\) is not causal"),
        ("rwkv", {}, "has 2 layers, but 0 of them call transformers' attention registry"),
        ("stablelm", {}, "StableLmAttention does not pass keyword arguments"),
        ("falcon", {}, "attention classes of its own"),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 2}, r"'s_aux' \(attention sinks\)"),
        ("gemma3", {}, "multimodal"),
        ("qwen3_next", {}, "'linear_attention'"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "'conv'"),
    ],
)
def test_models_that_are_refused(kind: str, changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    config = tiny_of(kind, **changes)
    config.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=named):
        dummy(tmp_path, 0)


def test_state_between_steps_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that mixes neighbouring tokens without the registry: right in one forward pass, wrong in chunks."""
    save_tiny("llama", tmp_path)
    forward = LlamaMLP.forward

    def mixing(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = forward(  # type: ignore[no-untyped-call]
            self, x + torch.nn.functional.pad(x, (0, 0, 1, 0))[..., :-1, :]
        )
        return out

    monkeypatch.setattr(LlamaMLP, "forward", mixing)
    with pytest.raises(LoadError, match="keeps state between steps"):
        load(tmp_path)


@pytest.mark.parametrize("positions", [0, -4])
def test_a_config_without_a_context_length(positions: int, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    edit_config(tmp_path, max_position_embeddings=positions)
    with pytest.raises(LoadError, match="does not say how long a sequence may be; give --max-model-len"):
        choose_max_model_len(WorkerConfig(scheduler="ipc:///x", model="m"), load(tmp_path))


def test_flashinfer_where_it_cannot_be_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(LoadError, match="'flashinfer' cannot be used: it needs a CUDA device, not cpu"):
        load(tmp_path, attention_backend="flashinfer")
    assert load(tmp_path).attention_backend == "reference"


def test_tokenizer_files_are_read_and_other_formats_converted(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    source = ModelSource(str(tmp_path))
    files = tokenizer_files(source)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= set(files)
    assert files["chat_template.jinja"] == b"{{ messages }}"
    assert Tokenizer.from_str(files["tokenizer.json"].decode()).encode("abc").ids == tiny_tokenizer().encode("abc").ids
    (tmp_path / "tokenizer.json").unlink()
    vocab = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>"}')
    converted = Tokenizer.from_str(tokenizer_files(source)["tokenizer.json"].decode())
    assert converted.encode("abb").tokens == ["ab", "b"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"chat_template": [1]}'])
def test_a_chat_template_file_that_holds_none_is_refused(text: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    (tmp_path / "chat_template.json").write_text(text)
    with pytest.raises(LoadError, match="chat_template.json cannot be used: .*; mend or remove it"):
        tokenizer_files(ModelSource(str(tmp_path)))


def test_a_tokenizer_that_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"not a sentencepiece model")
    with pytest.raises(LoadError, match=r"its tokenizer \(tokenizer.model\).*save the tokenizer as tokenizer.json"):
        tokenizer_files(ModelSource(str(tmp_path)))
