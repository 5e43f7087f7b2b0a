"""Models of published sizes with random weights, where the toy model is too small to say something of a real one."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_agentserve.toy import cache_folder, write_tokenizer


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder by its sizes.

    Args:
        least_gib: free GPU memory from which on it is chosen; weights in bf16, a KV cache and room for lanes.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    least_gib: float


SHAPES = (
    ModelShape("qwen2.5-7b", 3584, 18944, 28, 28, 4, 152064, 30.0),
    ModelShape("qwen2.5-3b", 2048, 11008, 36, 16, 2, 151936, 15.0),
    ModelShape("qwen2.5-1.5b", 1536, 8960, 28, 12, 2, 151936, 9.0),
    ModelShape("qwen2.5-0.5b", 896, 4864, 24, 14, 2, 151936, 0.0),
)
"""Sizes of the published models, the largest first."""
UNTIED_HIDDEN = 3584
"""From this hidden size on a model has two embedding matrices."""
WEIGHTS = "model.safetensors"
TOY = ModelShape("toy", 384, 1536, 6, 6, 2, 4096, 0.0)


def shape_for(free_gib: float | None) -> ModelShape:
    """The largest shape for so much free GPU memory; the toy without a GPU."""
    if free_gib is None:
        return TOY
    return next(shape for shape in SHAPES if free_gib >= shape.least_gib)


def kv_cache_bytes(free_gib: float | None) -> int:
    """The same KV cache for every arm: 2 GiB without a GPU, else a fifth of its free memory, from 1 to 8 GiB."""
    return 2 << 30 if free_gib is None else int(min(max(free_gib / 5, 1.0), 8.0) * 2**30)


def kv_block_bytes(shape: ModelShape, block: int) -> int:
    """The size of a block of so many tokens in a KV cache in bfloat16."""
    values = 2 * shape.layers * shape.kv_heads * shape.hidden // shape.heads
    return 2 * values * block


def kv_cache_blocks(shape: ModelShape, size: int, block: int) -> int:
    """How many blocks of so many tokens a KV cache of `size` bytes in bfloat16 has."""
    return size // kv_block_bytes(shape, block)


def weight_bytes(shape: ModelShape) -> int:
    """The size of the weights in bfloat16; small models use one matrix for both embeddings."""
    inside = 2 * shape.hidden + 2 * (shape.hidden // shape.heads) * shape.kv_heads
    embeddings = (1 if shape.hidden < UNTIED_HIDDEN else 2) * shape.vocabulary * shape.hidden
    return 2 * (embeddings + shape.layers * shape.hidden * (inside + 3 * shape.inner))


def write_config(shape: ModelShape, folder: Path) -> Path:
    """Writes the configuration of a model without weights, for vLLM's `--load-format dummy`; returns its folder."""
    model = folder / shape.name
    model.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": shape.hidden < UNTIED_HIDDEN,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    written, text = model / "config.json", json.dumps(config, indent=1)
    if not written.exists() or written.read_text() != text:
        # Whole, or as it was: an engine may read it just now.
        work = model / f"config.{os.getpid()}"
        work.write_text(text)
        work.replace(written)
    return model


def write_weights(shape: ModelShape, folder: Path, seed: int = 0) -> None:
    """Writes normally distributed weights in float16, each matrix scaled by 1/sqrt(fan-in)."""
    import numpy as np
    from safetensors.numpy import save_file

    dice = np.random.default_rng(seed)
    hidden, keys = shape.hidden, shape.hidden // shape.heads * shape.kv_heads

    def matrix(rows: int, columns: int) -> "np.ndarray[Any, np.dtype[np.float16]]":
        values = dice.standard_normal((rows, columns), dtype=np.float32) * np.float32(columns**-0.5)
        return values.astype(np.float16)

    ones = np.ones(hidden, dtype=np.float16)
    weights = {"model.embed_tokens.weight": matrix(shape.vocabulary, hidden), "model.norm.weight": ones}
    if hidden >= UNTIED_HIDDEN:
        weights["lm_head.weight"] = matrix(shape.vocabulary, hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = weights[prefix + "post_attention_layernorm.weight"] = ones
        for name, rows in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys)):
            weights[f"{prefix}self_attn.{name}.weight"] = matrix(rows, hidden)
            weights[f"{prefix}self_attn.{name}.bias"] = np.zeros(rows, dtype=np.float16)
        weights[prefix + "self_attn.o_proj.weight"] = matrix(hidden, hidden)
        weights[prefix + "mlp.gate_proj.weight"] = matrix(shape.inner, hidden)
        weights[prefix + "mlp.up_proj.weight"] = matrix(shape.inner, hidden)
        weights[prefix + "mlp.down_proj.weight"] = matrix(hidden, shape.inner)
    # Whole, or not there: the name is what says that there are weights.
    work = folder / f"weights.{os.getpid()}"
    save_file(weights, str(work), metadata={"format": "pt"})
    work.replace(folder / WEIGHTS)


def make_shaped_model(name: str, folder: Path | None = None, weights: bool = False) -> Path:
    """Returns the folder of a model for `vllm serve --load-format dummy`: its configuration and the toy model's tokenizer.

    Args:
        name: of one of `SHAPES`.
        folder: the folder that it is made in, under its name; by default the user's cache.
        weights: whether it gets random weights, 2 bytes a parameter. It then needs no `--load-format`, and other servers can
            read it.

    Raises:
        ValueError: there is no shape of that name.
    """
    shape = next((one for one in SHAPES if one.name == name), None)
    if shape is None:
        raise ValueError(f"shape {name!r} is unknown: choose one of {', '.join(one.name for one in SHAPES)}")
    model = write_config(shape, folder or cache_folder())
    if not (model / "tokenizer_config.json").exists():
        write_tokenizer(model, seed=0, size=shape.vocabulary)
    if weights and not (model / WEIGHTS).exists():
        write_weights(shape, model)
    return model
