"""MoCo and its variants against a second implementation with loops and lists in float64."""

import argparse
import copy
import inspect
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import on_processes
from moco import distributed, encoders, methods, options, pretrain
from moco.baselines import SupContrast
from moco.builder import UNLABELLED, MoCo, MoCoIn, MoCoOut, MoCoProto, MoCoSupLoss
from processes import ROOT

VARIANTS = [MoCo, MoCoIn, MoCoOut, MoCoSupLoss]


class Tiny(nn.Module):
    """A convolution, a batch norm, a linear layer."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.bn1 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x):
        return self.fc(self.bn1(self.conv1(x)).relu().mean((2, 3)))


def make(variant, splits=1, **options):
    torch.manual_seed(0)
    return variant(Tiny, **{"dim": 8, "K": 20, "m": 0.9, "T": 0.2, "mlp": True, **options}, bn_splits=splits)


def batch(step, n=8):
    rng = torch.Generator().manual_seed(step)
    views = torch.randn(2, n, 3, 6, 6, generator=rng)
    labels = torch.randint(-1, 3, (n,), generator=rng)
    return views[0], views[1], labels


class Reference:
    """MoCo on one process in float64, written as in the formulas."""

    def __init__(self, model):
        self.variant = type(model)
        self.T, self.m, self.K = model.T, model.m, model.K
        self.encoder_q = copy.deepcopy(model.encoder_q).double()
        self.encoder_k = copy.deepcopy(model.encoder_k).double()
        self.keys = list(model.queue.double().T)
        self.labels = [UNLABELLED] * self.K
        self.next = 0

    def loss(self, im_q, im_k, labels):
        q = F.normalize(self.encoder_q(im_q.double()), dim=1)
        with torch.no_grad():
            pairs = zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True)
            for theta_k, theta_q in pairs:
                theta_k.copy_(self.m * theta_k + (1 - self.m) * theta_q)
            k = F.normalize(self.encoder_k(im_k.double()), dim=1)
        labels = labels.tolist()
        self.right, self.positive, self.negative, self.number = [], [], [], []
        total = 0
        for i in range(len(q)):
            members = self.members(i, q, k, labels)
            s = torch.stack([q[i] @ feature / self.T for feature, _, _ in members])
            ratio = s.exp() / s.exp().sum()
            chosen = torch.tensor([own or (label == labels[i] != UNLABELLED) for _, label, own in members])
            if self.variant is MoCo:
                chosen = torch.tensor([own for _, _, own in members])
            if self.variant is MoCoIn:
                total = total - ratio[chosen].mean().log()
            else:
                total = total - ratio[chosen].log().mean()
            self.record(s * self.T, chosen)
        for key, label in zip(k, labels, strict=True):
            self.keys[self.next], self.labels[self.next] = key, label
            self.next = (self.next + 1) % self.K
        return total / len(q)

    def record(self, similarities, chosen):
        similarities, chosen = similarities.tolist(), chosen.tolist()
        self.right.append(chosen[similarities.index(max(similarities))])
        of_positives = [s for s, positive in zip(similarities, chosen, strict=True) if positive]
        of_negatives = [s for s, positive in zip(similarities, chosen, strict=True) if not positive]
        self.positive.append(sum(of_positives) / len(of_positives))
        self.negative.append(sum(of_negatives) / len(of_negatives))
        self.number.append(len(of_positives))

    def health(self):
        return [sum(each) / len(each) for each in (self.right, self.positive, self.negative, self.number)]

    def members(self, i, q, k, labels):
        """(feature, label, is it the query's own key?) of each member of A(i)."""
        queue = [(key, label, False) for key, label in zip(self.keys, self.labels, strict=True)]
        if self.variant is MoCo:
            return [(k[i], labels[i], True), *queue]
        keys = [(k[j], labels[j], j == i) for j in range(len(k))]
        if self.variant is MoCoSupLoss:
            keys += [(q[j], labels[j], False) for j in range(len(q)) if j != i]
        return keys + queue


@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_steps_against_the_formulas(variant):
    """Losses, health, queue, labels, weights and running statistics. The queue of 20 wraps around within a batch of 8."""
    model = make(variant)
    model.measure_health = True
    reference = Reference(model)
    recipe = dict(lr=0.3, momentum=0.9, weight_decay=1e-3)
    ours = torch.optim.SGD(model.encoder_q.parameters(), **recipe)
    theirs = torch.optim.SGD(reference.encoder_q.parameters(), **recipe)
    for step in range(8):
        losses = []
        for optimizer, loss in ((ours, model(*batch(step))), (theirs, reference.loss(*batch(step)))):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=2e-5), step
        assert model.health.tolist() == pytest.approx(reference.health(), rel=1e-4, abs=1e-5), step
    assert torch.allclose(model.queue.T.double(), torch.stack(reference.keys), atol=1e-4)
    assert model.queue_ptr.item() == reference.next == 8 * 8 % 20
    if hasattr(model, "label_queue"):
        assert model.label_queue.tolist() == reference.labels
    for ours, theirs in ((model.encoder_q, reference.encoder_q), (model.encoder_k, reference.encoder_k)):
        wanted = theirs.state_dict()
        for name, value in ours.state_dict().items():  # weights and running statistics
            assert torch.allclose(value.double(), wanted[name].double(), atol=1e-4), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_queue_has_the_last_keys(variant):
    """It wraps around, also within a batch; a batch larger than the queue leaves only its last keys."""
    for size in (20, 8, 5, 3, 1):
        model = make(variant, K=size)
        written = []
        for step in range(5):
            im_q, im_k, labels = batch(step)
            model(im_q, im_k, labels)
            with torch.no_grad():
                encoder = copy.deepcopy(model.encoder_k).train()
                keys = F.normalize(encoder(im_k), dim=1)
            written += list(zip(keys, labels.tolist(), strict=True))
            assert model.queue_ptr.item() == len(written) % size
        for position in range(len(written) - min(size, len(written)), len(written)):
            key, label = written[position]
            assert torch.allclose(model.queue[:, position % size], key, atol=1e-5)
            if hasattr(model, "label_queue"):
                assert model.label_queue[position % size] == label


def test_unfilled_slots_of_the_queue():
    model = make(MoCoOut)
    assert torch.allclose(model.queue.norm(dim=0), torch.ones(20), atol=1e-5)
    assert (model.label_queue == UNLABELLED).all()
    model.measure_health = True
    im_q, im_k, _ = batch(0)
    model(im_q, im_k, torch.full((8,), UNLABELLED))  # the only positive is the query's own key
    assert model.health[3] == 1


def test_momentum_update_and_gradients():
    model = make(MoCoOut)
    before = [p.clone() for p in model.encoder_k.parameters()]
    with torch.no_grad():
        for p in model.encoder_q.parameters():
            p.add_(1)
    model(*batch(0)).backward()
    for old, k, q in zip(before, model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True):
        assert torch.allclose(k, 0.9 * old + 0.1 * q, atol=1e-6)
        assert k.grad is None and not k.requires_grad
        assert q.grad is not None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("splits", [1, 2])
def test_keys_of_shuffled_rows_come_back_in_order(variant, splits):
    """Images that come shuffled, with their `order`, give the same keys as images that the model shuffles itself."""
    im_q, im_k, labels = batch(0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    given = make(variant, splits)
    loss = given(im_q, im_k[order], labels, order=order)
    own = make(variant, splits)
    torch.manual_seed(3)
    drawn = torch.randperm(8)
    torch.manual_seed(3)
    own_loss = own(im_q, im_k, labels)  # draws the same permutation
    if splits == 1:  # one group, so the shuffle does not change batch norm
        assert own_loss.item() == pytest.approx(loss.item(), rel=1e-5)
        assert torch.allclose(given.queue, own.queue, atol=1e-5)
    again = make(variant, splits)
    assert again(im_q, im_k[drawn], labels, order=drawn).item() == pytest.approx(own_loss.item(), rel=1e-6)
    assert torch.allclose(again.queue, own.queue, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_chunks_of_shuffled_keys_by_hand(variant):
    """Each half of the shuffled images is normalised separately; shuffled row j gives key order[j]."""
    im_q, im_k, labels = batch(0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    model = make(variant, splits=2)
    halves = [make(variant).encoder_k(half) for half in im_k[order].chunk(2)]  # batch norm over one half
    wanted = torch.empty(8, 8)
    for j, key in enumerate(F.normalize(torch.cat(halves), dim=1)):
        wanted[order[j]] = key
    model(im_q, im_k[order], labels, order=order)
    assert torch.allclose(model.queue[:, :8].T, wanted, atol=1e-5)
    if hasattr(model, "label_queue"):
        assert model.label_queue[:8].tolist() == labels.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_mode(variant):
    """Batch norm uses its running statistics and does not update them, so chunks and shuffles do not matter."""
    im_q, im_k, labels = batch(0)
    losses = []
    for splits in (1, 2):
        model = make(variant, splits).eval()
        losses.append(model(im_q, im_k, labels))
        for encoder in (model.encoder_q, model.encoder_k):
            assert (encoder.bn1.running_mean == 0).all() and (encoder.bn1.running_var == 1).all()
        keys = F.normalize(model.encoder_k(im_k), dim=1)
        assert torch.allclose(model.queue[:, :8].T, keys, atol=1e-6)
    if variant is not MoCoSupLoss:  # each of its chunks is a contrast set of its own
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)


def test_bn_splits_reproduce_the_batch_norm_of_as_many_processes():
    images = batch(0)[0]
    model = make(MoCo, splits=2)
    halves = []
    for half in images.chunk(2):
        encoder = make(MoCo).encoder_q
        halves.append((F.normalize(encoder(half), dim=1), encoder.bn1.running_mean, encoder.bn1.running_var))
    features = model.encode(model.encoder_q, images)
    assert torch.allclose(features, torch.cat([h[0] for h in halves]), atol=1e-6)
    assert torch.allclose(model.encoder_q.bn1.running_mean, (halves[0][1] + halves[1][1]) / 2, atol=1e-6)
    assert torch.allclose(model.encoder_q.bn1.running_var, (halves[0][2] + halves[1][2]) / 2, atol=1e-6)
    features.sum().backward()


def test_suploss_contrasts_within_a_process():
    """With two chunks, a query is contrasted only with the queries and keys of its own chunk, and with the queue."""
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(8, 8), dim=1) for _ in range(2))
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    two, one = make(MoCoSupLoss, splits=2), make(MoCoSupLoss)
    two.measure_health = one.measure_health = True
    halves, healths = [], []
    for half in (slice(4), slice(4, 8)):
        halves.append(one.objective(q[half], labels[half], k[half], labels[half]))
        healths.append(one.health)
    assert two.objective(q, labels, k, labels).item() == pytest.approx((sum(halves) / 2).item(), rel=1e-6)
    assert torch.allclose(two.health, sum(healths) / 2)


