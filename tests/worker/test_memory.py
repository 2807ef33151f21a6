"""What a step reads of a model's weights."""

from pathlib import Path

import pytest

from tandem.worker.memory import copy_bandwidth, weight_bytes_per_step

from support.paged import load_tiny


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_step_reads_all_weights_but_rows_of_an_embedding_that_the_head_does_not_use(
    arch: str, tmp_path: Path
) -> None:
    model, own = load_tiny(arch, tmp_path)
    tied = own.config.tie_word_embeddings
    assert tied == (arch == "qwen2")
    parameters = dict(own.named_parameters())  # which names a shared one once
    names = [name for name in parameters if tied or not name.endswith("embed_tokens.weight")]
    assert weight_bytes_per_step(model) == sum(parameters[name].nbytes for name in names)
    assert copy_bandwidth(model.device) == 0
