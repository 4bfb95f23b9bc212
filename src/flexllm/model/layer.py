"""The decoder layer, written once, as a plain function of operators.

Covers Llama 2/3/3.1, Mistral, Qwen2 (QKV bias), Qwen3 (QK norm) and SmolLM2. The compiler traces it with the bypass
networks attached to its *sites*, which carry the Hugging Face module names; what runs is what the compiler emits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch.fx import Proxy

from flexllm.model.config import ModelConfig
from flexllm.ops.operators import add, attend, head_rms_norm, linear, rms_norm, rope, split, swiglu

SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def site_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the base linear at each site."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "q_proj": (q, d),
        "k_proj": (kv, d),
        "v_proj": (kv, d),
        "o_proj": (d, q),
        "gate_proj": (f, d),
        "up_proj": (f, d),
        "down_proj": (d, f),
    }


class Tables(Protocol):
    """Per-row tables of the batch."""

    cos: Any
    sin: Any


def tag(name: str, value: Proxy) -> Proxy:
    """Give a value the name under which it can be saved. A value that an identity site passes on may have several."""
    value.node.meta.setdefault("names", []).append(name)
    return value


def decoder_layer(x: Proxy, w: Any, tables: Tables, site: Callable[[str, Proxy, Proxy], Proxy], config: ModelConfig) -> Proxy:
    """x [N, d] -> [N, d]. `site(name, input, output)` applies the bypass networks attached there, or passes `output` on.

    Every operator but `attend` is row-local.
    """
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def adapted(name: str, value_in: Proxy, value_out: Proxy) -> Proxy:
        return tag(name, site(name, value_in, value_out))

    h = tag("attn_in", rms_norm(x, w.input_norm, config.rms_eps))
    q, k, v = split(linear(h, w.qkv, w.qkv_bias), (q_size, kv_size, kv_size))
    q, k, v = adapted("q_proj", h, q), adapted("k_proj", h, k), adapted("v_proj", h, v)
    if config.qk_norm:
        q, k = head_rms_norm(q, w.q_norm, config.rms_eps), head_rms_norm(k, w.k_norm, config.rms_eps)
    q, k = tag("q", rope(q, tables.cos, tables.sin)), tag("k", rope(k, tables.cos, tables.sin))
    q.node.meta.update(head_dim=config.head_dim, kv_columns=kv_size)
    o, lse = attend(q, k, v)
    o, _ = tag("attn_out", o), tag("lse", lse)
    xm = tag("mid", add(x, adapted("o_proj", o, linear(o, w.o, None))))
    h2 = tag("mlp_in", rms_norm(xm, w.post_norm, config.rms_eps))
    g, u = split(linear(h2, w.gate_up, None), (config.intermediate_size, config.intermediate_size))
    g, u = adapted("gate_proj", h2, g), adapted("up_proj", h2, u)
    m = tag("act", swiglu(g, u))
    return add(xm, adapted("down_proj", m, linear(m, w.down, None)))
