"""Set metrics against torch-fidelity on shared features, and the features against their reference package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from rgbench.core.io import load_pickled_state_dict
from rgbench.metrics.fid import Moments, frechet_distance
from rgbench.metrics.kid import kid
from rgbench.metrics.networks import EffLite0Features, efflite0_input, efflite0_weights


def features(num: int, dim: int, seed: int) -> torch.Tensor:
    """Correlated, skewed, non-negative features of unequal scales, as pooled activations are."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = torch.randn(num, dim, generator=g, dtype=torch.float64) @ (mixing / dim**0.5)
    return torch.nn.functional.softplus(x + 0.1 * seed)


@pytest.mark.parametrize(
    ("num", "other", "dim", "rel"),
    [(1000, 1500, 48, 1e-9), (400, 400, 128, 1e-9), (60, 900, 128, 1e-6), (90, 70, 200, 1e-6)],
)
def test_frechet_equals_torch_fidelity(num, other, dim, rel):
    a, b = features(num, dim, 1), features(other, dim, 2)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False)
    ours = frechet_distance(Moments.of(a.numpy()), Moments.of(b.numpy()))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=rel)


def test_kid_equals_torch_fidelity():
    a, b = features(300, 32, 1), features(250, 32, 2)
    theirs = kid_features_to_metric(
        a,
        b,
        kid_subsets=7,
        kid_subset_size=100,
        rng_seed=3,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
        verbose=False,
    )
    ours = kid(a.numpy(), b.numpy(), subsets=7, size=100, seed=3)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert np.isfinite(ours)


def test_features_equal_the_reference_package():
    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(load_pickled_state_dict(efflite0_weights()))
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.extract_features(efflite0_input(images)).mean((2, 3))
    torch.testing.assert_close(EffLite0Features()(images), expected, atol=1e-4, rtol=1e-4)
