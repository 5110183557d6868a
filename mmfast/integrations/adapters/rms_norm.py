"""RMSNorm in one pass, for the classes of decoders that write it out in five.

`[4, 512, 1024]` float32 took 14.6 ms as it is written out, most of it page faults of temporaries,
and 1.1 ms so; one row of 1024 0.024 and 0.016 ms (one core, AVX-512).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmfast.integrations.adapters.decoders import address
from mmfast.integrations.registry import Adapter, adapter
from mmfast.ops.modulate import modulate

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# weight * x / sqrt(mean(x^2) + variance_epsilon)
_PLAIN = {
    "aimv2": "Aimv2RMSNorm", "arcee": "ArceeRMSNorm", "aria": "AriaTextRMSNorm",
    "chameleon": "ChameleonRMSNorm", "csm": "CsmRMSNorm", "deepseek_v2": "DeepseekV2RMSNorm",
    "deepseek_v3": "DeepseekV3RMSNorm", "dia": "DiaRMSNorm", "emu3": "Emu3RMSNorm",
    "ernie4_5": "Ernie4_5RMSNorm", "evolla": "EvollaRMSNorm", "exaone4": "Exaone4RMSNorm",
    "glm": "GlmRMSNorm", "glm4": "Glm4RMSNorm", "glm4v": "Glm4vRMSNorm",
    "granite": "GraniteRMSNorm", "idefics2": "Idefics2RMSNorm", "idefics3": "Idefics3RMSNorm",
    "internvl": "InternVLVisionRMSNorm", "llama": "LlamaRMSNorm", "mistral": "MistralRMSNorm",
    "mistral3": "Mistral3RMSNorm", "mixtral": "MixtralRMSNorm", "mllama": "MllamaTextRMSNorm",
    "ovis2": "Ovis2RMSNorm", "phi3": "Phi3RMSNorm", "pixtral": "PixtralRMSNorm",
    "qwen2": "Qwen2RMSNorm", "qwen2_5_vl": "Qwen2_5_VLRMSNorm",
    "qwen2_5_omni": "Qwen2_5OmniRMSNorm", "qwen2_vl": "Qwen2VLRMSNorm", "qwen3": "Qwen3RMSNorm",
    "qwen3_moe": "Qwen3MoeRMSNorm", "qwen3_vl": "Qwen3VLTextRMSNorm", "smollm3": "SmolLM3RMSNorm",
}  # fmt: skip
# Written the other way round for 16 bits, with the same result in float32.
_LIKE_T5 = {"idefics": "IdeficsRMSNorm"}
# weight * x / sqrt(mean(x^2) + eps)
_LLAMA4 = {"llama4": "Llama4TextRMSNorm"}
# (1 + weight) * x / sqrt(mean(x^2) + eps)
_ONE_PLUS = {
    "gemma": "GemmaRMSNorm", "gemma2": "Gemma2RMSNorm", "gemma3": "Gemma3RMSNorm",
    "qwen3_next": "Qwen3NextRMSNorm", "t5gemma": "T5GemmaRMSNorm",
}  # fmt: skip


def _addresses(names: dict[str, str]) -> list[str]:
    return [address(folder, name) for folder, name in names.items()]


class _Norm(Adapter):
    """`weight`, and one of two names for the number under the root."""

    weight: nn.Parameter

    def _takes(self, x: Any) -> bool:
        """One dtype for all, and no compiler, which fuses the passes by itself."""
        return (
            type(x) is Tensor
            and x.dtype == self.weight.dtype
            and x.dtype in _FLOATS
            and not torch.compiler.is_compiling()
        )


@adapter(*_addresses(_PLAIN), *_addresses(_LIKE_T5), kind="norm")
class RmsNorm(_Norm):
    """`weight * x / sqrt(mean(x^2) + variance_epsilon)`"""

    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C]`"""
        if not self._takes(hidden_states):
            return super().forward(hidden_states)
        out: Tensor = modulate(
            hidden_states, norm="rms", weight=self.weight, eps=self.variance_epsilon
        )
        return out


@adapter(*_addresses(_LLAMA4), kind="norm")
class Llama4RmsNorm(_Norm):
    """`weight * x / sqrt(mean(x^2) + eps)`"""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C]`"""
        if not self._takes(x):
            return super().forward(x)
        out: Tensor = modulate(x, norm="rms", weight=self.weight, eps=self.eps)
        return out


@adapter(*_addresses(_ONE_PLUS), kind="norm")
class OnePlusRmsNorm(_Norm):
    """`(1 + weight) * x / sqrt(mean(x^2) + eps)`"""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C]`"""
        if not self._takes(x):
            return super().forward(x)
        out: Tensor = modulate(x, self.weight, norm="rms", eps=self.eps)
        return out
