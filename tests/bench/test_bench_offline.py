"""`tandem bench offline` on systems that it starts itself."""

import json
from pathlib import Path
from typing import Any


def test_offline_starts_a_system_for_each_lookahead(tmp_path: Path, bench: Any) -> None:
    out = tmp_path / "offline.json"
    config = tmp_path / "system.yaml"
    config.write_text("max-num-seqs: 4\nthreads: 1\ndevice: cpu\n")
    code, shown, err = bench(
        *("offline", "--workload", "ragged", "--num-prompts", "6", "--prompt-tokens", "4-20", "--output-tokens", "3-9"),
        *("--num-warmups", "2", "--config", str(config), "--client-processes", "2", "--no-enable-prefix-caching"),
        *("--lookahead", "0", "--lookahead", "2", "--out", str(out)),
    )
    assert code == 0, err
    assert "lookahead" in shown
    report = json.loads(out.read_text())
    assert report["system"]["worker"]["max_num_seqs"] == 4
    assert "lookahead" not in report["system"]["worker"]
    assert report["system"]["scheduler"]["enable_prefix_caching"] is False
    assert report["machine"]["cores"] > 0
    assert [result["lookahead"] for result in report["results"]] == [0, 2]
    tokens = {result["median"]["output_tokens"] for result in report["results"]}
    assert len(tokens) == 1
    for result in report["results"]:
        (run,) = result["runs"]
        assert run["failures"] == {}
        assert len(run["client_cpu_share"]) == 2
        figures = run["figures"]
        assert (figures["completed"], figures["failed"], figures["cached_tokens"]) == (6, 0, 0)
        assert 6 * 3 <= figures["output_tokens"] <= 6 * 9
        assert figures["steps"] > 0
        assert 0 <= figures["idle_share"] <= 1
