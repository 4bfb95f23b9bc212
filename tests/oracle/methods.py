"""One adapter configuration of each kind, small enough for tiny models."""

from flexllm.peft.config import BottleneckConfig, Ia3Config, LoraConfig, PrefixConfig, PromptConfig, VeraConfig

METHODS = {
    "lora": LoraConfig(r=4, lora_alpha=9),
    "rslora-some": LoraConfig(r=3, use_rslora=True, target_modules=("q_proj", "v_proj", "down_proj")),
    "lora-patterns": LoraConfig(
        r=4, rank_pattern={"q_proj": 6, r"layers\.1\.mlp\.down_proj": 2}, alpha_pattern={"o_proj": 5.0, r"layers\.2\..*_proj": 3.0}
    ),
    "lora-upper-layers": LoraConfig(r=3, layers_to_transform=(1, 2)),
    "lora-one-layer": LoraConfig(r=3, target_modules=("gate_proj",), layers_to_transform=(1,)),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True),
    "dora-some": LoraConfig(r=2, use_dora=True, target_modules=("k_proj", "o_proj", "up_proj")),
    "ia3": Ia3Config(),
    "ia3-all": Ia3Config(
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        feedforward_modules=("o_proj", "down_proj"),
    ),
    "vera": VeraConfig(r=6),
    "bottleneck": BottleneckConfig(bottleneck=5),
    "bottleneck-silu": BottleneckConfig(bottleneck=4, non_linearity="silu", scaling=2.0, target_modules=("mlp",)),
    "bottleneck-parallel": BottleneckConfig(bottleneck=5, is_parallel=True, scaling=0.5),
    "prefix": PrefixConfig(num_virtual_tokens=7),
    "prompt": PromptConfig(num_virtual_tokens=5),
}
