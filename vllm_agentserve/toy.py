"""A small Qwen2-shaped model with random weights and a tokenizer trained here, for machines without a model hub.

vLLM loads it through its real loading path. Random weights still give deterministic greedy tokens, and with
grammar-constrained tool calls they give real agent loops. The answers mean nothing; the timing and the scheduling do.
"""

import hashlib
import inspect
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
COMMON_LENGTH = 30.0
"""Length of the common direction; the layers add about 70 to a token's own length of 1."""
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% if messages and messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call> to call one.<|im_end|>
{% elif messages and messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role != 'system' or not loop.first %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% endif %}
{%- if message.tool_calls %}{% for call in message.tool_calls %}<tool_call>{"name": "{{ call.function.name }}", \
"arguments": {{ call.function.arguments | tojson }}}</tool_call>
{% endfor %}{% endif %}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def corpus(seed: int) -> Iterator[str]:
    """Yields the text the tokenizer is trained on: invented words, plain English glue, and JSON tool calls."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ar", "en", "il", "or", "un")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(3000)]
    glue = [
        "the",
        "a",
        "of",
        "to",
        "in",
        "is",
        "and",
        "that",
        "for",
        "it",
        "with",
        "as",
        "on",
        "be",
        "this",
        "was",
        "by",
        "are",
        "at",
        "from",
        "have",
        "an",
        "not",
        "or",
        "which",
    ]
    for line in range(6000):
        picked = [rng.choice(glue if rng.random() < 0.4 else words) for _ in range(rng.randint(6, 18))]
        yield " ".join(picked).capitalize() + rng.choice(".?!:")
        if line % 8 == 0:
            call = {
                "name": rng.choice(("search", "read_file", "calculate")),
                "arguments": {"query": " ".join(picked[:3])},
            }
            yield "<tool_call>" + json.dumps(call) + "</tool_call>"
            yield json.dumps({"result": rng.randint(0, 10**6), "ok": True, "text": picked[-1]}, indent=2)


def write_tokenizer(folder: Path, seed: int, size: int = VOCABULARY) -> None:
    """Trains a byte-level BPE of exactly `VOCABULARY` entries and writes it in the `tokenizers` format.

    Args:
        folder: where.
        seed: of the text that it is trained on.
        size: tokens that it is to have. Those above `VOCABULARY` are in no text: a larger model may answer with them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"the toy corpus gives {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}: enlarge it")
    tokenizer.add_tokens([f"unused{number}" for number in range(VOCABULARY, size)])
    tokenizer.save(str(folder / "tokenizer.json"))
    end_of_text, start, end = SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": end,
        "pad_token": end_of_text,
        "additional_special_tokens": [start, end],
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def blank_tokens(folder: Path) -> list[int]:
    """The ids of the tokens that are nothing but white space, in the byte-level alphabet of the tokenizer."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return [number for token, number in vocabulary.items() if token and not token.strip("ĠĊĉč")]


def write_weights(folder: Path, seed: int) -> None:
    """Writes normally distributed float32 weights, each tensor scaled by 1/sqrt(fan-in).

    One thing is not left to chance. Grammars for JSON allow white space without end, and random weights would fall for it:
    a direction common to all embeddings survives to the last layer, and the output rows of blank tokens point against it.
    """
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    key_value = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(columns**-0.5)

    ones = np.ones(hidden, dtype=np.float32)
    weights = {"model.embed_tokens.weight": matrix(VOCABULARY, hidden), "lm_head.weight": matrix(VOCABULARY, hidden)}
    common = matrix(1, hidden)[0]
    weights["model.embed_tokens.weight"] += COMMON_LENGTH * common
    weights["lm_head.weight"][blank_tokens(folder)] = -common
    weights["model.norm.weight"] = ones
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = ones
        weights[prefix + "post_attention_layernorm.weight"] = ones
        for name, rows in (("q_proj", hidden), ("k_proj", key_value), ("v_proj", key_value)):
            weights[f"{prefix}self_attn.{name}.weight"] = matrix(rows, hidden)
            weights[f"{prefix}self_attn.{name}.bias"] = np.zeros(rows, dtype=np.float32)
        weights[prefix + "self_attn.o_proj.weight"] = matrix(hidden, hidden)
        weights[prefix + "mlp.gate_proj.weight"] = matrix(inner, hidden)
        weights[prefix + "mlp.up_proj.weight"] = matrix(inner, hidden)
        weights[prefix + "mlp.down_proj.weight"] = matrix(hidden, inner)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_agentserve"


def make_toy_model(folder: Path | None = None, seed: int = 0) -> Path:
    """Returns the folder of the toy model, making it first where it is not there yet (about 5 s, 66 MB).

    The default folder is in the user's cache and named after the recipe, so another recipe never meets old files.
    """
    if folder is None:
        recipe = inspect.getsource(sys.modules[__name__]) + str(seed)
        folder = cache_folder() / f"toy-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if (folder / "model.safetensors").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        (work / "config.json").write_text(json.dumps(CONFIG, indent=2))
        write_tokenizer(work, seed)
        write_weights(work, seed)
        folder.mkdir(exist_ok=True)
        for file in sorted(work.iterdir(), key=lambda path: path.name == "model.safetensors"):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder
