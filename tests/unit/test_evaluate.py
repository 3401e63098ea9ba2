"""kNN, retrieval and accuracy against their formulas, and the memory that kNN takes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import extract
from helpers import on_processes
from moco import augment, batches, datasets, encoders, evaluate


def test_the_vote_does_not_depend_on_the_size_of_its_parts(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    bank, query = (F.normalize(torch.randn(n, 16, generator=rng), dim=1) for n in (999, 50))
    labels = torch.randint(7, (999,), generator=rng)
    similarity, nearest = (query @ bank.T).topk(30)
    votes = torch.zeros(50, 7).scatter_add_(1, labels[nearest], (similarity / 0.1).exp())
    for part_bytes in (1, 4 * 66 * 20, 4 * 66 * 100, 1 << 30):
        monkeypatch.setattr(evaluate, "PART_BYTES", part_bytes)
        assert torch.equal(evaluate.vote(query, bank, labels, 7, 30, 0.1), votes.argmax(1))


def test_a_large_bank_is_kept_in_half_precision(monkeypatch):
    torch.manual_seed(0)
    split = datasets.load("digits", None, True, per_class=20)
    encoder = evaluate.frozen(encoders.build("resnet20")(num_classes=10))
    centre = augment.Centre(8, (0.5,) * 3, (0.5,) * 3)
    full, labels = evaluate.extract(encoder, split, centre)
    monkeypatch.setattr(evaluate, "FULL_BYTES", 4 * full.numel() - 1)
    half, _ = evaluate.extract(encoder, split, centre)
    assert (full.dtype, half.dtype) == (torch.float32, torch.float16) and torch.equal(labels, split.labels)
    assert torch.equal(full.half(), half)
    validation = datasets.load("digits", None, False).of_each_class(slice(10))
    network = encoders.build("resnet20")(num_classes=10)
    accuracies = []
    for bytes_ in (1 << 30, 0):
        monkeypatch.setattr(evaluate, "FULL_BYTES", bytes_)
        accuracies.append(evaluate.knn(network, split, validation, centre))
    assert accuracies[1] == pytest.approx(accuracies[0], abs=2)


class NormAndReLU(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class OtherOrder(nn.Module):
    """Its layers are called in another order than that in which they are defined."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
        self.fc = nn.Flatten()

    def forward(self, x):
        return self.fc(self.bn2(self.conv2(self.bn1(self.conv1(x)))))


def test_a_frozen_encoder_keeps_what_its_layers_do():
    torch.manual_seed(0)
    images = torch.randn(32, 3, 8, 8)
    resnet = encoders.build("resnet20")(num_classes=10)
    resnet.layer1[0].bn2 = NormAndReLU(16)
    for encoder, norms in ((resnet, 1), (OtherOrder(), 2)):
        encoder(3 * images + 1)  # running statistics
        frozen = evaluate.frozen(encoder, keep_fc=True)
        assert sum(isinstance(layer, nn.BatchNorm2d) for layer in frozen.modules()) == norms
        assert torch.allclose(frozen(images), encoder.eval()(images), atol=1e-5)
    with pytest.raises(AttributeError, match="fc"):
        evaluate.frozen(nn.Sequential(nn.Conv2d(3, 5, 3)))


def knn_bytes(images, queries, width, classes):
    """Estimated peak memory: both banks with their labels, a part of the bank with its similarities, and the votes."""
    banks = sum(n * width * (2 if 4 * n * width > evaluate.FULL_BYTES else 4) for n in (images, queries))
    votes = min(queries, evaluate.QUERIES) * 4 * (width + classes)
    return banks + (images + queries) * 8 + evaluate.PART_BYTES + votes


