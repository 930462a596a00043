"""CLIP's vision transformer as transformers names it (`vision_model.*`), alone or inside a whole CLIP."""

from __future__ import annotations

from read_jax.config import ClipVisionConfig
from read_jax.weights.engine import Allowed, Row, Spec, Table, expand, layer_norm, linear, stack


def _layer(config: ClipVisionConfig) -> tuple[Spec, ...]:
    width, inner = config.hidden_size, config.intermediate_size
    return (
        *(
            spec
            for name in ("k_proj", "v_proj", "q_proj", "out_proj")
            for spec in linear(f"self_attn.{name}", f"attn.{name}", width, width)
        ),
        *layer_norm("layer_norm1", "norm1", width),
        *linear("mlp.fc1", "mlp.fc1", width, inner),
        *linear("mlp.fc2", "mlp.fc2", inner, width),
        *layer_norm("layer_norm2", "norm2", width),
    )


def table(config: ClipVisionConfig) -> Table:
    """The embeddings and the layers up to the one LLaVA reads."""
    width, side = config.hidden_size, config.patch_size
    key = "vision_model."
    rows = (
        Row(f"{key}embeddings.class_embedding", "clip.class_embed", "same", (width,)),
        Row(
            f"{key}embeddings.patch_embedding.weight",
            "clip.patch_embed.kernel",
            "patches",
            (width, 3, side, side),
        ),
        Row(
            f"{key}embeddings.position_embedding.weight",
            "clip.position_embed",
            "same",
            (config.grid_size**2 + 1, width),
        ),
        *expand(key, "clip.", layer_norm("pre_layrnorm", "pre_norm", width)),
        *stack(
            key + "encoder.layers.{i}.",
            "clip.layers.",
            range(config.used_layers),
            _layer(config),
        ),
    )
    beyond = "|".join(str(i) for i in range(config.used_layers, config.num_layers))
    after = (
        (
            Allowed(
                rf"vision_model\.encoder\.layers\.({beyond})\..*",
                "CLIP layers after the hidden state that LLaVA reads",
            ),
        )
        if beyond
        else ()
    )
    return Table(
        rows,
        (
            *after,
            Allowed(
                r"vision_model\.post_layernorm\..*", "CLIP's final norm: after the hidden state LLaVA reads"
            ),
            Allowed(
                r"(vision_model|text_model)\.embeddings\.position_ids", "CLIP position numbers 0, 1, 2, ..."
            ),
            Allowed(
                r"text_model\..*|(visual|text)_projection\.weight|logit_scale",
                "CLIP's text tower and contrastive head",
            ),
        ),
    )
