"""From open_clip's text tower to a ``CLIPTextModel``, as Stable Diffusion 2.1 did it.

SD 2.x conditions on the penultimate layer of OpenCLIP ViT-H with the final norm on top:
23 of 24 layers. Here likewise all layers but the last.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel


def to_transformers(state: dict[str, Tensor], text_cfg: dict, embed_dim: int) -> CLIPTextModel:
    """Convert an open_clip CLIP's text tower, dropping its last layer.

    Args:
        state: state dict of ``open_clip.CLIP``.
        text_cfg: ``context_length``, ``vocab_size``, ``width``, ``heads``, ``layers``.
        embed_dim: width of the joint space.

    Returns:
        The text encoder in eval mode; last hidden state (B, L, width).
    """
    layers = text_cfg["layers"] - 1
    config = CLIPTextConfig(
        vocab_size=text_cfg["vocab_size"],
        hidden_size=text_cfg["width"],
        intermediate_size=4 * text_cfg["width"],
        projection_dim=embed_dim,
        num_hidden_layers=layers,
        num_attention_heads=text_cfg["heads"],
        max_position_embeddings=text_cfg["context_length"],
        hidden_act="gelu",
        bos_token_id=text_cfg["vocab_size"] - 2,
        eos_token_id=text_cfg["vocab_size"] - 1,
        pad_token_id=0,
    )
    encoder = CLIPTextModel(config)
    mapped = _mapped(state, layers)
    prefix = "text_model." if any(k.startswith("text_model.") for k in encoder.state_dict()) else ""
    missing, unexpected = encoder.load_state_dict({prefix + k: v.float() for k, v in mapped.items()}, strict=False)
    if unexpected or [k for k in missing if "position_ids" not in k]:
        raise ValueError(f"text tower does not fit CLIPTextModel: missing {missing}, unexpected {unexpected}")
    return encoder.eval()


def _mapped(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    out = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "final_layer_norm.weight": state["ln_final.weight"],
        "final_layer_norm.bias": state["ln_final.bias"],
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    for i in range(layers):
        source, target = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for leaf in ("weight", "bias"):
            for ours, theirs in names.items():
                out[f"{target}.{theirs}.{leaf}"] = state[f"{source}.{ours}.{leaf}"]
            for part, value in zip("qkv", torch.chunk(state[f"{source}.attn.in_proj_{leaf}"], 3), strict=True):
                out[f"{target}.self_attn.{part}_proj.{leaf}"] = value
    return out
