"""A small latent reward without CLIP, which learns the expert's standardised scores by regression (DOLLAR, 2412.15689).

Image tokens come from two convolutions, text tokens from the diffusion model's own text states. The text asks the
image: queries of text tokens over keys and values of image tokens. DOLLAR's own network is published in print alone,
where the text is one key, whose softmax is 1 for any image, so that the score depends on the text alone. Here the image
tokens are the keys.

    R^l(x, c) = w · mean over text tokens of SiLU(q + softmax(q kᵀ/√d) v)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgbench.core.errors import UsageError
from rgbench.core.io import (
    check_sums,
    check_tensors,
    load_safetensors,
    save_safetensors_atomic,
    write_json_atomic,
    write_sums,
)
from rgbench.models.folder import read_config
from rgbench.rewards.base import float32_at_least
from rgbench.rewards.clip import FeatureCache

CONFIG, WEIGHTS = "config.json", "model.safetensors"
GROUPS, TEXT_FACTOR = 8, 2  # of the normalisation; width of the text's hidden layer per width


class LatentRegressor(nn.Module):
    """Score of latents and prompt, in standard deviations of the expert's.

    Args:
        latent_shape: (C, h, w).
        latent_scale: the VAE's scaling factor.
        text_width: D of the text states.
        patch_size: side of the first convolution's patches, in latent pixels; DOLLAR: 4.
        width: of all tokens; DOLLAR: 128.

    Raises:
        UsageError: latents that the patches do not divide.
    """

    def __init__(
        self, latent_shape: tuple[int, int, int], latent_scale: float, text_width: int, patch_size: int, width: int
    ) -> None:
        super().__init__()
        self.config = {"latent_shape": list(latent_shape), "latent_scale": latent_scale, "text_width": text_width}
        self.config |= {"patch_size": patch_size, "width": width}
        channels, *sides = latent_shape
        if any(side % patch_size for side in sides):
            raise UsageError(f"proxy.small.patch_size {patch_size}: does not divide latents of {sides}")
        self.latent_scale = latent_scale
        self.image = nn.Sequential(
            nn.Conv2d(channels, width, patch_size, patch_size),
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
        )
        num = (sides[0] // patch_size + 1) // 2 * ((sides[1] // patch_size + 1) // 2)
        self.places = nn.Parameter(0.02 * torch.randn(num, width))
        hidden = TEXT_FACTOR * width
        self.text = nn.Sequential(nn.Linear(text_width, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 1)
        self._texts: FeatureCache | None = None

    def reading(self, encode: Callable[[list[str]], Tensor]) -> LatentRegressor:
        """Take prompts through an encoder to text states (B, L, D); returns the network."""
        self._texts = FeatureCache(encode)
        return self

    def forward(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), float32 at least, of unscaled latents (B, C, h, w) and prompts."""
        assert self._texts is not None, "reading() names the encoder"
        image = self.image(latents * self.latent_scale).flatten(2).transpose(1, 2) + self.places  # (B, tokens, width)
        query = self.query(self.text(self._texts(prompts).to(latents)))  # (B, L, width)
        asked = F.scaled_dot_product_attention(query, self.key(image), self.value(image))
        return float32_at_least(self.head(F.silu(query + asked).mean(1))[:, 0])

    def save(self, folder: str | Path) -> None:
        """Write configuration, weights and their ``rgbench.sha256`` into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_json_atomic(folder / CONFIG, self.config)
        save_safetensors_atomic(state, folder / WEIGHTS)
        write_sums(folder)

    def load_weights(self, folder: Path) -> None:
        """Take the weights that :meth:`save` wrote.

        Raises:
            UsageError: a file is missing or damaged, or they are of other latents, another scale, or another network.
        """
        for file in (CONFIG, WEIGHTS):
            if not (folder / file).is_file():
                raise UsageError(f"{folder / file}: missing; the folder of a run's small latent reward is needed")
        check_sums(folder)
        config = read_config(folder / CONFIG)
        for key in sorted(config.keys() | self.config):
            found, wanted = config.get(key), self.config.get(key)
            if found != wanted:
                raise UsageError(
                    f"{folder / CONFIG}: {key} is {found!r:.60}, not {wanted!r} as of this model and recipe"
                )
        weights = load_safetensors(folder / WEIGHTS)
        check_tensors(folder / WEIGHTS, weights, self.state_dict(), CONFIG)
        self.load_state_dict(weights)
