"""Learning rates, and the positives of SupContrast."""

import math

import pytest
import torch

from moco import baselines, encoders, methods


@pytest.mark.parametrize("splits", [1, 2])
def test_positives_of_supcontrast(splits, monkeypatch):
    """Other views with the anchor's label; the only positive of an unlabelled anchor is its other view."""
    torch.manual_seed(0)
    model = baselines.SupContrast(encoders.build("resnet20"), 8, bn_splits=splits)
    labels = torch.tensor([3, -1, 3, -1, -1, 2, -1, 0])
    seen = []
    loss = baselines.out_loss
    monkeypatch.setattr(baselines, "out_loss", lambda *masks: seen.append(masks) or loss(*masks))
    model(torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8), labels)
    _, positives, contrast = seen[0]
    # The image of each row: a chunk has its first views, then its second views.
    images = torch.arange(8).view(splits, 1, -1).expand(-1, 2, -1).flatten().tolist()
    for row, image in enumerate(images):
        same = {image} if labels[image] < 0 else set((labels == labels[image]).nonzero().flatten().tolist())
        expected = [j for j, other in enumerate(images) if other in same and j != row]
        assert (positives & contrast)[row].nonzero().flatten().tolist() == expected
        assert len(expected) == (3 if labels[image] == 3 else 1)


def test_schedule_at_each_boundary():
    def rate(moment, warm_up=5, schedule=None):
        return methods.moco_learning_rate(moment, 0.4, 1000, warm_up, schedule)

    assert rate(0) == 0
    assert rate(2.5) == pytest.approx(0.2)
    assert rate(5 - 1e-9) == pytest.approx(0.4) == rate(5)
    assert rate(502.5) == pytest.approx(0.2)
    assert rate(1000 - 1e-6) == pytest.approx(0, abs=1e-9)
    assert rate(300) == pytest.approx(0.2 * (1 + math.cos(math.pi * 295 / 995)))
    for moment, wanted in (
        (2.5, 0.2),
        (5, 0.4),
        (599.99, 0.4),
        (600, 0.04),
        (799.99, 0.04),
        (800, 0.004),
        (999, 0.004),
    ):
        assert rate(moment, schedule=[600, 800]) == pytest.approx(wanted)
    assert rate(0, warm_up=0, schedule=[600, 800]) == 0.4


def test_the_schedule_of_supcontrasts_authors_at_each_boundary():
    """Their epochs count from 1: epoch e has the cosine at e, and a warm-up of ten epochs ends at the cosine of epoch 10."""
    lowest = 0.5 * 0.1**3

    def rate(moment, warm_up=10):
        return methods.supcon_learning_rate(moment, 0.5, 1000, warm_up)

    def theirs(count):
        return lowest + (0.5 - lowest) * (1 + math.cos(math.pi * count / 1000)) / 2

    assert rate(0) == 0.01
    assert rate(5) == pytest.approx((0.01 + theirs(10)) / 2)
    assert rate(9.98) == pytest.approx(0.01 + 0.998 * (theirs(10) - 0.01))
    assert rate(10 - 1e-12) == pytest.approx(theirs(10)) and theirs(10) < 0.4999
    for ours, count in ((10, 11), (10.99, 11), (11, 12), (499, 500), (998.5, 999), (999, 1000), (999.99, 1000)):
        assert rate(ours) == pytest.approx(theirs(count), rel=1e-12), ours
    assert rate(999) == pytest.approx(lowest)
    assert rate(0, warm_up=0) == rate(0.99, warm_up=0) == pytest.approx(theirs(1))
