"""FlexLLM: serve a language model under latency objectives and finetune adapters of it in the same batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexllm.core import SamplingParams
    from flexllm.llm import LLM
    from flexllm.peft.config import LoraConfig

__version__ = "0.1.0"
__all__ = ["LLM", "LoraConfig", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:  # lazy: `import flexllm` and the torch-free folders must not load torch
    if name == "LLM":
        from flexllm.llm import LLM

        return LLM
    if name == "LoraConfig":
        from flexllm.peft.config import LoraConfig

        return LoraConfig
    if name == "SamplingParams":
        from flexllm.core import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'flexllm' has no attribute {name!r}")
