"""The reward contract, and rewards made of others: blurred or cropped views, weighted sums, any function.

A reward maps images in [0, 1] of any size and their prompts to scores (B,). It owns its preprocessing, and its
fingerprint holds everything that changes its scores.

A weighted sum standardises its terms, R = Σ_k w_k · (R_k − μ_k) / s_k, because their units differ: the cosines of HPS
vary in the second decimal, aesthetic ratings in the first digit. With ``balance``, it also equalises their gradients.

| symbol | name | meaning, shape |
|---|---|---|
| R_k, w_k | ``terms``, ``weights`` | rewards and their weights |
| μ_k, s_k | ``mean``, ``std`` | of each term's scores over the calibration images, (K,) float64 |
| g_k | ``gradients`` | ∂(w_k · R_k)/∂image, (B, 3, H, W) |
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from rgbench.core.errors import RgbenchError, UsageError

CALIBRATION_BATCH = 16  # images scored at once
ALIKE = 16 * torch.finfo(torch.float32).eps  # one image scored twice in a batch differs by a few roundings of its score


class Reward(Protocol):
    """A frozen model that scores an image for a prompt.

    It may have an attribute ``logit_scale``, the factor from score to the logit of a preference (HPS: 100).

    Attributes:
        name: short name for logs and tables.
        differentiable: whether scores carry gradient to the images.
    """

    name: str
    differentiable: bool

    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes the scores: weights sha256, resize kernel, antialias, padding, dtype, token limit,
        normalisation. JSON-able.
        """
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], float32 at least; no gradient reaches the reward's weights."""
        ...


