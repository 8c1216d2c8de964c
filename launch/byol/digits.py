"""scikit-learn's handwritten digits, 1,797 pictures of 8 x 8: the data, random views of it, and a judge of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

NUM_CLASSES = 10
NUM_TRAIN = 1347  # the rest, by other writers, is for the test


@dataclass(frozen=True)
class Digits:
    """Pictures (count, 1, 8, 8) with values in [0, 1], and their labels (count,)."""

    images: Tensor
    labels: Tensor


def read_digits() -> tuple[Digits, Digits]:
    """For training and for the test, in the order of the file: a cut at random would put each writer in both."""
    read = load_digits()
    images = torch.tensor(read.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(read.target)
    return Digits(images[:NUM_TRAIN], labels[:NUM_TRAIN]), Digits(images[NUM_TRAIN:], labels[NUM_TRAIN:])


def random_views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture turned (20 degrees at most), scaled and sheared (a fifth), moved (a pixel), brighter, and noisy.

    Nothing is mirrored: a digit would be another sign.
    """
    count = len(images)

    def within(limit: float, *shape: int) -> Tensor:
        return (2 * torch.rand(count, *shape, generator=generator) - 1) * limit

    angle, shear, wide, high = within(0.35), within(0.2), 1 + within(0.2), 1 + within(0.2)
    rows = [
        torch.stack([angle.cos() * wide, shear - angle.sin()], dim=1),
        torch.stack([angle.sin(), angle.cos() * high], dim=1),
    ]
    shift = within(0.25, 2, 1)  # the picture is 2 wide in these units
    grid = F.affine_grid(torch.cat([torch.stack(rows, dim=1), shift], dim=2), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return moved * (1 + within(0.3, 1, 1, 1)) + 0.1 * torch.randn(moved.shape, generator=generator)


def nearest_neighbours_accuracy(
    known: Tensor, known_labels: Tensor, asked: Tensor, asked_labels: Tensor, *, num_neighbours: int = 10
) -> float:
    """How often the majority of the nearest `known` features (count, width), by cosine, has the label asked for."""
    similarity = F.normalize(asked, dim=1) @ F.normalize(known, dim=1).T
    nearest = known_labels[similarity.topk(num_neighbours).indices]
    votes = F.one_hot(nearest, NUM_CLASSES).sum(dim=1)
    return (votes.argmax(dim=1) == asked_labels).float().mean().item()
