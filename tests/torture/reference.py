"""What the KV cache has to hold, computed by other means than vLLM's: the toy model as a few lines of PyTorch in float32."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu


class Reference:
    """One sequence at a time, no cache of its own. `tests/torture/test_contents.py` holds it against stock vLLM.

    Args:
        folder: of the model (`vllm_agentserve.toy`): Qwen2 without biases that are not zero.
    """

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config["num_key_value_heads"]
        self.head_size: int = config["hidden_size"] // self.heads
        self._eps: float = config["rms_norm_eps"]
        self._weights = load_file(folder / "model.safetensors")
        self._frequencies = config["rope_theta"] ** (-torch.arange(0, self.head_size, 2).float() / self.head_size)

    def empty(self) -> Tensor:
        """The KV of no token: what a sequence begins with."""
        return torch.empty(self.layers, 2, 0, self.kv_heads, self.head_size)

    @torch.inference_mode()
    def extend(self, past: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Computes tokens that follow others.

        Args:
            past: KV of all tokens before, shape (layers, 2, tokens, KV heads, head size); keys are rotated.
            tokens: at least one.

        Returns:
            Their KV, of the same shape, and their last hidden states, which `logits` takes.
        """
        before, count = past.shape[2], len(tokens)
        turned = torch.arange(before, before + count).float()[:, None] * self._frequencies
        cos, sin = turned.cos()[:, None], turned.sin()[:, None]
        mask = torch.ones(count, before + count, dtype=torch.bool).tril(before)
        made = torch.empty(self.layers, 2, count, self.kv_heads, self.head_size)
        hidden = self._weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            normed = self._norm(hidden, prefix + "input_layernorm.weight")
            query = _rotated(
                self._matrix(normed, prefix + "self_attn.q_proj").view(count, -1, self.head_size), cos, sin
            )
            key = _rotated(self._matrix(normed, prefix + "self_attn.k_proj").view(count, -1, self.head_size), cos, sin)
            made[layer, 0] = key
            made[layer, 1] = self._matrix(normed, prefix + "self_attn.v_proj").view(count, -1, self.head_size)
            keys, values = torch.cat((past[layer], made[layer]), dim=1).transpose(1, 2)
            seen = scaled_dot_product_attention(query.transpose(0, 1), keys, values, mask, enable_gqa=True)
            hidden = hidden + self._matrix(seen.transpose(0, 1).flatten(1), prefix + "self_attn.o_proj")
            normed = self._norm(hidden, prefix + "post_attention_layernorm.weight")
            gate, up = (self._matrix(normed, f"{prefix}mlp.{name}_proj") for name in ("gate", "up"))
            hidden = hidden + self._matrix(silu(gate) * up, prefix + "mlp.down_proj")
        return made, hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """What is sampled from after each of these tokens, shape (tokens, vocabulary)."""
        return self._norm(hidden, "model.norm.weight") @ self._weights["lm_head.weight"].T

    def _matrix(self, rows: Tensor, name: str) -> Tensor:
        return rows @ self._weights[name + ".weight"].T

    def _norm(self, rows: Tensor, name: str) -> Tensor:
        return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self._eps) * self._weights[name]


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; heads of shape (tokens, heads, head size)."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
