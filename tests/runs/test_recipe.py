"""What the recipes beyond the published ones add: prototypes, an average of the weights, padded crops, weight decay."""

import os
import signal
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torchvision import transforms
from torchvision.transforms import functional as tv

import moco
from conftest import TINY_MOCO
from moco import augment, checkpoint, pretrain
from moco.builder import UNLABELLED, MoCoIn, MoCoProto
from moco.run import Run
from test_augment import MEAN, STD, images, pillow
from test_builder import Tiny, batch, make
from test_runs import rows

LABELS = torch.tensor([0, 2, -1, 1, 1, -1, 0, 2])


def proto(**options):
    return make(partial(MoCoProto, classes=3), **options)


def test_prototypes_are_the_formula():
    model, plain = proto(), make(MoCoIn)
    im_q, im_k, _ = batch(0)
    prototypes = F.normalize(model.prototypes.detach().double(), dim=1)
    q = F.normalize(plain.encoder_q(im_q).detach().double(), dim=1)
    terms = []
    for i, label in enumerate(LABELS.tolist()):
        if label != UNLABELLED:
            s = torch.stack([q[i] @ c / model.T for c in prototypes]).exp()
            terms.append(-(s[label] / s.sum()).log())
    plain = make(MoCoIn)
    expected = plain(im_q, im_k, LABELS).item() + (sum(terms) / len(terms)).item()
    assert len(terms) == 6 and model(im_q, im_k, LABELS).item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(model.label_queue, plain.label_queue)


def test_a_batch_without_labels_leaves_prototypes_in_the_graph():
    model, plain = proto(), make(MoCoIn)
    im_q, im_k, _ = batch(0)
    nothing = torch.full((8,), UNLABELLED)
    loss = model(im_q, im_k, nothing)
    loss.backward()
    assert loss.item() == plain(im_q, im_k, nothing).item()
    assert torch.equal(model.prototypes.grad, torch.zeros(3, 8))


def test_prototypes_train_resume_and_are_evaluated(run, tmp_path, monkeypatch):
    words = [TINY_MOCO, "--lr 0.1 --epochs 3 --knn-freq 1 --ema 0.9 --nesterov --no-bias-decay --bn-splits 2"]
    assert run("main_moco_proto.py", *words, "--output-dir", tmp_path / "whole").status == 0
    show, seen = Run.show, []

    def interrupt(self, done, **values):
        show(self, done, **values)
        seen.append(done)
        if len(seen) == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "show", interrupt)
    words += ["--output-dir", tmp_path / "cut"]
    assert run("main_moco_proto.py", *words).status == 143
    assert run("main_moco_proto.py", *words, "--resume auto").status == 0
    for name in ("loss", "knn", "top1"):
        assert [row[name] for row in rows(tmp_path / "whole/log.csv")] == [
            row[name] for row in rows(tmp_path / "cut/log.csv")
        ]
    one, two = (checkpoint.load(tmp_path / name / checkpoint.LAST) for name in ("whole", "cut"))
    for key in ("state_dict", "average"):
        assert one[key].keys() == two[key].keys()
        assert all(torch.equal(value, two[key][name]) for name, value in one[key].items())
    # What is evaluated is the average.
    encoder, _ = moco.load_encoder(tmp_path / "whole" / checkpoint.LAST)
    weight = encoder.state_dict()["conv1.weight"]
    assert torch.equal(weight, one["average"]["module.encoder_q.conv1.weight"])
    assert not torch.equal(weight, one["state_dict"]["module.encoder_q.conv1.weight"])


def test_the_average_is_the_formula(run, tmp_path):
    """Of three epochs of one step: e <- 0.5 e + 0.5 w, from the first w on."""
    run("main_moco_in.py", TINY_MOCO, "-b 160 --lr 0.1 --epochs 3 --save-freq 1 --ema 0.5 --output-dir", tmp_path)
    saved = [torch.load(tmp_path / f"checkpoint_{i:04d}.pth.tar", weights_only=True) for i in range(3)]
    name = "module.encoder_q.layer2.0.conv1.weight"
    first, second, third = (s["state_dict"][name].double() for s in saved)
    expected = 0.25 * first + 0.25 * second + 0.5 * third
    assert torch.allclose(saved[2]["average"][name].double(), expected, atol=1e-7)


def test_padded_views_are_torchvisions():
    x, recipe = images(120), augment.PADDED
    parameters = recipe.draw(120, 32, 32, torch.Generator().manual_seed(1))
    ours = augment.Views(recipe, MEAN, STD, "cpu")(x, parameters, (0, 1, 2, 3))
    theirs = []
    for image, row in zip(x, parameters, strict=True):
        top, left = (int(v) + 4 for v in row[:2])
        picture = tv.crop(tv.pad(pillow(image), 4), top, left, 32, 32)
        theirs.append(tv.normalize(tv.to_tensor(tv.hflip(picture) if row[augment.FLIP] else picture), MEAN, STD))
    assert (ours - torch.stack(theirs)).abs().max() < 1e-5


def test_padded_crops_have_torchvisions_distribution():
    count = 20_000
    ours = augment.PADDED.draw(count, 32, 40, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    padded = torch.empty(1, 40, 48)
    theirs = torch.tensor([transforms.RandomCrop.get_params(padded, (32, 32))[:2] for _ in range(count)]) - 4
    for column in (0, 1):
        mine, other = ours[:, column].long(), theirs[:, column]
        assert (mine.min(), mine.max()) == (other.min(), other.max())
        assert (mine.add(4).bincount() - other.add(4).bincount()).abs().max() < 0.02 * count
    assert isinstance(augment.PADDED.transform(MEAN, STD).transforms[0], transforms.RandomCrop)


def test_padded_crops_need_images_of_the_views_size(run, folder):
    place = folder(size=(40, 40), train=8, val=2)
    done = run("main_moco_in.py", "-a resnet20 -b 8 --moco-k 16 --image-size 32 --aug-crop", place)
    assert done.status == 2 and done.err.count("\n") == 1 and "--aug-crop" in done.err


def test_which_parameters_have_no_weight_decay():
    model = proto(mlp=False)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = (
        [names[id(p)] for p in group["params"]] for group in pretrain.parameter_groups(model, no_bias_decay=True)
    )
    assert decayed == ["encoder_q.conv1.weight", "encoder_q.fc.weight"]
    assert set(free) == {"prototypes", *(f"encoder_q.{n}" for n in ("conv1.bias", "bn1.weight", "bn1.bias", "fc.bias"))}
    (group,) = pretrain.parameter_groups(make(MoCoIn), no_bias_decay=False)
    assert len(group["params"]) == len(list(Tiny(8).parameters())) + 2  # the head has one more layer
    assert len(pretrain.parameter_groups(proto(), no_bias_decay=False)[1]["params"]) == 1
