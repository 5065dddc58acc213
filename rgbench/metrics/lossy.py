"""What JPEG does to images: the published HPSv2 figures were measured through it, and fragility asks what it costs."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rgbench.files import open_image
from rgbench.metrics.reference import to_uint8

JPEG_QUALITY = 75  # Pillow's default, with which HPSv2's benchmark images were saved


def through_jpeg(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] through JPEG at quality 75, 4:2:0, and back."""
    decoded = []
    for pixels in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
        decoded.append(np.asarray(open_image(file.getvalue())))
    return (torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255).to(images.device)
