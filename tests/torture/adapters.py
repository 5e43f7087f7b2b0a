"""LoRA adapters of the toy model, with random weights that change what it answers.

In an episode with adapters every request has one: on CPU, vLLM 0.32 without our scheduler answers a request for the bare
model with the adapter of whoever is in its batch (alone it answers otherwise), so there is no answer to compare with.
"""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from vllm.lora.request import LoRARequest

from vllm_agentserve.toy import CONFIG

RANK = 8
STRENGTH = 0.5
"""How large the weights of an adapter are beside the model's own: without the tokens of a greedy answer may stay the same."""
ENGINE = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": RANK}
"""One at a time in a step: requests with another one are passed over, and wait."""


@cache
def adapter(number: int) -> LoRARequest:
    """The adapter of this number, from 1; made in a folder that is gone when the process ends."""
    import numpy as np
    from safetensors.numpy import save_file

    folder = Path(tempfile.mkdtemp(prefix=f"adapter-{number}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rng = np.random.default_rng(number)
    hidden = CONFIG["hidden_size"]
    key_value = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    weights = {}
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, rows in (("q_proj", hidden), ("v_proj", key_value), ("o_proj", hidden)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (RANK, hidden)), ("lora_B", (rows, RANK))):
                scale = np.float32(STRENGTH * shape[1] ** -0.5)
                weights[f"{prefix}.{part}.weight"] = rng.standard_normal(shape, dtype=np.float32) * scale
    save_file(weights, str(folder / "adapter_model.safetensors"))
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "bias": "none",
        "use_rslora": False,
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return LoRARequest(f"adapter-{number}", number, str(folder))