@pytest.mark.parametrize("variant", [MoCoSupLoss, SupContrast])
def test_chunks_of_unequal_size_are_refused(variant):
    im_1, im_2, labels = batch(0)
    with pytest.raises(ValueError, match="does not divide a batch of 8"):
        variant(Tiny, dim=8, T=0.2, bn_splits=3)(im_1, im_2, labels)


@pytest.mark.parametrize("variant", [MoCoOut, SupContrast])
def test_labels_of_another_type_are_refused(variant):
    im_1, im_2, labels = batch(0)
    with pytest.raises(ValueError, match="labels are int64, not"):
        variant(Tiny, dim=8, T=0.2)(im_1, im_2, labels.byte())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_can_be_compiled_as_a_whole(variant):
    """With autograd's functional form of the forward pass, which every backend of torch.compile gets."""
    im_q, im_k, labels = batch(0)
    losses = []
    for wrap in (lambda model: model, partial(torch.compile, backend="aot_eager")):
        torch.manual_seed(0)
        model = variant(Tiny, dim=8, K=20, m=0.9, T=0.2, mlp=True)
        wrapped = wrap(model)
        losses.append([wrapped(im_q, im_k, labels).item() for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_processes_that_shuffle_the_images_themselves():
    """Without `order`, as in a user's own loop: the queue has the keys in the order of the batch, on all processes."""
    (im_q, im_k, labels), models = batch(0), [make(MoCoOut).eval() for _ in range(2)]
    wanted = F.normalize(models[0].encoder_k(im_k), dim=1)

    def step():
        model = models[distributed.rank()]
        model(*(distributed.my_rows(x) for x in (im_q, im_k, labels)))
        return model.queue[:, :8].T, model.label_queue[:8]

    for queue, label_queue in on_processes(step, 2):
        assert torch.allclose(queue, wanted, atol=1e-6) and torch.equal(label_queue, labels)


def test_all_processes_start_with_rank_0s_buffers(monkeypatch):
    model = make(MoCoOut)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "broadcast", lambda x: x.zero_())  # as if rank 0 had zeros
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda model, **how: model)
    distributed.parallel(model, "cpu")
    assert not any(buffer.any() for buffer in model.buffers())


@pytest.mark.parametrize("variant", VARIANTS)
def test_extremes_stay_finite(variant):
    cases = [dict(T=0.01), dict(K=3), dict(K=1), dict(T=1e-3, dim=2)]
    for case in cases:
        for labels in (torch.zeros(8, dtype=torch.long), torch.arange(8)):
            model = make(variant, **case)
            for step in range(3):
                im_q, im_k, _ = batch(step)
                loss = model(im_q, im_k, labels)
                loss.backward()
                assert loss.isfinite()
            assert all(p.grad.isfinite().all() for p in model.encoder_q.parameters())


