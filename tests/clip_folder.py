"""A CLIP in transformers' layout, as PickScore_v1 and openai/clip-vit-large-patch14 are, at 16 wide."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel


def save_clip(folder: Path) -> Path:
    """Random weights from seed 0, CLIP's vocabulary, images of 8 px."""
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**layers, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2}
    vision = {**layers, "image_size": 8, "patch_size": 4, "projection_dim": 12}
    config = CLIPConfig(text_config={**text, "projection_dim": 12}, vision_config=vision, projection_dim=12)
    model = CLIPModel(config)
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=1.0)
    model.save_pretrained(folder)
    return folder
