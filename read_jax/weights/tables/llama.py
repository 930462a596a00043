"""LLaMA as transformers names it (`model.*`, `lm_head`)."""

from __future__ import annotations

from read_jax.config import LlamaConfig
from read_jax.weights.engine import Allowed, Row, Spec, Table, linear, stack


def _layer(config: LlamaConfig) -> tuple[Spec, ...]:
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return (
        ("input_layernorm.weight", "input_norm.scale", "same", (width,)),
        *linear("self_attn.q_proj", "attn.q_proj", width, queries, bias=False),
        *linear("self_attn.k_proj", "attn.k_proj", width, keys, bias=False),
        *linear("self_attn.v_proj", "attn.v_proj", width, keys, bias=False),
        *linear("self_attn.o_proj", "attn.o_proj", queries, width, bias=False),
        ("post_attention_layernorm.weight", "post_norm.scale", "same", (width,)),
        *linear("mlp.gate_proj", "mlp.gate_proj", width, inner, bias=False),
        *linear("mlp.up_proj", "mlp.up_proj", width, inner, bias=False),
        *linear("mlp.down_proj", "mlp.down_proj", inner, width, bias=False),
    )


def table(config: LlamaConfig) -> Table:
    """Embedding, decoder layers and final norm."""
    rows = (
        Row(
            "model.embed_tokens.weight",
            "llama.embed_tokens.embedding",
            "same",
            (config.vocab_size, config.hidden_size),
        ),
        *stack("model.layers.{i}.", "llama.layers.", range(config.num_layers), _layer(config)),
        Row("model.norm.weight", "llama.norm.scale", "same", (config.hidden_size,)),
    )
    return Table(
        rows,
        (
            Allowed(
                r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
                "rotary frequencies: computed from rope_theta, kept for export",
                kept=True,
            ),
            Allowed(
                r"model\.vision_tower\..*",
                "vision tower inside the checkpoint: CLIP comes from its own folder",
            ),
        ),
    )


def head_table(config: LlamaConfig) -> Table:
    """The output layer, which upstream writes last; absent when tied to the embedding."""
    if config.tie_word_embeddings:
        return Table((), (Allowed(r"lm_head\.weight", "tied to the token embedding"),))
    shape = (config.vocab_size, config.hidden_size)
    return Table((Row("lm_head.weight", "llama.lm_head.kernel", "linear", shape),))