class InFloat32(Tiny):
    """Autocast does not change it."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


@pytest.mark.parametrize("variant", [*VARIANTS, partial(MoCoProto, classes=3), SupContrast])
def test_autocast_changes_only_the_encoders(variant):
    (im_1, im_2, labels), losses = batch(0), []
    for enabled in (False, True):
        torch.manual_seed(0)
        queue = {} if variant is SupContrast else dict(K=20, m=0.9, mlp=True)
        model = variant(InFloat32, dim=8, T=0.2, **queue)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model(im_1, im_2, *([] if variant is MoCo else [labels])))
    assert torch.equal(*losses)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict(variant):
    model = variant(encoders.build("resnet18"), dim=16, K=32, mlp=True)
    state = model.state_dict()
    inner = {name.removeprefix("encoder_q.") for name in state if name.startswith("encoder_q.")}
    assert {"conv1.weight", "layer4.1.bn2.running_var", "fc.0.weight", "fc.2.bias"} <= inner
    assert {f"encoder_k.{name}" for name in inner} < set(state)
    assert state["queue"].shape == (16, 32) and state["queue_ptr"].shape == (1,)
    others = {name for name in state if not name.startswith("encoder_")} - {"queue", "queue_ptr"}
    assert others == ({"label_queue"} if hasattr(model, "label_queue") else set())
    if hasattr(model, "label_queue"):
        assert state["label_queue"].shape == (32,) and state["label_queue"].dtype == torch.int64


@pytest.mark.parametrize("variant", VARIANTS)
def test_signature_of_the_constructor(variant):
    model = variant(Tiny, 4, 6, 0.5, 0.3, True)
    assert (tuple(model.queue.shape), model.m, model.T) == ((4, 6), 0.5, 0.3)
    assert model.encoder_k.fc[2].out_features == 4
    assert list(inspect.signature(MoCo).parameters)[:6] == ["base_encoder", "dim", "K", "m", "T", "mlp"]


def test_defaults_of_the_constructor():
    model = MoCoIn(Tiny)
    assert (model.queue.shape, model.m, model.T) == ((128, 65536), 0.999, 0.07)
    assert isinstance(model.encoder_q.fc, nn.Linear)


def test_the_builder_imports_no_command_line():
    """Nor data sets or plots: a user's own program does not need them."""
    unwanted = ["moco.options", "moco.datasets", "moco.run", "moco.pretrain", "matplotlib", "sklearn"]
    code = "import sys, moco; found = {'torch'} & set(sys.modules); import moco.builder, moco.baselines; "
    code += "found |= {'moco.augment'} & set(sys.modules); import moco.augment; "
    code += f"print(sorted(found | set({unwanted}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("name", methods.ALL)
def test_the_key_encoder_gets_no_gradient(name):
    """With batch norm over chunks, after a step."""
    method = methods.ALL[name]
    args = options.pretrain_parser("", method.add_options, method.defaults).parse_args(["--bn-splits", "2"])
    args = argparse.Namespace(**vars(args) | dict(moco_k=20, moco_dim=8, dim=8))
    model = method.build(method.model, Tiny, args, 3)
    im_q, im_k, labels = batch(0)
    model(*method.inputs([im_q, im_k][: method.views], labels.clamp(min=0), None)).backward()
    keys = [p for key, p in model.named_parameters() if key.startswith("encoder_k.")]
    assert bool(keys) == method.shuffle_keys
    assert not any(p.requires_grad or p.grad is not None for p in keys)
    assert all(p.grad is not None for key, p in model.named_parameters() if not key.startswith("encoder_k."))


LABELS = torch.tensor([0, 2, -1, 1, 1, -1, 0, 2])


def proto(**options):
    return make(partial(MoCoProto, classes=3), **options)


def test_prototypes_against_the_formula():
    model, plain = proto(), make(MoCoIn)
    im_q, im_k, _ = batch(0)
    prototypes = F.normalize(model.prototypes.detach().double(), dim=1)
    q = F.normalize(plain.encoder_q(im_q).detach().double(), dim=1)
    terms = []
    for i, label in enumerate(LABELS.tolist()):
        if label != UNLABELLED:
            s = torch.stack([q[i] @ c / model.T for c in prototypes]).exp()
            terms.append(-(s[label] / s.sum()).log())
    expected = plain(im_q, im_k, LABELS).item() + (sum(terms) / len(terms)).item()
    assert len(terms) == 6 and model(im_q, im_k, LABELS).item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(model.label_queue, plain.label_queue)


def test_prototypes_get_a_zero_gradient_from_a_batch_without_labels():
    model, plain = proto(), make(MoCoIn)
    im_q, im_k, _ = batch(0)
    labels = torch.full((8,), UNLABELLED)
    loss = model(im_q, im_k, labels)
    loss.backward()
    assert loss.item() == plain(im_q, im_k, labels).item()
    assert torch.equal(model.prototypes.grad, torch.zeros(3, 8))


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
