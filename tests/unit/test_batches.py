"""Decoded images become a batch without a change."""

import numpy as np
import torch

from rgbench.data.samples import to_batch


def test_a_batch_holds_each_value_as_torch_divides_it():
    images = np.random.default_rng(0).permutation(np.arange(768, dtype=np.uint16) % 256).astype(np.uint8)
    images = images.reshape(2, 8, 16, 3)
    batch = to_batch(list(images))
    assert batch.dtype == torch.float32 and batch.is_contiguous()
    assert torch.equal(batch, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
