"""Models of published sizes without weights."""

import json
from pathlib import Path

import pytest

from vllm_agentserve import shapes
from vllm_agentserve.cli import main
from vllm_agentserve.shapes import SHAPES, ModelShape, make_shaped_model, weight_bytes


def test_a_shape_is_a_configuration_and_a_tokenizer_with_a_text_for_every_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer

    assert main(["toy-model", "--shape", "qwen2.5-0.5b", "--output", str(tmp_path)]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == tmp_path / "qwen2.5-0.5b"
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 151936
    assert tokenizer.decode([config["vocab_size"] - 1])
    written = [(folder / name).stat().st_mtime_ns for name in ("config.json", "tokenizer.json")]
    assert make_shaped_model("qwen2.5-0.5b", tmp_path) == folder
    # An engine may read them just now.
    assert [(folder / name).stat().st_mtime_ns for name in ("config.json", "tokenizer.json")] == written


def test_an_unknown_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape '7b' is unknown: choose one of qwen2.5-7b, "):
        make_shaped_model("7b", tmp_path)
    assert not list(tmp_path.iterdir())


def test_shapes_have_about_the_parameters_of_their_names() -> None:
    parameters = {shape.name: weight_bytes(shape) / 2e9 for shape in SHAPES}
    assert parameters == pytest.approx(
        {"qwen2.5-7b": 7.6, "qwen2.5-3b": 3.1, "qwen2.5-1.5b": 1.5, "qwen2.5-0.5b": 0.49}, rel=0.03
    )


def test_weights_are_those_of_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.numpy import load_file

    small = ModelShape("small", 64, 128, 2, 4, 2, 4096, 0.0)
    monkeypatch.setattr(shapes, "SHAPES", (small,))
    folder = make_shaped_model("small", tmp_path, weights=True)
    weights = load_file(folder / "model.safetensors")
    inside = sum(one.size for name, one in weights.items() if "norm" not in name and "bias" not in name)
    assert 2 * inside == weight_bytes(small)
    assert weights["model.layers.1.self_attn.k_proj.weight"].shape == (32, 64)
    assert [one.name for one in folder.iterdir() if one.name.startswith("weights")] == []
