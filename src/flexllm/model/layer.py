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
from flexllm.peft.config import LINEARS

# Where bypass networks attach: the linears' outputs; the inputs of those linears that share theirs with no other; keys (RoPE
# applied) and values on their way into the pages; the sublayers' outputs; and, in the first layer, the embeddings.
SITES = (*LINEARS, "o_proj_in", "down_proj_in", "key", "value", "attention", "mlp", "embedding")


def site_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of each site: what its bypass gives and what it may read."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "o_proj_in": (q, q),
        "down_proj_in": (f, f),
        "key": (kv, kv),
        "value": (kv, kv),
        "attention": (d, d),
        "mlp": (d, d),
        "embedding": (d, d),
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

    x = adapted("embedding", x, x)
    h = tag("attn_in", rms_norm(x, w.input_norm, config.rms_eps))
    q, k, v = split(linear(h, w.qkv, w.qkv_bias), (q_size, kv_size, kv_size))
    q, k, v = adapted("q_proj", h, q), adapted("k_proj", h, k), adapted("v_proj", h, v)
    if config.qk_norm:
        q, k = head_rms_norm(q, w.q_norm, config.rms_eps), head_rms_norm(k, w.k_norm, config.rms_eps)
    q, k = tag("q", rope(q, tables.cos, tables.sin)), rope(k, tables.cos, tables.sin)
    k, v = adapted("key", k, k), adapted("value", v, v)
    q.node.meta.update(head_dim=config.head_dim, kv_columns=kv_size)
    for paged in (k, v):
        paged.node.meta["paged"] = True  # rows of it stay in the sequence's pages
    o, lse = attend(q, k, v)
    o, _ = tag("attn_out", o), tag("lse", lse)
    o = adapted("o_proj_in", o, o)
    a = adapted("o_proj", o, linear(o, w.o, None))
    xm = tag("mid", add(x, adapted("attention", x, a)))
    h2 = tag("mlp_in", rms_norm(xm, w.post_norm, config.rms_eps))
    g, u = split(linear(h2, w.gate_up, None), (config.intermediate_size, config.intermediate_size))
    g, u = adapted("gate_proj", h2, g), adapted("up_proj", h2, u)
    m = tag("act", swiglu(g, u))
    m = adapted("down_proj_in", m, m)
    y = adapted("down_proj", m, linear(m, w.down, None))
    return add(xm, adapted("mlp", xm, y))