def float32_at_least(values: Tensor) -> Tensor:
    """Half-precision values as float32, float32 and float64 as they are.

    Under autocast, features come in half precision; what is computed from them must not be rounded again. Cosines
    around 0.3 would be rounded to multiples of 0.001 in bfloat16, 0.1 as a logit at scale 100.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


def score(reward: Reward, images: Tensor, prompts: Sequence[str], crop_offsets: Tensor | None = None) -> Tensor:
    """Scores (B,) of images, or of one random crop of each where the reward has ``random_crop``; float32 at least.

    Args:
        reward: any.
        images: (B, 3, H, W) in [0, 1].
        prompts: B texts.
        crop_offsets: (B, 2) in [0, 1), as :func:`crop` takes them.
    """
    if getattr(reward, "random_crop", None):
        return float32_at_least(reward(images, prompts, crop_offsets))  # type: ignore[call-arg]
    return float32_at_least(reward(images, prompts))


def fingerprint_id(fingerprint: dict[str, Any]) -> str:
    """8 hex digits of the sha256 of a fingerprint's canonical JSON."""
    canonical = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def num_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text with its begin and end marks, uncut.

    Args:
        tokenizer: of open_clip or transformers, or one with a method ``num_tokens``.
        texts: B of them.
    """
    if hasattr(tokenizer, "num_tokens"):
        return tokenizer.num_tokens(texts)
    if type(tokenizer).__module__.startswith("open_clip"):
        from open_clip.tokenizer import SimpleTokenizer  # seconds to import; here it is imported already

        if isinstance(tokenizer, SimpleTokenizer):
            return [len(tokenizer.encode(text)) + 2 for text in texts]
        texts, tokenizer = [tokenizer.clean_fn(text) for text in texts], tokenizer.tokenizer
    return [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False).input_ids]


class ViewedReward:
    """A reward behind a blur and a crop.

    Both are controls of the study of over-optimisation: a reward that never sees high frequencies cannot be pleased by
    them, and one that sees another crop at each step cannot be pleased by a fixed pattern.

    Args:
        reward: any reward.
        blur_sigma: of the Gaussian, in pixels of the images; 0 for none. Truncated at 4 σ, borders reflected.
        random_crop: share of each side that a crop keeps, or None.
    """

    def __init__(self, reward: Reward, *, blur_sigma: float, random_crop: float | None) -> None:
        self.reward, self.blur_sigma, self.random_crop = reward, blur_sigma, random_crop
        self.name, self.differentiable = reward.name, reward.differentiable
        self.logit_scale = getattr(reward, "logit_scale", None)

    def fingerprint(self) -> dict[str, Any]:
        """The reward's, with blur and crop where there are any."""
        view = {"blur_sigma": self.blur_sigma, "random_crop": self.random_crop}
        return self.reward.fingerprint() | {key: value for key, value in view.items() if value}

    def __call__(self, images: Tensor, prompts: Sequence[str], crop_offsets: Tensor | None = None) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]; ``crop_offsets`` as in :func:`crop`."""
        if self.blur_sigma:
            radius = min(math.ceil(4 * self.blur_sigma), min(images.shape[-2:]) - 1)
            images = gaussian_blur(images, [2 * radius + 1] * 2, [self.blur_sigma] * 2)
        if self.random_crop:
            images = crop(images, self.random_crop, crop_offsets)
        return self.reward(images, prompts)


def crop(images: Tensor, share: float, offsets: Tensor | None) -> Tensor:
    """One crop of each image.

    Args:
        images: (B, C, H, W).
        share: of each side, in (0, 1]; at least one pixel is kept.
        offsets: (B, 2) in [0, 1), row and column, uniform over all whole-pixel positions: 0 is the top and left edge.
            None for the centre, so that a score without draws is reproducible.

    Returns:
        (B, C, h, w).
    """
    height, width = (max(round(share * side), 1) for side in images.shape[-2:])
    room = torch.tensor([images.shape[-2] - height, images.shape[-1] - width])
    if offsets is None:
        top, left = (room // 2).tolist()
        return images[..., top : top + height, left : left + width]
    corners = (offsets.double() * (room + 1)).long().tolist()
    crops = [
        image[:, top : top + height, left : left + width] for image, (top, left) in zip(images, corners, strict=True)
    ]
    return torch.stack(crops)


class WeightedReward:
    """A weighted sum of rewards.

    Args:
        terms: rewards.
        weights: as many, not negative.
        standardise: use μ and s, which :meth:`calibrate` sets.
        balance: bring each term's gradient at the image to one length per weight, so that none drowns the others.
    """

    name = "sum"

    def __init__(self, terms: Sequence[Reward], weights: Sequence[float], *, standardise: bool, balance: bool) -> None:
        self.terms, self.weights = list(terms), [float(w) for w in weights]
        self.standardise, self.balance = standardise, balance
        self.mean = torch.zeros(len(self.terms), dtype=torch.float64)
        self.std = torch.ones(len(self.terms), dtype=torch.float64)
        self.differentiable = all(term.differentiable for term in self.terms)
        self.random_crop = any(getattr(term, "random_crop", None) for term in self.terms)

    def fingerprints(self) -> list[dict[str, Any]]:
        """One per term, since a student is in-sample for each."""
        how = {"standardise": self.standardise, "balance": self.balance}
        pairs = zip(self.terms, self.weights, strict=True)
        return [term.fingerprint() | {"weight": weight, **how} for term, weight in pairs]

    def fingerprint(self) -> dict[str, Any]:
        """The terms' and how they are added; μ and s are state, not identity."""
        return {"name": self.name, "terms": self.fingerprints()}

    @torch.no_grad()
    def calibrate(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Set μ and s from images (N, 3, H, W) in [0, 1] and their N prompts.

        Raises:
            UsageError: a term gives all images the same score, or one that is not finite.
        """
        for k, term in enumerate(self.terms):
            batches = [slice(i, i + CALIBRATION_BATCH) for i in range(0, len(images), CALIBRATION_BATCH)]
            scores = torch.cat([term(images[batch], prompts[batch]) for batch in batches]).double()
            std = float(scores.std())
            if not std > ALIKE * float(scores.abs().max()) or not scores.isfinite().all():
                raise UsageError(
                    f"reward.terms.{k}: {term.name} scores all {len(images)} calibration images alike or not at all; "
                    "set reward.standardise: none, or remove the term"
                )
            self.mean[k], self.std[k] = float(scores.mean()), std

    def state_dict(self) -> dict[str, Tensor]:
        """μ and s, for a checkpoint."""
        return {"mean": self.mean.clone(), "std": self.std.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], /) -> None:
        """Restore :meth:`state_dict`."""
        self.mean, self.std = state_dict["mean"].clone(), state_dict["std"].clone()

    def __call__(self, images: Tensor, prompts: Sequence[str], crop_offsets: Tensor | None = None) -> Tensor:
        """R (B,) of images (B, 3, H, W) in [0, 1]; ``crop_offsets`` as in :func:`crop`."""
        if not (self.balance and torch.is_grad_enabled() and images.requires_grad):
            return torch.stack(self._weighted(images, prompts, crop_offsets)).sum(0)
        leaf = images.detach().requires_grad_()
        values = self._weighted(leaf, prompts, crop_offsets)
        gradients = torch.stack([torch.autograd.grad(value.sum(), leaf)[0] for value in values])
        total = torch.stack([value.detach() for value in values]).sum(0)
        return _GivenGradient.apply(images, total, self._balanced(gradients))

    def _weighted(self, images: Tensor, prompts: Sequence[str], crop_offsets: Tensor | None) -> list[Tensor]:
        """w_k · (R_k − μ_k) / s_k, each (B,)."""
        values = []
        for k, (term, weight) in enumerate(zip(self.terms, self.weights, strict=True)):
            scores = score(term, images, prompts, crop_offsets)
            if self.standardise:
                scores = (scores - float(self.mean[k])) / float(self.std[k])
            values.append(weight * scores)
        return values

    def _balanced(self, gradients: Tensor) -> Tensor:
        """Sum of g_k · w_k · n̄ / ‖g_k‖, with n̄ = Σ ‖g_k‖ / Σ w_k of each image, so that the sum keeps its size.

        Args:
            gradients: of the weighted terms, (K, B, 3, H, W).
        """
        norms = gradients.flatten(2).norm(dim=2)  # (K, B)
        weights = torch.tensor(self.weights, dtype=norms.dtype, device=norms.device)[:, None]
        wanted = weights * norms.sum(0) / weights.sum()
        factors = torch.where(norms > 0, wanted / norms, torch.zeros_like(norms))
        return (factors[:, :, None, None, None] * gradients).sum(0)


class _GivenGradient(torch.autograd.Function):
    """Scores (B,) whose gradient to the images is already known."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, scores: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return scores.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outputs[0][:, None, None, None] * gradient, None, None


class CallableReward:
    """A scoring function as a reward: a labeller for a latent proxy, without gradient; torch or not.

    Args:
        score: (images (B, 3, H, W) in [0, 1], B prompts) → B numbers, as a tensor, an array or a list.
        name: short, for logs and tables.
        fingerprint: what changes its scores; by default the code's name and the sha256 of its file.
        logit_scale: factor from score to the logit of a preference; None where the recipe gives it.
    """

    differentiable = False

    def __init__(
        self,
        score: Callable[[Tensor, list[str]], Any],
        name: str,
        *,
        fingerprint: dict[str, Any] | None = None,
        logit_scale: float | None = None,
    ) -> None:
        self.score, self.name, self.logit_scale = score, name, logit_scale
        self._fingerprint = {"name": name, **(_code(score) if fingerprint is None else fingerprint)}

    def fingerprint(self) -> dict[str, Any]:
        """What changes the scores, as far as it is known."""
        return self._fingerprint

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) on the images' device, float32 at least, without gradient.

        Raises:
            RgbenchError: not one number per image.
        """
        dtype = torch.promote_types(images.dtype, torch.float32)
        scores = torch.as_tensor(self.score(images.detach(), list(prompts)), dtype=dtype, device=images.device)
        if scores.shape != (len(prompts),):
            shape = tuple(scores.shape)
            raise RgbenchError(f"reward {self.name}: gave scores of shape {shape} for {len(prompts)} images; give (B,)")
        return scores.detach()


def _code(score: Callable[..., Any]) -> dict[str, Any]:
    """The name of a function and the sha256 of its file, which tell one version of it from another."""
    owner = score if inspect.isroutine(score) or inspect.isclass(score) else type(score)
    file = inspect.getsourcefile(owner)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else "unknown"
    code = f"{owner.__module__}:{owner.__qualname__}"
    return {"weights_sha256": "none", "antialias": None, "code": code, "code_sha256": digest}
