"""All methods of this package: importing it makes them known (peft/base.py finds a method when its class exists)."""

from flexllm.peft.bottleneck import Bottleneck
from flexllm.peft.ia3 import Ia3
from flexllm.peft.lora import Lora
from flexllm.peft.vera import Vera
from flexllm.peft.virtual import PrefixTuning, PromptTuning

__all__ = ["Bottleneck", "Ia3", "Lora", "PrefixTuning", "PromptTuning", "Vera"]
