"""Tokenizer and text encoder of the benchtop world against the libraries they imitate."""

from __future__ import annotations

import math

import pytest
import torch
from open_clip import CLIP
from open_clip.tokenizer import HFTokenizer

from rgbench.benchtop.scenes import captions, sample_scenes, vocabulary
from tools.benchtop.clip import CLIP_CONFIG, contrastive_loss
from tools.benchtop.text_encoder import to_transformers
from tools.benchtop.tokenizer import CONTEXT_LENGTH, bpe_merges, build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(out)
    return out


def test_every_word_is_one_token_and_other_text_falls_back_to_bytes(folder):
    tokenizer = HFTokenizer(str(folder), context_length=CONTEXT_LENGTH)
    for word in vocabulary():
        ids = tokenizer([word])[0]
        assert (ids != 0).sum() == 3, word  # begin, word, end
    assert tokenizer(["zyx é"])[0].count_nonzero() > 5


def test_longest_captions_fit_the_context(folder):
    tokenizer = HFTokenizer(str(folder), context_length=CONTEXT_LENGTH)
    texts = captions(sample_scenes("test", range(2000)), "test", range(2000))
    ids = tokenizer(texts)
    assert (ids.max(1).values == ids.max()).all()  # the end token was never cut off
    assert (ids[:, -1] == 0).all()


def test_merges_rebuild_words():
    assert bpe_merges(["aab", "ab"])[0] == ("a", "b</w>")


def test_text_encoder_equals_open_clips_penultimate_layer(folder):
    torch.manual_seed(0)
    config = {**CLIP_CONFIG["text_cfg"], "vocab_size": 654}
    clip = CLIP(CLIP_CONFIG["embed_dim"], CLIP_CONFIG["vision_cfg"], config).eval()
    encoder = to_transformers(clip.state_dict(), config, CLIP_CONFIG["embed_dim"])
    ids = HFTokenizer(str(folder), context_length=CONTEXT_LENGTH)(
        ["a red ring at the top", "one blue star, in the middle"]
    )
    with torch.no_grad():
        x = clip.token_embedding(ids) + clip.positional_embedding
        for block in clip.transformer.resblocks[:-1]:
            x = block(x, attn_mask=clip.attn_mask)
        torch.testing.assert_close(encoder(ids).last_hidden_state, clip.ln_final(x), rtol=0, atol=1e-6)


def test_equal_scenes_are_not_negatives():
    torch.manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(2, 8), dim=1)
    text = image.clone()
    key = torch.tensor([5, 5])
    apart = torch.tensor([5, 6])
    same = contrastive_loss(image[:1].expand(2, -1), text[:1].expand(2, -1), torch.tensor(100.0), key, key)
    assert float(same) == pytest.approx(math.log(2), abs=1e-5)  # uniform over the two equal ones
    assert contrastive_loss(image, text, torch.tensor(100.0), apart, apart) < 1e-3
