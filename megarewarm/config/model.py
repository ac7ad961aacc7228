"""The schema of a model: its shape, and the parts that its layers are built from."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, model_validator

from megarewarm.config.budget import Share
from megarewarm.config.families import FAMILIES
from megarewarm.config.section import Positive, Section


class RotaryScaling(Section):
    """Slower rotary frequencies, for positions past those that a model was first trained on."""

    kind: Literal["linear", "llama3", "yarn"] = Field(
        description="linear: all frequencies divided by factor (arXiv 2306.15595); llama3: the long waves only (Llama 3.1); "
        "yarn: by a ramp over the channels (arXiv 2309.00071)."
    )
    factor: float = Field(gt=0, description="By how much the context is longer.")
    original_positions: Positive | None = Field(
        None, description="Positions of the model before it was extended; llama3 and yarn need them."
    )
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: waves longer than original_positions / this are divided.")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: waves shorter than original_positions / this stay.")
    beta_fast: float = Field(32.0, gt=0, description="yarn: channels that turn more often in original_positions stay.")
    beta_slow: float = Field(1.0, gt=0, description="yarn: channels that turn less often are divided.")
    attention_factor: float | None = Field(
        None, gt=0, description="yarn: cosines and sines are multiplied by it; null: 0.1 ln(factor) + 1, or from mscale."
    )
    mscale: float | None = Field(None, description="yarn: with mscale_all_dim, what attention_factor follows from.")
    mscale_all_dim: float | None = Field(None, description="yarn: see mscale.")
    truncate: bool = Field(True, description="yarn: the ramp begins and ends at whole channels.")

    @model_validator(mode="after")
    def _check(self) -> RotaryScaling:
        if self.kind != "linear" and self.original_positions is None:
            raise ValueError(f"kind '{self.kind}' needs 'original_positions'")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}")
        return self


class ContextConfig(Section):
    """Rotary positions of the start checkpoint's model, changed: a longer context while continuing. What is left out stays."""

    rotary_base: float | None = Field(None, gt=0, description="Base of the rotary frequencies; null: the checkpoint's.")
    rotary_scaling: RotaryScaling | None = Field(None, description="Rotary frequencies scaled; null: as in the checkpoint.")
    max_positions: Positive | None = Field(None, description="Longest sequence; null: the checkpoint's.")

    def applied(self, model: ModelConfig) -> ModelConfig:
        """``model`` with these positions. Raises ``ValueError``."""
        changes = {key: value for key in CONTEXT_KEYS if (value := getattr(self, key)) is not None}
        return ModelConfig.model_validate(model.model_dump() | changes)


CONTEXT_KEYS = tuple(ContextConfig.model_fields)


