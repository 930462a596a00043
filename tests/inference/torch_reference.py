"""READ put together from the PyTorch implementations of its parts: what the whole of `read_jax` must equal.

CLIP and LLaMA are transformers', SAM is segment-anything's, points come from `tests.models.sasp_reference`.
What joins them (prompt text, tokens, image placeholder, projector, text projection, READ's prompt tokens,
mask resizing) is written out here, and weights are read from the checkpoint files by their upstream names:
nothing of `read_jax` takes part but the dataclass of the point settings.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from read_jax.config import SaspConfig
from tests.models.sasp_reference import padding, reference_points
from tests.models.segment_anything_reference import modeling
from tests.weights.synthetic import Sizes, read_state

IMAGE = -200
SIDE = 1024
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PROMPTS = {
    "llava_v1": "A chat between a curious human and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the human's questions. USER: {} ASSISTANT:",
    "llava_llama_2": "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to "
    "understand the visual content that the user provides, and assist the user with a variety of tasks using "
    "natural language.\n<</SYS>>\n\n{} [/INST]",
}
ENDS = {"llava_v1": "</s>", "llava_llama_2": " </s>"}


def child(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The part of a state dict under a prefix, which is taken off."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


class TorchRead:
    """The model of a checkpoint folder and a CLIP folder, in float32.

    sizes: SAM's, which no file states (a wrong one does not load).
    """

    def __init__(self, checkpoint: Path, clip: Path, sizes: Sizes, sasp: SaspConfig):
        self.sasp, self.hf = sasp, json.loads((checkpoint / "config.json").read_text())
        state = read_state(checkpoint)
        self._projector, self._text = (
            child(state, "model.mm_projector."),
            child(state, "model.text_hidden_fcs.0."),
        )
        self._tokens = json.loads((checkpoint / "added_tokens.json").read_text())
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
        self.seg_id, self.end_id = self._tokens["[SEG]"], 2

        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        names += ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
        known = {name: self.hf[name] for name in names if name in self.hf}
        self.llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**known, attn_implementation="eager")
        ).eval()
        language = {
            k: v for k, v in state.items() if re.match(r"model\.(embed_tokens|layers|norm)\.|lm_head", k)
        }
        if self.hf["tie_word_embeddings"]:
            language["lm_head.weight"] = language["model.embed_tokens.weight"]
        self.llama.load_state_dict(language)

        vision = json.loads((clip / "config.json").read_text())
        self.clip_side = vision["image_size"]
        config = transformers.CLIPVisionConfig(**vision, attn_implementation="eager")
        self.clip = transformers.CLIPVisionModel(config).eval()
        # newer transformers have dropped the prefix that CLIP's files have
        nested = next(iter(self.clip.state_dict())).startswith("vision_model.")
        weights = read_state(clip)
        self.clip.load_state_dict(weights if nested else child(weights, "vision_model."))

        self.sam = segment_anything(sizes)
        self.sam.load_state_dict(child(state, "model.visual_model."))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text whose `<image>` becomes -200; added tokens swallow the space beside them."""
        ids = [1]
        parts = re.split(r"(<image>|\[SEG\]|<im_start>|<im_end>|</s>)", text)
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(IMAGE if part == "<image>" else 2 if part == "</s>" else self._tokens[part])
                continue
            before, after = (parts[j] if 0 <= j < len(parts) else "" for j in (i - 1, i + 1))
            part = part.lstrip() if before in self._tokens else part
            part = part.rstrip() if after in self._tokens else part
            ids += self._pieces.encode(part) if part else []
        return ids

    def prompt(self, question: str, conversation: str) -> str:
        """An open prompt about a picture."""
        return PROMPTS[conversation].format(f"<im_start><image><im_end>\n{question}")

    @torch.no_grad()
    def see(self, picture: np.ndarray) -> dict[str, torch.Tensor]:
        """What does not depend on the question: the inputs and outputs of both vision encoders."""
        clip_pixels, (sam_pixels, sam_hw) = clip_input(picture, self.clip_side), sam_input(picture)
        hidden = self.clip(clip_pixels[None], output_hidden_states=True).hidden_states
        features = hidden[self.hf["mm_vision_select_layer"]][0, 1:]
        return {
            "clip_pixel_values": clip_pixels,
            "sam_input": sam_pixels,
            "original_hw": torch.tensor(picture.shape[:2]),
            "sam_input_hw": torch.tensor(sam_hw),
            "clip_features": features,
            "projector_output": self.project(features),
            "image_embedding": self.sam.image_encoder(sam_pixels[None])[0],
        }

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """CLIP features [N, Dc] as tokens of the language model [N, D]."""
        if "weight" in self._projector:
            return F.linear(features, self._projector["weight"], self._projector["bias"])
        for i in range(0, len(self._projector), 2):  # numbers 0, 2, ...: a GELU is between
            features = F.gelu(features) if i else features
            features = F.linear(features, self._projector[f"{i}.weight"], self._projector[f"{i}.bias"])
        return features

    @torch.no_grad()
    def hidden(self, ids: list[int], image_tokens: torch.Tensor) -> torch.Tensor:
        """States [E, D] after the final norm, the placeholder replaced by the picture's tokens."""
        at = ids.index(IMAGE)
        embed = self.llama.model.embed_tokens
        before, after = embed(torch.tensor(ids[:at])), embed(torch.tensor(ids[at + 1 :]))
        x = torch.cat([before, image_tokens, after])[None]
        return self.llama.model(inputs_embeds=x, use_cache=False).last_hidden_state[0]

    @torch.no_grad()
    def trace(
        self, picture: np.ndarray, question: str, answer: str, conversation: str
    ) -> dict[str, torch.Tensor | np.ndarray]:
        """The arrays of `Segmenter.trace` that have a meaning outside it, by the same names."""
        out = dict(self.see(picture))
        ids = self.encode(f"{self.prompt(question, conversation)} {answer}{ENDS[conversation]}")
        states, at = self.hidden(ids, out["projector_output"]), ids.index(IMAGE)
        count = len(out["projector_output"])
        # a token of the answer is `count` - 1 further right once the picture is in, its predecessor one less
        seg = torch.tensor([i + count - 2 for i, token in enumerate(ids) if token == self.seg_id])
        out |= {"input_ids": torch.tensor([ids]), "last_hidden": states[None], "seg_expanded_index": seg}
        out["logits"] = self.llama.lm_head(states)[None]
        rows = [self._mask(out, states[i], states[at : at + count]) for i in seg]
        return out | {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}

    def _mask(
        self, seen: Mapping[str, Any], state: torch.Tensor, image_states: torch.Tensor
    ) -> dict[str, Any]:
        """From one [SEG] state to its mask."""
        hidden = F.relu(F.linear(state, self._text["0.weight"], self._text["0.bias"]))
        text = F.linear(hidden, self._text["2.weight"], self._text["2.bias"])
        (h, w), (sam_h, sam_w) = seen["original_hw"].tolist(), seen["sam_input_hw"].tolist()
        out: dict[str, Any] = {"pred_embedding": text, "similarity": image_states @ state}
        encoder, sparse = self.sam.prompt_encoder, [text[None]]
        if self.sasp.enabled:
            discrete, labels, points = reference_points(out["similarity"], h, w, self.sasp)
            coords = points * torch.tensor([sam_w / w, sam_h / h], dtype=torch.float32)
            out |= {"points_discrete": discrete, "points_labels": labels, "points_continuous": points}
            out |= {"point_coords_1024": coords}
            side = round(len(image_states) ** 0.5) // self.sasp.down_sample
            out["sasp_grid_hw"] = np.array([side + 2 * pad for pad in padding(h, w, side)])
            sparse = [point_tokens(encoder, coords, labels), encoder.not_a_point_embed.weight, text[None]]
        out["sparse_embeddings"] = torch.cat(sparse)
        dense = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, 64, 64)
        low_res, iou = self.sam.mask_decoder(
            image_embeddings=seen["image_embedding"][None],
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=out["sparse_embeddings"][None],
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        resize = functools.partial(F.interpolate, mode="bilinear", align_corners=False)
        logits = resize(resize(low_res, (SIDE, SIDE))[..., :sam_h, :sam_w], (h, w))[0, 0]
        return out | {
            "low_res_masks": low_res[0, 0],
            "iou_pred": iou[0],
            "mask_logits": logits,
            "mask": logits > 0,
        }

    @torch.no_grad()
    def generate(
        self, picture: np.ndarray, question: str, conversation: str, count: int
    ) -> tuple[list[int], float]:
        """Greedy answer without any cache, and the smallest lead of a chosen token over the next best."""
        ids, image = self.encode(self.prompt(question, conversation)), self.see(picture)["projector_output"]
        answer: list[int] = []
        lead = float("inf")
        while len(answer) < count and answer[-1:] != [self.end_id]:
            best = self.llama.lm_head(self.hidden(ids + answer, image)[-1]).topk(2)
            lead = min(lead, float(best.values[0] - best.values[1]))
            answer.append(int(best.indices[0]))
        return answer, lead


def point_tokens(encoder: Any, coords: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    """Prompt tokens [P, C] of points [P, 2] in the 1024 frame; a neutral point says nothing of its place."""
    centred = 2 * ((coords + 0.5) / SIDE) - 1
    phase = 2 * torch.pi * (centred @ encoder.pe_layer.positional_encoding_gaussian_matrix)
    position = torch.cat([phase.sin(), phase.cos()], dim=-1)
    kinds = [position + encoder.point_embeddings[i].weight for i in (0, 1)]
    nothing = encoder.not_a_point_embed.weight.expand_as(position)
    label = torch.from_numpy(labels)[:, None]
    return torch.where(label == 1, kinds[1], torch.where(label == 0, kinds[0], nothing))


def clip_input(picture: np.ndarray, side: int) -> torch.Tensor:
    """CLIP's input [3, side, side]: shortest edge to `side`, bicubic, central square, standardised."""
    height, width = picture.shape[:2]
    short = min(height, width)
    size = int(side * width / short), int(side * height / short)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    resized = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(resized.crop((left, top, left + side, top + side)))).float() / 255
    return ((x - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(2, 0, 1)


def sam_input(picture: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
    """SAM's input [3, 1024, 1024], zeros on the right and bottom, and (height, width) of what is picture."""
    height, width = (int(size * SIDE / max(picture.shape[:2]) + 0.5) for size in picture.shape[:2])
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
    x = (torch.from_numpy(np.array(resized)).float() - torch.tensor(SAM_MEAN)) / torch.tensor(SAM_STD)
    return F.pad(x.permute(2, 0, 1), (0, SIDE - width, 0, SIDE - height)), (height, width)


def segment_anything(sizes: Sizes) -> Any:
    """An empty SAM of these sizes."""
    sa, out, grid = modeling(), sizes.sam_out, (sizes.sam_grid, sizes.sam_grid)
    encoder = sa.ImageEncoderViT(
        img_size=SIDE,
        embed_dim=sizes.sam_dim,
        depth=sizes.sam_depth,
        num_heads=sizes.sam_heads,
        mlp_ratio=sizes.sam_mlp / sizes.sam_dim,
        out_chans=out,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=sizes.sam_window,
        global_attn_indexes=sizes.sam_global,
    )
    decoder = sa.MaskDecoder(
        transformer_dim=out,
        transformer=sa.TwoWayTransformer(depth=2, embedding_dim=out, num_heads=8, mlp_dim=sizes.decoder_mlp),
        iou_head_hidden_dim=out,
    )
    prompts = sa.PromptEncoder(
        embed_dim=out, image_embedding_size=grid, input_image_size=(SIDE, SIDE), mask_in_chans=16
    )
    return sa.Sam(encoder, prompts, decoder).eval()
