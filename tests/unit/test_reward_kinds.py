"""Every kind of reward: the real classes at tiny sizes in the file layouts that users have, and one contract."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPModel

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.rewards.aesthetic import AestheticReward, make_head
from rgbench.rewards.base import CallableReward, ViewedReward, WeightedReward, crop, fingerprint_id
from rgbench.rewards.clip import CLIP_MEAN, CLIP_STD, CLIPScoreReward, PickScoreReward, clip_preprocess
from tests.clip_folder import save_clip
from tests.parity import tiny

PROMPTS = ["a red circle", "two blue squares", "a green star"]


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("pickscore"))


def aesthetic(clip_folder: Path, folder: Path, kind: str, antialias: bool = True) -> AestheticReward:
    torch.manual_seed(1)
    file = folder / f"{kind}.pth"
    torch.save(make_head(kind, 12).state_dict(), file)
    return AestheticReward.load(clip_folder, head=kind, head_path=file, antialias=antialias, device="cpu")


@pytest.fixture(scope="module")
def rewards(clip_folder, tmp_path_factory) -> dict:
    hps = tiny.expert()
    parts = {"antialias": True, "weights_sha256": "random-1"}
    folder = tmp_path_factory.mktemp("heads")
    mlp = aesthetic(clip_folder, folder, "mlp")
    return {
        "hps": hps,
        "clip_score": CLIPScoreReward(hps.model, hps.tokenizer, **parts),
        "pickscore": PickScoreReward.load(clip_folder, antialias=True, device="cpu"),
        "aesthetic mlp": mlp,
        "aesthetic linear": aesthetic(clip_folder, folder, "linear"),
        "viewed": ViewedReward(hps, blur_sigma=0.8, random_crop=0.5),
        "sum": WeightedReward([hps, mlp], [1.0, 0.5], standardise=False, balance=False),
    }


KINDS = ["hps", "clip_score", "pickscore", "aesthetic mlp", "aesthetic linear", "viewed", "sum"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_contract(rewards, kind):
    reward = rewards[kind]
    images = pixels(3, 3, 20, 16).requires_grad_()
    scores = reward(images, PROMPTS)
    assert scores.shape == (3,) and reward.differentiable
    assert torch.allclose(reward(images[1:2], PROMPTS[1:2]), scores[1:2], atol=1e-6), "scores depend on the batch"
    (gradient,) = torch.autograd.grad(scores[0], images)
    assert gradient[0].abs().max() > 0 and gradient[1:].abs().max() == 0
    of_prompt = (reward(images, PROMPTS[1:] + PROMPTS[:1]) - scores).abs().max()
    assert (of_prompt > 1e-4) == ("aesthetic" not in kind)
    assert json.loads(json.dumps(reward.fingerprint())) == reward.fingerprint()


@pytest.mark.parametrize("kind", ["clip_score", "pickscore", "aesthetic mlp"])
def test_gradient_against_finite_differences(rewards, kind):
    reward = rewards[kind]
    networks = [reward.model] + ([reward.head] if "aesthetic" in kind else [])
    for network in networks:
        network.double()
    images, direction = (pixels(2, 3, 20, 16, seed=s).double() for s in (1, 2))
    images.requires_grad_()
    reward(images, PROMPTS[:2]).sum().backward()
    with torch.no_grad():
        ends = [float(reward(images + h * direction, PROMPTS[:2]).sum()) for h in (1e-5, -1e-5)]
    for network in networks:
        network.float()
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float((images.grad * direction).sum()), rel=1e-5)


def test_centre_square_as_clip_takes_it():
    """Against transformers' own preprocessing, which resizes 8-bit pixels with PIL's antialiased filter."""
    processor = CLIPImageProcessor(size={"shortest_edge": 14}, crop_size={"height": 14, "width": 14})
    smooth = torch.nn.functional.interpolate(pixels(1, 3, 6, 9), (40, 61), mode="bicubic").clamp(0, 1)
    image = (smooth * 150 + 50).round() / 255  # away from 0 and 1, where 8 bits would cut the overshoot
    wanted = processor((image[0] * 255).byte().permute(1, 2, 0).numpy(), return_tensors="pt").pixel_values
    found = clip_preprocess(image, 14, antialias=True)
    assert found.shape == wanted.shape == (1, 3, 14, 14)
    assert (found - wanted).abs().max() < 2.5 / 255 / min(CLIP_STD)
    assert (clip_preprocess(image, 14, antialias=False) - wanted).abs().max() > 2.5 / 255 / min(CLIP_STD)
    exact = (image[..., :14, 3:17] - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    assert torch.allclose(clip_preprocess(image[..., :14, :20], 14, antialias=True), exact)


def test_pickscore_is_the_published_computation(clip_folder):
    """exp(logit_scale) · cos of transformers' CLIP, with CLIP's tokens; the end token is found where it is."""
    reward = PickScoreReward.load(clip_folder, antialias=True, device="cpu")
    model = CLIPModel.from_pretrained(clip_folder).eval()
    images = pixels(3, 3, 8, 8)
    inputs = {
        "input_ids": open_clip.get_tokenizer("ViT-H-14")(PROMPTS),
        "pixel_values": clip_preprocess(images, 8, True),
    }
    with torch.no_grad():
        published = model(**inputs).logits_per_image.diagonal()
        assert torch.allclose(reward.logit_scale * reward(images, PROMPTS), published, atol=1e-4)
    assert reward.fingerprint()["tokenizer"] == "clip-bpe"


def test_aesthetic_heads_are_told_apart(clip_folder, tmp_path):
    scores = [aesthetic(clip_folder, tmp_path, kind)(pixels(2, 3, 16, 16), ["", ""]) for kind in ("mlp", "linear")]
    assert not torch.allclose(*scores)
    assert set(make_head("linear", 768).state_dict()) == {"weight", "bias"}
    names = {f"layers.{i}.{part}" for i in (0, 2, 4, 6, 7) for part in ("weight", "bias")}
    assert set(make_head("mlp", 768).state_dict()) == names, "those of sac+logos+ava1-l14-linearMSE.pth"
    with pytest.raises(UsageError, match="not those of the linear head"):
        options = {"antialias": True, "device": "cpu"}
        AestheticReward.load(clip_folder, head="linear", head_path=tmp_path / "mlp.pth", **options)


def test_missing_files_are_named(clip_folder, tmp_path):
    with pytest.raises(UsageError, match=r"config\.json: missing"):
        PickScoreReward.load(tmp_path, antialias=True, device="cpu")
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    with pytest.raises(UsageError, match=r"model\.safetensors: missing"):
        PickScoreReward.load(tmp_path, antialias=True, device="cpu")
    save_file({"logit_scale": torch.tensor(1.0)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"\d+ tensors missing from the files"):
        PickScoreReward.load(tmp_path, antialias=True, device="cpu")


def test_fingerprints_tell_all_rewards_apart(rewards, clip_folder):
    prints = [reward.fingerprint() for reward in rewards.values()]
    prints += [PickScoreReward.load(clip_folder, antialias=False, device="cpu").fingerprint()]
    prints += [
        ViewedReward(rewards["hps"], blur_sigma=s, random_crop=c).fingerprint() for s, c in ((1.0, 0.5), (0.8, None))
    ]
    prints += [rewards["sum"].fingerprint() | {"terms": list(reversed(rewards["sum"].fingerprints()))}]
    assert len({fingerprint_id(p) for p in prints}) == len(prints)
    plain = ViewedReward(rewards["hps"], blur_sigma=0.0, random_crop=None)
    assert plain.fingerprint() == rewards["hps"].fingerprint(), "no view, no other reward"


# ---- blur and crop ----------------------------------------------------------------------


def test_a_blurred_reward_does_not_see_fine_noise():
    reward = tiny.expert(antialias=False)
    noisy = (0.2 + 0.6 * (torch.arange(16) % 2)).expand(1, 3, 16, 16)
    flat = torch.full_like(noisy, 0.5)
    gaps = {}
    for sigma in (0.0, 2.0):
        viewed = ViewedReward(reward, blur_sigma=sigma, random_crop=None)
        gaps[sigma] = float((viewed(noisy, PROMPTS[:1]) - viewed(flat, PROMPTS[:1])).abs())
    assert gaps[2.0] < 0.1 * gaps[0.0]


def test_windows_lie_where_they_are_told():
    images = torch.arange(2 * 16 * 16.0).view(2, 1, 16, 16)
    places = torch.tensor([[0.0, 0.0], [0.999, 0.5]])
    out = crop(images, 0.5, places)
    assert torch.equal(out[0], images[0, :, :8, :8]) and torch.equal(out[1], images[1, :, 8:, 4:12])
    assert torch.equal(crop(images, 0.5, None), images[..., 4:12, 4:12])
    assert torch.equal(crop(images, 1.0, places), images)


def test_a_window_belongs_to_its_own_image():
    viewed = ViewedReward(tiny.expert(), blur_sigma=0.0, random_crop=0.5)
    images, places = pixels(3, 3, 16, 16), pixels(3, 2, seed=4)
    scores, order = viewed(images, PROMPTS, places), [2, 0, 1]
    again = viewed(images[order], [PROMPTS[i] for i in order], places[order])
    assert torch.allclose(again, scores[order], atol=1e-6)
    assert not torch.allclose(viewed(images, PROMPTS), scores, atol=1e-4)


# ---- sums -------------------------------------------------------------------------------


def test_a_sum_is_standardised_by_what_it_was_calibrated_on(rewards):
    parts, weights = [rewards["hps"], rewards["aesthetic mlp"]], [2.0, 0.5]
    total = WeightedReward(parts, weights, standardise=True, balance=False)
    images, prompts = pixels(24, 3, 16, 16), PROMPTS * 8
    total.calibrate(images, prompts)
    wanted = torch.zeros(24)
    for part, weight in zip(parts, weights, strict=True):
        scores = part(images, prompts)
        wanted += weight * (scores - scores.mean()) / scores.std()
    assert torch.allclose(total(images, prompts), wanted, atol=1e-4)
    fresh = WeightedReward(parts, weights, standardise=True, balance=False)
    fresh.load_state_dict(total.state_dict())
    assert torch.equal(fresh(images, prompts), total(images, prompts))
    with pytest.raises(UsageError, match=r"terms\.0: hps scores all 2 calibration images alike"):
        total.calibrate(pixels(1, 3, 16, 16).expand(2, 3, 16, 16), PROMPTS[:1] * 2)


def test_a_difference_in_rounding_is_no_spread():
    reward = CallableReward(lambda images, prompts: [0.25 + i * 2**-25 for i in range(len(prompts))], "constant")
    with pytest.raises(UsageError, match="alike"):
        WeightedReward([reward], [1.0], standardise=True, balance=False).calibrate(pixels(4, 3, 8, 8), [""] * 4)


def test_balanced_terms_pull_by_their_weights(rewards):
    steep = CallableScale(rewards["hps"], 1000.0)
    images = pixels(2, 3, 16, 16).requires_grad_()

    def pull(reward) -> torch.Tensor:
        return torch.autograd.grad(reward(images, PROMPTS[:2]).sum(), images)[0]

    lone = [pull(r) for r in (steep, rewards["aesthetic mlp"])]
    for weights in ([1.0, 1.0], [3.0, 1.0]):
        total = WeightedReward([steep, rewards["aesthetic mlp"]], weights, standardise=False, balance=True)
        for i in range(2):
            units = [g[i].flatten() / g[i].norm() for g in lone]
            found = torch.linalg.lstsq(torch.stack(units, 1), pull(total)[i].flatten()).solution
            assert float(found[0] / found[1]) == pytest.approx(weights[0] / weights[1], rel=1e-3)
        plain = WeightedReward([steep, rewards["aesthetic mlp"]], weights, standardise=False, balance=False)
        assert torch.allclose(total(images, PROMPTS[:2]), plain(images, PROMPTS[:2])), "values are not touched"


class CallableScale:
    """A reward × a factor, so that its gradient is steep."""

    name, differentiable = "steep", True

    def __init__(self, reward, factor: float) -> None:
        self.reward, self.factor = reward, factor

    def fingerprint(self) -> dict:
        return {"name": self.name, "factor": self.factor}

    def __call__(self, images, prompts):
        return self.factor * self.reward(images, prompts)


# ---- any function -----------------------------------------------------------------------


def brightness(images, prompts):
    return [float(image.mean()) for image in images.numpy()]


def test_any_function_is_a_reward():
    reward = CallableReward(brightness, "brightness")
    images = pixels(2, 3, 4, 4).requires_grad_()
    scores = reward(images, ["", ""])
    assert torch.allclose(scores, images.mean((1, 2, 3))) and not scores.requires_grad
    assert not reward.differentiable and reward.logit_scale is None
    assert reward.fingerprint()["code"].endswith(":brightness") and len(reward.fingerprint()["code_sha256"]) == 64
    with pytest.raises(RgbenchError, match=r"shape \(2, 1\) for 2 images"):
        CallableReward(lambda images, prompts: [[1.0], [2.0]], "column")(images, ["", ""])
