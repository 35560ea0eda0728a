import json

import pytest

from vflora.bench.attention import BenchAttentionConfig, run
from vflora.cli import main
from vflora.errors import UserError

SMALL = {"tokens": [65, 33], "heads": 2, "head_dim": 16, "dtype": "fp32", "device": "cpu", "repeats": 1}


def test_every_kernel_has_its_errors_and_times_or_the_reason_why_not(tmp_path, capsys):
    output = tmp_path / "new" / "attention.json"
    rows = run(BenchAttentionConfig(**SMALL, output=output))
    assert json.loads(output.read_text())["rows"] == rows
    assert [(row["tokens"], row["kernel"]) for row in rows[:2]] == [(65, "native"), (65, "flash")]
    found = {row["kernel"]: row for row in rows if row["tokens"] == 33}
    for kernel in ("native", "flash"):
        assert found[kernel]["gradient of the keys"] < 1e-5
        assert found[kernel]["backward_ms"] > 0
    assert "failed" in found["cudnn"], "cuDNN needs a GPU"
    assert "forward_ms" not in found["cudnn"]


def test_the_table_names_what_does_not_run(capsys):
    flags = ["--heads", "1", "--head_dim", "8", "--tokens", "17", "--repeats", "1", "--device", "cpu"]
    assert main(["bench", "attention", *flags, "--kernels", "native", "cudnn"]) == 0
    shown = capsys.readouterr().out
    assert "cudnn            17  does not run here" in shown


def test_an_unknown_kernel_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="--kernels fast .* native flash cudnn efficient"):
        BenchAttentionConfig(kernels=["native", "fast"])
