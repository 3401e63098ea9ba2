"""Learning rates, and the positives of SupContrast."""

import copy
import dataclasses
import math

import pytest
import torch

from moco import augment, baselines, encoders, methods, options


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


def test_supcontrast_against_its_formula():
    """That of main_supcon.py, one exponential at a time in float64, and the health of its contrast."""
    torch.manual_seed(0)
    model = baselines.SupContrast(encoders.build("resnet20"), 8, 0.2)
    model.measure_health = True
    im_1, im_2, labels = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8), [3, -1, 3, -1, 2, 3]
    z = copy.deepcopy(model.encoder_q)(torch.cat([im_1, im_2])).detach().double()
    z /= z.norm(dim=1, keepdim=True)
    s, total, similarity, number = (z @ z.T / 0.2).tolist(), 0, 0, 0
    for i in range(12):
        others = [a for a in range(12) if a != i]
        chosen = [a for a in others if a % 6 == i % 6 or labels[a % 6] == labels[i % 6] != -1]
        everything = sum(math.exp(s[i][a]) for a in others)
        total -= sum(math.log(math.exp(s[i][p]) / everything) for p in chosen) / len(chosen)
        similarity += sum(0.2 * s[i][p] for p in chosen) / len(chosen)
        number += len(chosen)
    loss = model(im_1, im_2, torch.tensor(labels))
    assert loss.item() == pytest.approx(total / 12 * 0.2 / 0.07, rel=1e-5)
    health = model.health.tolist()
    assert health[1] == pytest.approx(similarity / 12, abs=1e-5)
    assert health[3] == pytest.approx(number / 12)


@pytest.mark.parametrize("name", methods.ALL)
def test_a_model_has_the_values_of_its_options(name):
    method = methods.ALL[name]
    given = "--moco-dim 6 --moco-k 5 --moco-m 0.7 --moco-t 0.3 --mlp" if method.shuffle_keys else ""
    given = "--dim 6 --temp 0.3" if name == "main_supcon.py" else given
    parser = options.pretrain_parser("", method.add_options, method.defaults)
    args = parser.parse_args([*given.split(), "--bn-splits=2"])
    model = method.build(method.model, encoders.build("resnet20"), args, 4)
    assert type(model) is method.model and model.encoder_q.bn1.splits == 2
    if name != "main_ce.py":
        assert model.T == 0.3 and model.encoder_q.fc[2].out_features == 6
    if method.shuffle_keys:
        assert model.m == 0.7 and model.queue.shape == (6, 5)


PLUS = dict(size=32, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2)
PLUS |= dict(gray_first=False, blur_p=0.5, blur=(0.1, 2.0), flip_p=0.5, padding=None)
CROPS = PLUS | dict(jitter=None, gray_p=0, blur_p=0)
OWN = dict.fromkeys(methods.ALL, PLUS | dict(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, gray_first=True, blur_p=0))
OWN |= {"main_supcon.py": PLUS | dict(blur_p=0), "main_ce.py": CROPS}


@pytest.mark.parametrize("script", methods.ALL)
def test_the_views_of_each_script(script):
    method, others = methods.ALL[script], {"plus": PLUS, "mild": CROPS | dict(scale=(0.5, 1.0))}
    cases = {"": OWN[script], "--aug-crop": CROPS | dict(padding=4)}
    for option, wanted in (cases | {f"--aug-{name}": wanted for name, wanted in others.items()}).items():
        args = options.pretrain_parser("", method.add_options).parse_args([option] if option else [])
        views = [dataclasses.asdict(recipe) for recipe in method.recipes(args)]
        assert views == [wanted] * (1 if script == "main_ce.py" else 2), option
    assert dataclasses.asdict(augment.LINEAR) == CROPS | dict(scale=(0.08, 1.0))  # of main_lincls.py
