"""Captions beyond what a reader reads: counted as it cuts them, said once, kept over a resume."""

from __future__ import annotations

import logging

import open_clip
import pytest
from transformers import CLIPTokenizer

from rgbench.data.batches import Batch
from rgbench.rewards.base import num_tokens
from rgbench.rewards.clip import ClipTokenizer
from rgbench.train.base import CaptionTokenizer
from rgbench.train.log import CaptionCount, merge_counts
from tests.parity import tiny
from tests.resume.loops import make_loop

TEXTS = ["a red circle", "a", "two blue squares " * 12]


@pytest.mark.parametrize(
    "tokenizer",
    [
        open_clip.get_tokenizer("ViT-H-14"),
        open_clip.get_tokenizer(f"local-dir:{tiny.CLIP_FOLDER}"),
        CLIPTokenizer.from_pretrained(tiny.TOKENIZER),
    ],
    ids=["open_clip", "open_clip with tokenizer.json", "transformers"],
)
def test_a_text_of_the_limit_is_not_cut_and_one_more_is(tokenizer):
    """Against the tokenizer's own cutting: a row is full exactly from the limit on."""
    short, one, long = num_tokens(tokenizer, TEXTS)
    assert one < short < long and one >= 3
    limit = short
    options = {"padding": "max_length", "truncation": True, "max_length": limit, "return_tensors": "pt"}
    for text, num in zip(TEXTS, (short, one, long), strict=True):
        rows = (
            tokenizer([text], **options).input_ids if isinstance(tokenizer, CLIPTokenizer) else tokenizer([text], limit)
        )
        longer = text + " circle"
        rows_longer = (
            tokenizer([longer], **options).input_ids
            if isinstance(tokenizer, CLIPTokenizer)
            else tokenizer([longer], limit)
        )
        assert (rows == rows_longer).all() == (num >= limit), text


def test_a_published_clips_tokenizer_counts_as_its_own_does(tmp_path):
    own = CLIPTokenizer.from_pretrained(tiny.TOKENIZER)
    assert num_tokens(ClipTokenizer(tiny.TOKENIZER, 32), TEXTS) == num_tokens(own, TEXTS)
    standard = open_clip.get_tokenizer("ViT-H-14")
    assert num_tokens(ClipTokenizer(tmp_path, 77), TEXTS) == num_tokens(standard, TEXTS)


def test_cut_captions_are_counted_and_the_first_is_said(caplog):
    tokenizer = CLIPTokenizer.from_pretrained(tiny.TOKENIZER)
    count = CaptionCount({"text_encoder": CaptionTokenizer(tokenizer, 32), "hps": CaptionTokenizer(tokenizer, 4)})
    batch = Batch(None, [TEXTS[0], TEXTS[2], TEXTS[2]], ["x/1", "x/2", "x/3"])
    with caplog.at_level(logging.WARNING):
        count.add(batch)
        count.add(batch)
    assert count.state_dict() == {"seen": 6, "cut": {"text_encoder": 4, "hps": 6}}
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        f"the caption of x/2 has {num_tokens(tokenizer, TEXTS)[2]} tokens",
        f"the caption of x/1 has {num_tokens(tokenizer, TEXTS)[0]} tokens",
    ]
    again = CaptionCount(count.tokenizers)
    again.load_state_dict(count.state_dict())
    assert merge_counts([again.state_dict(), count.state_dict()]) == {"seen": 12, "cut": {"text_encoder": 8, "hps": 12}}


def test_the_loop_counts_for_the_text_encoder_and_the_reward(tmp_path):
    class Wordy(tiny.TinySource):
        def load(self, indices):
            batch = super().load(indices)
            return Batch(batch.images_BCHW, [batch.prompts[0], *[TEXTS[2]] * (len(indices) - 1)], batch.ids)

    folder = tiny.save_pipeline(tmp_path / "teacher")
    loop = make_loop("rg_lcd", folder, tmp_path / "run", Wordy())
    loop.train_step()
    loop.save()
    wanted = {"seen": 4, "cut": {"text_encoder": 3, "hps": 3}}
    assert loop.run.read()["captions"] == wanted
    again = make_loop("rg_lcd", folder, tmp_path / "run", Wordy())
    again.restore()
    assert again.captions.state_dict() == wanted