class ModelConfig(Section):
    """Shape of the model. With ``start.from`` naming a checkpoint, it must agree with the checkpoint."""

    family: Literal["neox", "llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3"] = Field(
        "neox", description="Presets the keys below that say nothing else, and is what the model is exported as."
    )
    num_layers: Positive = Field(description="Transformer layers.")
    hidden_size: Positive = Field(description="Width h of the residual stream.")
    num_heads: Positive = Field(description="Attention heads n; must divide hidden_size, or give head_dim.")
    num_kv_heads: Positive | None = Field(
        None, description="Heads of keys and values, each for num_heads / num_kv_heads queries; null: as many as num_heads."
    )
    head_dim: Positive | None = Field(None, description="Channels of a head; null: hidden_size / num_heads.")
    ffn_size: Positive | None = Field(None, description="Width of the MLP; null: 4 x hidden_size.")
    vocab_size: Positive = Field(description="Rows of the embedding and of the head; every token id must be below it.")
    max_positions: Positive = Field(2048, description="Longest sequence the model is meant for.")
    rotary_fraction: Share = Field(0.25, ge=0, le=1, description="Share of each head's channels that are rotated.")
    rotary_base: float = Field(10000.0, gt=0, description="Base of the rotary frequencies.")
    rotary_scaling: RotaryScaling | None = Field(None, description="Rotary frequencies of an extended context; null: none.")
    unrotated_layers: tuple[int, ...] = Field((), description="Layers, from 0, whose queries and keys are not rotated.")
    sliding_window: Positive | None = Field(
        None, description="Positions that each one attends to, itself included; null: all earlier ones."
    )
    window_layers: tuple[int, ...] | None = Field(
        None, description="Layers, from 0, that sliding_window holds for; null: all of them."
    )
    norm: Literal["layer", "rms"] = Field("layer", description="LayerNorm or RMSNorm, everywhere.")
    norm_place: Literal["before", "after"] = Field(
        "before", description="before: x + f(norm(x)); after: x + norm(f(x)), as OLMo 2."
    )
    qk_norm: Literal["none", "head", "width"] = Field(
        "none", description="RMSNorm of queries and keys: of each head (Qwen 3), or of all heads together (OLMo 2)."
    )
    activation: Literal["gelu_tanh", "gelu_erf", "swiglu"] = Field(
        "gelu_tanh",
        description="gelu_tanh is what GPT-NeoX trained Pythia with (bias_gelu_fusion); gelu_erf is what Hugging Face's "
        "Pythia configs say; swiglu: silu(gate) x up, with a matrix for each.",
    )
    residual: Literal["parallel", "sequential"] = Field(
        "parallel", description="parallel: x + attention(norm1(x)) + mlp(norm2(x)), as Pythia; sequential: as GPT-2."
    )
    tie_embeddings: bool = Field(False, description="Use the embedding matrix as the head too.")
    attention_bias: bool = Field(True, description="Biases on the QKV and attention output projections.")
    output_bias: bool | None = Field(
        None, description="A bias on the attention output projection; null: as attention_bias. Qwen 2 has none there."
    )
    mlp_bias: bool = Field(True, description="Biases in the MLP.")
    layernorm_eps: float = Field(1e-5, gt=0, description="Epsilon of every norm.")
    init: Literal["small", "normal"] = Field(
        "small", description="Input-side weights: small = N(0, sqrt(2/(5h))) (Pythia), normal = N(0, init_std)."
    )
    output_init: Literal["wang", "scaled_normal", "normal"] = Field(
        "wang",
        description="Weights that write to the residual stream: wang = N(0, 2/(L sqrt(h))) (Pythia), "
        "scaled_normal = N(0, init_std/sqrt(2L)), normal = N(0, init_std).",
    )
    init_std: float = Field(0.02, gt=0, description="Standard deviation of the normal initialisations.")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        family = FAMILIES.get(values.get("family", "neox")) if isinstance(values, dict) else None
        return family.presets | values if family is not None and values.get("family") != "neox" else values

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        for key, allowed in FAMILIES[self.family].parts.items():
            if (value := getattr(self, key)) not in allowed:
                expected = " or ".join(_shown(each) for each in allowed)
                raise ValueError(
                    f"{key} is {_shown(value)}, expected {expected} in the family '{self.family}': leave {key} out, or name "
                    f"another family"
                )
        if self.hidden_size % self.num_heads and (self.head_dim is None or FAMILIES[self.family].heads_divide):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}: change one of them"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.kv_heads}: change one of them")
        if self.rotary_dims % 2:
            raise ValueError(
                f"rotary_fraction {self.rotary_fraction} of a head of {self.head_width} channels rotates "
                f"{self.rotary_dims} of them; the number must be even"
            )
        for key in ("window_layers", "unrotated_layers"):
            if wrong := [layer for layer in getattr(self, key) or () if not 0 <= layer < self.num_layers]:
                raise ValueError(f"{key}: there is no layer {wrong[0]}; they are counted from 0 to {self.num_layers - 1}")
        if self.window_layers is not None and self.sliding_window is None:
            raise ValueError("window_layers needs 'sliding_window', the positions that these layers attend to")
        return self

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def queries_per_key(self) -> int:
        return self.num_heads // self.kv_heads

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def rotary_dims(self) -> int:
        """Rotated channels of a head."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def mlp_size(self) -> int:
        return self.ffn_size or 4 * self.hidden_size

    @property
    def attention_output_bias(self) -> bool:
        return self.attention_bias if self.output_bias is None else self.output_bias

    def window_of(self, layer: int) -> int | None:
        """Positions that each one of layer ``layer`` attends to; None for all earlier ones."""
        return self.sliding_window if self.window_layers is None or layer in self.window_layers else None


def _shown(value: Any) -> str:
    """As in YAML."""
    return json.dumps(value)
