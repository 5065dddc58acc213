"""Precision and recall (Kynkäänniemi et al., 2019, arXiv 1904.06991); density and coverage (Naeem et al., 2020).

Density and coverage: arXiv 2002.09797.

    precision  share of generated images inside some real image's ball (radius: distance to its k-th nearest real one)
    recall     share of real images inside some generated image's ball
    density    (1/k) · mean number of real balls that a generated image lies in; may exceed 1
    coverage   share of real images whose ball holds a generated image

Precision and density ask whether images look real, recall and coverage whether the variety is there. The balls of
precision and recall are closed, those of density and coverage open, each as its authors have it, which matters where
images are equal. k = 5 for all four. Distances are Euclidean, in float64, computed in blocks, so that memory does not
grow with n².
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rgbench.core.progress import Track, untracked
from rgbench.metrics.base import SetMetric
from rgbench.metrics.context import Context
from rgbench.metrics.statistics import NUM_GROUPS, cluster_groups, jackknife_interval
from rgbench.metrics.values import Direction, Family, MetricInfo, MetricValue, Protocol

NEAREST = 5
CHUNK = 2048
NAMES = {
    "precision": ("share of images near some real image", Family.SET_DISTANCE),
    "recall": ("share of real images near some image", Family.DIVERSITY),
    "density": ("how many real images are near an image", Family.SET_DISTANCE),
    "coverage": ("share of real images with an image near enough", Family.DIVERSITY),
}
BALLS = "closed for precision and recall, open for density and coverage"


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(m, n) squared Euclidean distances of (m, d) and (n, d) features, never below 0."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    found = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * (x @ y.T)
    return found.clip(min=0)


def radii2(x: np.ndarray, k: int = NEAREST, track: Track = untracked) -> np.ndarray:
    """(n,) squared distance of each row to its k-th nearest other row."""
    out = np.empty(len(x))
    for rows in track(_chunks(len(x)), "radii"):
        i = rows.start
        nearest = np.full((len(rows), 0), np.inf)
        for j in range(0, len(x), CHUNK):
            found = squared_distances(x[i : i + CHUNK], x[j : j + CHUNK])
            if i == j:
                np.fill_diagonal(found, np.inf)  # a row is no neighbour of its own, whatever the rounding
            nearest = np.concatenate([nearest, found], 1)
            if nearest.shape[1] > k:
                nearest = np.partition(nearest, k - 1, axis=1)[:, :k]
        out[i : i + CHUNK] = nearest.max(1)
    return out


def _chunks(num: int) -> list[range]:
    return [range(i, min(i + CHUNK, num)) for i in range(0, num, CHUNK)]


@dataclass(frozen=True)
class Neighbours:
    """Who lies in whose ball.

    Attributes:
        precise: (m,) number of closed real balls that each generated image lies in.
        dense: (m,) number of open real balls that each generated image lies in.
        covered: (n, G) number of generated images of each group in each real image's open ball.
        recalled: (n, G) number of closed generated balls of each group that each real image lies in.
    """

    precise: np.ndarray
    dense: np.ndarray
    covered: np.ndarray
    recalled: np.ndarray


def neighbours(
    generated: np.ndarray,
    real: np.ndarray,
    groups: np.ndarray,
    k: int = NEAREST,
    real_radii2: np.ndarray | None = None,
    track: Track = untracked,
) -> Neighbours:
    """Count memberships.

    Args:
        generated: (m, d) features, m > k.
        real: (n, d), n > k.
        groups: (m,) jackknife group of each generated image.
        k: neighbour that the radius reaches.
        real_radii2: :func:`radii2` of ``real``, where they are known already.
        track: shows progress.
    """
    own = radii2(generated, k, track)
    theirs = radii2(real, k, track) if real_radii2 is None else real_radii2
    of_group = np.eye(groups.max() + 1)[groups]
    per_image, per_group = len(generated), (len(real), of_group.shape[1])
    found = Neighbours(np.zeros(per_image), np.zeros(per_image), np.zeros(per_group), np.zeros(per_group))
    for rows in track(_chunks(len(generated)), "neighbours among real images"):
        for j in range(0, len(real), CHUNK):
            a, b = slice(rows.start, rows.stop), slice(j, j + CHUNK)
            distances = squared_distances(generated[a], real[b])
            inside = distances < theirs[None, b]
            found.precise[a] += (distances <= theirs[None, b]).sum(1)
            found.dense[a] += inside.sum(1)
            found.covered[b] += inside.T.astype(np.float64) @ of_group[a]
            found.recalled[b] += (distances <= own[a, None]).T.astype(np.float64) @ of_group[a]
    return found


def scores(found: Neighbours, keep: np.ndarray, kept_groups: np.ndarray, k: int = NEAREST) -> dict[str, float]:
    """The four values of a part of the generated images; the radii stay those of all.

    Args:
        found: memberships.
        keep: (m,) generated images that count.
        kept_groups: (G,) their groups.
        k: neighbour that the radius reaches.
    """
    return {
        "precision": float((found.precise[keep] > 0).mean()),
        "recall": float((found.recalled[:, kept_groups].sum(1) > 0).mean()),
        "density": float(found.dense[keep].mean()) / k,
        "coverage": float((found.covered[:, kept_groups].sum(1) > 0).mean()),
    }


def _infos(suffix: str) -> tuple[MetricInfo, ...]:
    return tuple(
        MetricInfo.of(f"{name}{suffix}", name.capitalize(), about, Direction.HIGHER, family, decimals=3)
        for name, (about, family) in NAMES.items()
    )


class PrecisionRecall(SetMetric):
    """Precision, recall, density and coverage on the features of the protocol, with jackknife intervals.

    The jackknife leaves out groups of generated images and keeps the radii.

    Args:
        context: with a reference that suits the prompts.

    Raises:
        UsageError: prompts without scenes where the reference is of scenes, or no more than 5 images on a side.
    """

    name = "prdc"
    infos = (*_infos(""), *_infos("_efflite0"))
    min_images = NEAREST + 1

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        jackknife = f"{NUM_GROUPS} groups of images, reference and radii fixed"
        protocol = context.set_protocol(nearest=NEAREST, balls=BALLS, jackknife=jackknife)
        names = [f"{name}{context.features.network.suffix}" for name in NAMES]
        self.planned = tuple((name, Protocol.of(name, protocol)) for name in names)

    def compute(self) -> list[MetricValue]:
        features, track = self.context.features, self.context.track
        real = features.reference_rows()
        groups = cluster_groups(self.context.clusters(len(self.context.prompts)))
        numbers = np.arange(groups.max() + 1)
        theirs = features.remember("radii", lambda: radii2(real, track=track))
        found = neighbours(self.context.rows.everything(), real, groups, real_radii2=theirs, track=track)
        values = scores(found, groups >= 0, numbers >= 0)
        parts = [scores(found, groups != g, numbers != g) for g in numbers]
        without = {name: [part[name] for part in parts] for name in NAMES}
        return [
            MetricValue(
                *planned,
                value=values[name],
                interval=jackknife_interval(values[name], without[name]),
                num_images=len(groups),
                flags=self.context.departures,
                extra={"jackknife": without[name]},
            )
            for planned, name in zip(self.planned, NAMES, strict=True)
        ]
