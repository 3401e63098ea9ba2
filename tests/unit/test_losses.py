"""The losses against their formulas, written as loops in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from moco.losses import contrast_health, in_loss, info_nce, out_loss


def formula(logits, positives, contrast, inside):
    """L_in (`inside`) or L_out: the mean over the rows with a positive, one exponential at a time."""
    total, rows = 0, 0
    for i in range(len(logits)):
        members = [a for a in range(logits.shape[1]) if contrast[i, a]]
        chosen = [p for p in members if positives[i, p]]
        if not chosen:
            continue
        top = max(logits[i, a].item() for a in members)
        denominator = sum((logits[i, a] - top).exp() for a in members)
        ratios = [(logits[i, p] - top).exp() / denominator for p in chosen]
        if inside:
            total = total - (sum(ratios) / len(ratios)).log()
        else:
            total = total + sum(-ratio.log() for ratio in ratios) / len(ratios)
        rows += 1
    return total / rows


def case(n=6, m=17, scale=3.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, m, generator=rng, dtype=torch.float64)
    positives = torch.rand(n, m, generator=rng) < 0.3
    positives[:, 0] = True
    contrast = torch.rand(n, m, generator=rng) < 0.8
    contrast[:, 0] = True
    return logits, positives, contrast


ALL = torch.ones(6, 17, dtype=torch.bool)


def leaves(logits):
    """The same values as a leaf in float32 and one in float64."""
    return logits.float().requires_grad_(), logits.clone().requires_grad_()


@pytest.mark.parametrize("seed", range(4))
def test_in_and_out_against_their_formulas(seed):
    logits, positives, contrast = case(seed=seed)
    for loss, inside, mask in ((in_loss, True, None), (out_loss, False, None), (out_loss, False, contrast)):
        ours, theirs = leaves(logits)
        value = loss(ours, positives) if mask is None else loss(ours, positives, mask)
        wanted = formula(theirs, positives, ALL if mask is None else mask, inside)
        assert value.dtype == torch.float32 and value.shape == ()
        assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
        value.backward()
        wanted.backward()
        assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-6)


def test_info_nce_is_the_cross_entropy_of_the_own_key():
    rng = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(5, 8, generator=rng, dtype=torch.float64), dim=1) for _ in range(2))
    queue = F.normalize(torch.randn(8, 11, generator=rng, dtype=torch.float64), dim=0)
    wanted = 0
    for i in range(5):
        own = math.exp(q[i] @ k[i] / 0.1)
        wanted -= math.log(own / (own + sum(math.exp(q[i] @ queue[:, a] / 0.1) for a in range(11)))) / 5
    assert info_nce(q.float(), k.float(), queue.float(), 0.1).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
def test_large_logits(scale):
    logits, positives, contrast = case()
    logits = (logits / logits.abs().max() * scale).float().double()
    for value, wanted, leaf, exact in large_losses(logits, positives, contrast):
        assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
        value.backward()
        wanted.backward()
        assert leaf.grad.isfinite().all()
        # A gradient is an exponential of a difference of logits, and float32 rounds each to 2^-24 of `scale`.
        assert torch.allclose(leaf.grad.double(), exact.grad, atol=scale * 2**-22)


def large_losses(logits, positives, contrast):
    def by_logarithms(logits, mask, inside):
        denominator = logits.masked_fill(~mask, -math.inf).logsumexp(1, keepdim=True)
        log_ratio = logits - denominator
        chosen = positives & mask
        if inside:
            rows = chosen.sum(1).log() - log_ratio.masked_fill(~chosen, -math.inf).logsumexp(1)
        else:
            rows = -(log_ratio * chosen).sum(1) / chosen.sum(1)
        return rows.mean()

    ours, exact = zip(*(leaves(logits) for _ in range(3)), strict=True)
    yield in_loss(ours[0], positives), by_logarithms(exact[0], ALL, True), ours[0], exact[0]
    yield out_loss(ours[1], positives), by_logarithms(exact[1], ALL, False), ours[1], exact[1]
    yield out_loss(ours[2], positives, contrast), by_logarithms(exact[2], contrast, False), ours[2], exact[2]


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_a_constant_added_to_all_logits_changes_nothing(shift):
    logits, positives, contrast = case()
    shifted = (logits + shift).float()
    logits = shifted.double() - shift
    for loss, masks in ((in_loss, [positives]), (out_loss, [positives]), (out_loss, [positives, contrast])):
        assert loss(shifted, *masks).item() == pytest.approx(loss(logits, *masks).item(), abs=2e-3)


def test_the_order_of_the_columns_does_not_matter():
    logits, positives, contrast = case()
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    masks = positives[:, order], contrast[:, order]
    for loss, number in ((in_loss, 1), (out_loss, 1), (out_loss, 2)):
        wanted = loss(logits, *(positives, contrast)[:number]).item()
        assert loss(logits[:, order], *masks[:number]).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_converted_to_float32(dtype):
    logits, positives, contrast = case()
    logits = logits.to(dtype)
    for loss in (in_loss, out_loss):
        assert loss(logits, positives).dtype == torch.float32
        assert loss(logits, positives) == loss(logits.float(), positives)
    assert out_loss(logits, positives, contrast) == out_loss(logits.float(), positives, contrast)
    q, k, queue = logits[:, :8], logits[:, 8:16], logits[:, :11].T @ logits[:, :6]
    q, k, queue = q[:, :6], k[:, :6], queue[:6]
    assert info_nce(q, k, queue, 0.1).dtype == torch.float32
    wanted = info_nce(q.float(), k.float(), queue.float(), 0.1)
    assert info_nce(q, k, queue, 0.1) == wanted
    with torch.autocast("cpu", torch.bfloat16):
        assert info_nce(q.float(), k.float(), queue.float(), 0.1) == wanted
    assert torch.equal(contrast_health(logits, positives, 0.1), contrast_health(logits.float(), positives, 0.1))


@pytest.mark.parametrize("loss", [in_loss, out_loss])
def test_rows_without_a_positive_do_not_count(loss):
    logits, positives, _ = case()
    positives[2] = False
    rest = [0, 1, 3, 4, 5]
    assert loss(logits, positives).item() == pytest.approx(loss(logits[rest], positives[rest]).item(), rel=1e-6)
    logits.requires_grad_()
    loss(logits, positives).backward()
    assert logits.grad[rest].isfinite().all() and (logits.grad[rest] != 0).any(1).all()
    assert (logits.grad[2] == 0).all()
    logits.grad = None
    nothing = loss(logits, torch.zeros_like(positives))
    assert nothing == 0
    nothing.backward()
    assert (logits.grad == 0).all()


def test_a_positive_outside_the_contrast_set_does_not_count():
    logits, positives, contrast = case()
    contrast[:, 0] = False
    logits.requires_grad_()
    out_loss(logits, positives, contrast).backward()
    assert (logits.grad[~contrast] == 0).all()
    assert out_loss(logits, positives, torch.zeros_like(contrast)) == 0


def test_in_is_at_most_out_and_equal_for_one_positive():
    logits, positives, _ = case()
    assert in_loss(logits, positives) < out_loss(logits, positives)  # Jensen's inequality
    one = torch.zeros_like(positives)
    one[:, 0] = True
    wanted = F.cross_entropy(logits, torch.zeros(6, dtype=torch.long)).item()
    assert in_loss(logits, one).item() == pytest.approx(wanted, rel=1e-6)
    assert out_loss(logits, one).item() == pytest.approx(wanted, rel=1e-6)
    assert in_loss(logits, ALL).item() == pytest.approx(math.log(17), rel=1e-6)
    mean = (logits.logsumexp(1) - logits.mean(1)).mean().item()
    assert out_loss(logits, ALL).item() == pytest.approx(mean, rel=1e-6)
    # InfoNCE equals both, with the query's own key as the only positive.
    q, k, queue = logits[:, :4].float(), logits[:, 4:8].float(), logits[:4].float()
    s = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], dim=1) / 0.5
    own = torch.zeros(6, 18, dtype=torch.bool)
    own[:, 0] = True
    for loss in (in_loss, out_loss):
        assert loss(s, own).item() == pytest.approx(info_nce(q, k, queue, 0.5).item(), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("whole", [True, False])
def test_health_against_loops(seed, whole):
    logits, positives, contrast = case(seed=seed)
    logits[~contrast] += 100  # the most similar columns lie outside A(i)
    if whole:
        contrast = ALL
    right, positive, negative, number = 0, [], [], 0
    for i in range(6):
        members = [a for a in range(17) if contrast[i, a]]
        right += bool(positives[i, max(members, key=lambda a: logits[i, a])])
        of_positives = [logits[i, a].item() * 0.2 for a in members if positives[i, a]]
        of_negatives = [logits[i, a].item() * 0.2 for a in members if not positives[i, a]]
        positive.append(sum(of_positives) / max(1, len(of_positives)))
        negative.append(sum(of_negatives) / max(1, len(of_negatives)))
        number += sum(bool(positives[i, a]) for a in members)
    wanted = [right / 6, sum(positive) / 6, sum(negative) / 6, number / 6]
    health = contrast_health(logits.requires_grad_(), positives, 0.2, None if whole else contrast)
    assert health.tolist() == pytest.approx(wanted, rel=1e-4)
    assert health.dtype == torch.float32 and not health.requires_grad


def test_health_without_positives_or_negatives_is_finite():
    logits, _, _ = case()
    for positives in (ALL, ~ALL):
        assert contrast_health(logits, positives, 0.2).isfinite().all()


def weighted(logits, weights, contrast, inside):
    """{row: weighted L_in or L_out} for the rows with a positive, one exponential at a time."""
    rows = {}
    for i in range(len(logits)):
        members = [a for a in range(logits.shape[1]) if contrast[i, a]]
        total = sum(weights[i, p] for p in members)
        if not total:
            continue
        denominator = sum(logits[i, a].exp() for a in members)
        ratios = [(weights[i, p] / total, logits[i, p].exp() / denominator) for p in members if weights[i, p]]
        mean = sum(w * ratio for w, ratio in ratios)
        rows[i] = -mean.log() if inside else sum(-w * ratio.log() for w, ratio in ratios)
    return rows


@pytest.mark.parametrize("seed", range(2))
def test_weights_and_rows_against_their_formulas(seed):
    logits, positives, contrast = case(seed=seed)
    weights = torch.rand(6, 17, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * positives
    weights[1], weights[2] = 0, weights[2] * 1e-3
    for loss, inside, mask in ((in_loss, True, None), (out_loss, False, None), (out_loss, False, contrast)):
        ours, theirs = leaves(logits)
        more = () if mask is None else (mask,)
        losses, counted = loss(ours, weights, *more, reduction="rows")
        wanted = weighted(theirs, weights, ALL if mask is None else mask, inside)
        assert losses.dtype == torch.float32 and losses.shape == counted.shape == (6,)
        assert counted.nonzero().flatten().tolist() == list(wanted) and losses[1] == 0
        assert losses[counted].tolist() == pytest.approx([row.item() for row in wanted.values()], rel=1e-5)
        mean = loss(ours, weights, *more)
        assert mean.item() == pytest.approx(sum(wanted.values()).item() / len(wanted), rel=1e-5)
        mean.backward()
        (sum(wanted.values()) / len(wanted)).backward()
        assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-6)


def test_a_mask_equals_weights_of_0_and_1():
    """The loss and the gradient agree bit for bit."""
    logits, positives, contrast = case()
    positives[1] = False
    for loss, more in ((in_loss, ()), (out_loss, ()), (out_loss, (contrast,))):
        found = []
        for chosen in (positives, positives.float(), positives.long()):
            leaf = logits.clone().requires_grad_()
            value = loss(leaf, chosen, *more)
            value.backward()
            found.append((value, leaf.grad))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_masks_of_another_shape_are_refused():
    logits, positives, contrast = case()
    for loss, masks in (
        (in_loss, [positives[:1]]),
        (out_loss, [positives[:, :1]]),
        (out_loss, [positives, contrast[:1]]),
    ):
        with pytest.raises(ValueError, match="shapes must be equal"):
            loss(logits, *masks)


def test_an_unknown_reduction_is_refused():
    logits, positives, _ = case()
    for loss in (in_loss, out_loss):
        with pytest.raises(ValueError, match="'sum'"):
            loss(logits, positives, reduction="sum")