def test_the_memory_of_knn(monkeypatch):
    """The estimate for ImageNet is below 6 GB; with smaller features, a process's peak memory is near the estimate."""
    assert knn_bytes(1_281_167, 50_000, 2048, 1000) <= 6e9
    program = """
import resource, torch
from moco import evaluate
images, queries, width = 60_000, 500, 512
evaluate.FULL_BYTES, evaluate.PART_BYTES = 0, 8 << 20
evaluate.frozen = lambda encoder: encoder
def features(encoder, split, *more):
    out = torch.empty(split, width, dtype=torch.float16)
    for part in out.split(1000):
        part.copy_(torch.randn(len(part), width))
    return out, torch.zeros(split, dtype=torch.long)
evaluate.extract = features
class Images(int):
    classes = range(10)
    __len__ = int
    labelled = lambda self: self
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.ones(9, 9) @ torch.ones(9, 9)
before = peak()
assert evaluate.knn(None, Images(images), Images(queries), None) == 100
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(evaluate, "FULL_BYTES", 0)
    monkeypatch.setattr(evaluate, "PART_BYTES", 8 << 20)
    assert int(done.stdout) < 1.5 * knn_bytes(60_000, 500, 512, 10)


def test_knn_uses_only_labelled_images():
    torch.manual_seed(0)
    encoder = encoders.build("resnet20")(num_classes=8)
    centre = augment.Centre(8, *datasets.STATISTICS["digits"])
    validation = datasets.load("digits", None, False)
    few = datasets.load("digits", None, True, per_class=4)
    partly = datasets.load("digits", None, True, labels_per_class=4)
    accuracy = evaluate.knn(encoder, few, validation, centre)
    assert evaluate.knn(encoder, partly, validation, centre) == accuracy
    assert evaluate.knn(encoder, datasets.load("digits", None, True), validation, centre) != accuracy


def test_there_is_no_confusion_matrix_for_many_classes():
    classes = 10_000
    labels = torch.arange(classes)
    scores = torch.eye(classes)
    scores[0] = scores[1]
    batches = [(scores[:600], labels[:600]), (scores[600:], labels[600:])]
    top1, _, counts, confusion = evaluate.accuracy(lambda x: x, batches, classes)
    assert confusion is None and counts.shape == (2, classes)
    assert top1 == pytest.approx(100 * (classes - 1) / classes) and counts[:, :2].tolist() == [[0, 1], [1, 1]]
    few = evaluate.accuracy(lambda x: x, [(torch.eye(3)[[0, 1, 1]], torch.arange(3))], 3)
    assert few[2].tolist() == [[1, 1, 0], [1, 1, 1]] and few[3].tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]


def neighbours():
    """Features and labels of six overlapping classes of different sizes; the last class has only one image."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate([3, 17, 40, 2, 9, 1])])
    features = torch.randn(6, 8, generator=generator)[labels] + torch.randn(len(labels), 8, generator=generator)
    order = torch.randperm(len(labels), generator=generator)
    return torch.nn.functional.normalize(features[order], dim=1), labels[order]


def test_retrieval_against_its_formula(monkeypatch):
    features, labels = neighbours()
    found = extract.retrieval(features, labels)
    monkeypatch.setattr(extract, "PART_BYTES", 32 * len(labels) * 5)
    assert extract.retrieval(features, labels) == pytest.approx(found)  # in parts of five queries
    scores = []
    for i, (feature, label) in enumerate(zip(features.double(), labels, strict=True)):
        others = [j for j in range(len(labels)) if j != i]
        others.sort(key=lambda j: -float(features[j].double() @ feature))
        hits = [bool(labels[j] == label) for j in others]
        if R := sum(hits):
            average = sum(sum(hits[: r + 1]) / (r + 1) for r in range(R) if hits[r]) / R
            scores.append([hits[0], any(hits[:5]), average])
    assert len(scores) == len(labels) - 1
    assert found == pytest.approx((100 * np.mean(scores, 0)).tolist())
    assert extract.retrieval(features[:2], torch.arange(2)) is None


def test_retrieval_agrees_with_pytorch_metric_learning():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    features, labels = neighbours()
    theirs = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity()),
        device=torch.device("cpu"),
    ).get_accuracy(features, labels)
    first, _, map_at_r = extract.retrieval(features, labels)
    assert 100 * theirs["precision_at_1"] == pytest.approx(first, abs=1e-4)
    assert 100 * theirs["mean_average_precision_at_r"] == pytest.approx(map_at_r, abs=1e-4)


class Pixels(nn.Module):
    """An encoder whose features are the pixels."""

    def __init__(self):
        super().__init__()
        self.one, self.fc = nn.Parameter(torch.ones(1)), nn.Linear(1, 1)

    def forward(self, x):
        return self.fc(self.one * x.flatten(1))


@pytest.mark.parametrize("processes", [1, 3])
def test_knn_and_accuracy_against_their_formulas(processes):
    """The last batch is incomplete, and with three processes empty on two of them."""
    train = datasets.load("digits", None, True).take(torch.arange(401))
    validation = datasets.load("digits", None, False).take(torch.arange(37))
    centre = augment.Centre(8, (0.3,) * 3, (0.4,) * 3, crop=False)
    bank, queries = (F.normalize(centre(split.images).flatten(1).double(), dim=1) for split in (train, validation))
    right = 0
    for query, label in zip(queries, validation.labels, strict=True):
        similarity, nearest = (bank @ query).topk(200)
        votes = torch.zeros(10).double().index_add_(0, train.labels[nearest], (similarity / 0.1).exp())
        right += int(votes.argmax() == label)
    weights = torch.randn(192, 10, generator=torch.Generator().manual_seed(0))
    hits = (centre(validation.images).flatten(1) @ weights).argsort(1, descending=True) == validation.labels[:, None]

    def found():
        knn = evaluate.knn(Pixels(), train, validation, centre, 12)
        images = batches.Centres(validation, centre, 12, torch.device("cpu"))
        return knn, *evaluate.accuracy(lambda x: x.flatten(1) @ weights, images, 10)

    wanted = [right, hits[:, 0].sum().item(), hits[:, :5].any(1).sum().item()]
    for *scores, counts, confusion in on_processes(found, processes):
        assert scores == pytest.approx([100 * number / 37 for number in wanted])
        assert counts[1].tolist() == validation.labels.bincount(minlength=10).tolist() and confusion.sum() == 37
