"""The latent proxy: contract, what learns, saving, and the pair losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from rgbench.core.errors import UsageError
from rgbench.rewards.latent_proxy import LatentCLIP, pair_losses
from tests.parity import tiny


def latents(num: int = 4) -> torch.Tensor:
    return torch.randn(num, 4, 8, 8, generator=torch.Generator().manual_seed(0)) / tiny.SCALING_FACTOR


def test_the_contract():
    proxy = tiny.proxy()
    scores = proxy(latents(), tiny.PROMPTS[:4])
    assert scores.shape == (4,) and scores.abs().max() <= 1
    assert torch.allclose(proxy(latents()[2:3], tiny.PROMPTS[2:3]), scores[2:3], atol=1e-6)
    assert not torch.allclose(proxy(latents(), tiny.PROMPTS[1:5]), scores, atol=1e-3)
    repeated = proxy(latents().repeat(3, 1, 1, 1), tiny.PROMPTS[:4] * 3)
    assert torch.allclose(repeated.view(3, 4), scores.expand(3, 4), atol=1e-6)


def test_latents_are_scaled_before_the_first_layer():
    proxy = tiny.proxy()
    seen = []
    proxy.clip.visual.conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    proxy.encode_latents(latents())
    assert torch.allclose(seen[0], latents() * tiny.SCALING_FACTOR)
    assert seen[0].std() == pytest.approx(1.0, abs=0.1)


def test_saving_and_loading(tmp_path):
    proxy = tiny.proxy()
    proxy.save(tmp_path / "proxy")
    again = LatentCLIP.load(tmp_path / "proxy", "cpu")
    assert torch.equal(again(latents(), tiny.PROMPTS[:4]), proxy(latents(), tiny.PROMPTS[:4]))
    assert not any(p.requires_grad for p in again.parameters())
    (tmp_path / "proxy" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors: missing"):
        LatentCLIP.load(tmp_path / "proxy", "cpu")


def test_weights_of_another_configuration_are_refused(tmp_path):
    proxy = tiny.proxy()
    proxy.config["vision_cfg"]["layers"] = 1
    proxy.save(tmp_path)
    with pytest.raises(UsageError, match=r"are not those of config\.json: "):
        LatentCLIP.load(tmp_path, "cpu")


def test_the_text_tower_comes_from_the_clip():
    vision = {"image_size": 8, "patch_size": 2, "layers": 1, "width": 16, "head_width": 8}
    proxy = LatentCLIP.from_clip(tiny.CLIP_FOLDER, vision, latent_channels=4, latent_scale=0.5)
    clip = tiny.open_clip.create_model(f"local-dir:{tiny.CLIP_FOLDER}")
    own = proxy.clip.state_dict()
    assert all(torch.equal(own[k], v) for k, v in clip.state_dict().items() if not k.startswith("visual."))
    assert own["visual.conv1.weight"].shape == (16, 4, 2, 2)


@pytest.mark.parametrize(
    "image_layers, text_layers, expected",
    [
        (0, 0, {"logit_scale"}),
        (1, 0, {"logit_scale", "visual.transformer.resblocks.1", "visual.ln_post", "visual.proj"}),
        (0, 1, {"logit_scale", "transformer.resblocks.1", "ln_final", "text_projection"}),
        (
            9,
            0,
            {"logit_scale", *(f"visual.transformer.resblocks.{i}" for i in (0, 1)), "visual.ln_post", "visual.proj"},
        ),
    ],
)
def test_what_learns(image_layers, text_layers, expected):
    proxy = tiny.proxy()
    chosen = {id(p) for p in proxy.unfreeze(image_layers, text_layers)}
    names = {name for name, p in proxy.clip.named_parameters() if p.requires_grad}
    assert {id(p) for p in proxy.parameters() if p.requires_grad} == chosen
    assert {next((e for e in expected if n == e or n.startswith(f"{e}.")), n) for n in names} == expected


def test_all_of_a_tower():
    proxy = tiny.proxy()
    proxy.unfreeze("all", 0)
    named = dict(proxy.clip.named_parameters())
    learning = {name for name, p in named.items() if p.requires_grad}
    assert learning == {name for name in named if name.startswith("visual.") or name == "logit_scale"}
    assert len(proxy.unfreeze("all", "all")) == len(named)


def test_a_frozen_text_tower_encodes_a_prompt_list_once():
    calls = []
    proxy = tiny.proxy()
    proxy.clip.token_embedding.register_forward_hook(lambda *_: calls.append(1))
    prompts = ["a red circle", "a blue square"]
    fresh = proxy.encode_texts(prompts)
    proxy.unfreeze("all", 0)
    assert all(torch.equal(proxy.encode_texts(prompts * n), fresh.repeat(n, 1)) for n in (1, 3))
    assert len(calls) == 2, "before unfreezing, and once after"
    proxy.unfreeze("all", 1)
    assert proxy.encode_texts(prompts).requires_grad and proxy.encode_texts(prompts).requires_grad
    assert len(calls) == 4, "a tower that learns encodes anew"


def test_full_size_counts():
    """38.5 M + 354 M parameters, 67.7 M of them trainable."""
    config = {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 64, "patch_size": 4, "layers": 12, "width": 512, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
        "latent_channels": 4,
        "latent_scale": 0.18215,
    }
    with torch.device("meta"):
        proxy = LatentCLIP(config, tiny.CLIP_FOLDER)
    image = sum(p.numel() for p in proxy.clip.visual.parameters())
    total = sum(p.numel() for p in proxy.parameters())
    assert image / 1e6 == pytest.approx(38.5, abs=0.1) and (total - image) / 1e6 == pytest.approx(354, abs=0.5)
    assert sum(p.numel() for p in proxy.unfreeze(1, 5)) / 1e6 == pytest.approx(67.7, abs=0.05)


def test_the_logit_scale_is_held_at_100():
    proxy = tiny.proxy()
    proxy.clip.logit_scale.data.fill_(5.0)
    proxy.clamp_logit_scale()
    assert float(proxy.logit_scale()) == pytest.approx(100, rel=1e-5)


def test_a_proxy_of_other_latents_is_refused():
    proxy = tiny.proxy()
    proxy.check_fits((4, 8, 8), tiny.SCALING_FACTOR, "here")
    with pytest.raises(UsageError, match=r"reads latents of shape \(4, 8, 8\)"):
        proxy.check_fits((4, 16, 16), tiny.SCALING_FACTOR, "here")
    with pytest.raises(UsageError, match="scaling factor"):
        proxy.check_fits((4, 8, 8), 0.5, "here")


# ---- pair losses ------------------------------------------------------------------------

EXPERT = torch.tensor([[2.0, 0.0, -1.0], [1.0, 1.0, 0.0], [0.0, 3.0, 5.0]], dtype=torch.float64)
PROXY = torch.tensor([[0.5, 0.2, 0.1], [0.1, 0.9, -0.4], [0.3, 0.4, 2.0]], dtype=torch.float64)


def test_a_perfect_proxy_has_no_loss():
    losses, agreement = pair_losses(EXPERT, EXPERT.clone(), "kl")
    assert torch.allclose(losses, torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.equal(agreement, torch.ones(3, dtype=torch.float64))


def test_kl_is_summed_over_pairs():
    losses, agreement = pair_losses(EXPERT, PROXY, "kl")
    wanted = torch.zeros(3, dtype=torch.float64)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        e, p = EXPERT[[a, b]].softmax(0), PROXY[[a, b]].log_softmax(0)
        wanted += F.kl_div(p, e, reduction="none").sum(0)
    assert torch.allclose(losses, wanted)
    assert agreement.shape == (3,) and ((agreement * 3) % 1).abs().max() < 1e-12


def test_smooth_gives_no_credit_beyond_the_ground_truth():
    expert = torch.tensor([[2.0], [0.0], [1.0]], dtype=torch.float64)  # prediction above the ground truth, target below
    level = torch.zeros(3, 1, dtype=torch.float64)
    kl, _ = pair_losses(expert, level, "kl")
    smooth, _ = pair_losses(expert, level, "smooth")
    p = torch.tensor([2.0, 1.0], dtype=torch.float64).softmax(0)
    dropped = float((p * (p * 2).log()).sum())  # KL of that pair against (½, ½), which is now its label
    assert float(kl - smooth) == pytest.approx(dropped, rel=1e-12)


def test_cross_entropy_has_the_ground_truth_win():
    expert = torch.tensor([[2.0], [0.0], [1.0]], dtype=torch.float64)
    losses, _ = pair_losses(expert, torch.zeros(3, 1, dtype=torch.float64), "cross_entropy")
    assert float(losses) == pytest.approx(3 * math.log(2))
    right, _ = pair_losses(expert, torch.tensor([[20.0], [0.0], [40.0]], dtype=torch.float64), "cross_entropy")
    assert float(right) < 1e-6


def test_unknown_kind():
    with pytest.raises(ValueError, match="use kl, smooth or cross_entropy"):
        pair_losses(EXPERT, PROXY, "mse")  # type: ignore[arg-type]
