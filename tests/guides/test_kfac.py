"""The Kronecker-factored curvature against sums by hand, and its guide against the posterior that it must be."""

from __future__ import annotations

import pytest
import torch
from pyro import poutine
from torch.distributions import MultivariateNormal

from bora_pyro import FrozenALoRA, Given, HierarchicalNormal, InputError
from bora_pyro.adapters import SharedPlusTaskLoRA
from bora_pyro.data import TokenSplit
from bora_pyro.guides import KfacLaplaceGuide, laplace_guide, laplace_kfac_guide, laplace_kronecker_guide
from bora_pyro.guides.aligned_normal import AlignedNormal
from bora_pyro.guides.curvature import diagonal_fisher, document_gradients
from bora_pyro.guides.kfac import KroneckerCurvature, kfac
from bora_pyro.guides.matrix_normal import from_columns
from bora_pyro.guides.matrix_sides import matrix_sides
from bora_pyro.likelihoods import Choice
from tests.linear_gaussian import LinearGaussian
from tests.tiny import TASKS, VOCABULARY, random_weights, tiny_backbone, tiny_bora, tiny_data, tiny_split
from tests.toy_members import model_with

EVERYTHING = 10_000


def orthonormal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q


def sides(model, theta, split):
    """The vectors of all tokens by latent and layer."""
    return {(each.name, each.layer): each for each in matrix_sides(model, theta, split, token_budget=EVERYTHING)}


def by_task(each, value):
    """Sum of values of the rows of each task."""
    return torch.zeros(TASKS, *value.shape[1:], dtype=value.dtype).index_add(0, each.task, value)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [None, FrozenALoRA(rank=2), SharedPlusTaskLoRA(rank=2)], ids=repr)
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_the_two_sides_give_the_gradients_of_documents(architecture, adapter, checkpointing):
    model, split = tiny_bora(architecture, adapter=adapter, targets="all-linear"), tiny_split()
    if checkpointing:
        model.backbone = tiny_backbone(architecture, targets="all-linear", gradient_checkpointing=True)
    theta, [batch] = random_weights(model), split.batches(token_budget=EVERYTHING)
    expected, found = document_gradients(model, theta, batch), sides(model, theta, split)
    assert len(found) == sum(len(start) for start in model.starts.values())
    for (name, layer), each in found.items():
        assert torch.equal(each.task, batch.task)
        assert torch.equal(each.tokens, batch.predicted)
        gradients = from_columns(each.long.mT @ each.short, expected[name][:, layer])
        torch.testing.assert_close(gradients, expected[name][:, layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("option_score", ["mean", "sum"])
def test_the_two_sides_give_the_gradients_of_questions(option_score, shared):
    """Of all options together, whether they share the row of their prompt or not."""
    weights = torch.tensor([1.0, 2.0, 3.0])
    model = tiny_bora("llama", targets="all-linear", likelihood=Choice(option_score, task_weights=weights))
    assert model.longest_shared
    if not shared:
        model.backbone.longest_shared = 0
    prompt = [0, 9, 8, 7, 6]
    rows = [[*prompt, *option] for option in ([5], [4, 3], [10, 11], [12], [13, 14, 15])]
    more = {"read": [len(prompt)] * 5, "document_index": [0, 0, 1, 1, 1], "correct": [True, False, False, False, True]}
    split = TokenSplit.from_documents(rows, task=[1, 1, 2, 2, 2], num_tasks=TASKS, **more)
    theta, [batch] = random_weights(model), split.batches(token_budget=EVERYTHING)
    task = batch.task[batch.first_rows]
    for (name, layer), each in sides(model, theta, split).items():
        assert len(each.task) == (2 if shared else 5)
        assert by_task(each, each.tokens).tolist() == ([0, 6, 8] if shared else [0, 11, 18])
        expected = document_gradients(model, theta, batch)[name][:, layer] * weights[task].sqrt()[:, None, None]
        gradients = by_task(each, from_columns(each.long.mT @ each.short, expected))
        torch.testing.assert_close(gradients, torch.zeros_like(gradients).index_add(0, task, expected), rtol=1e-4, atol=1e-5)
    assert all(value.along[1:].any() for value in kfac(model, theta, split, axes=EVERYTHING).values())


def test_tokens_count_from_which_something_is_predicted():
    model = tiny_bora("llama", targets=["q_proj", "down_proj"])
    split = TokenSplit.from_documents([[0, 5, 6, 7, 8], [0, 9]], task=[0, 1], num_tasks=TASKS, read=[4, 1])
    for each in sides(model, random_weights(model), split).values():  # the prompt of the first document, too
        assert by_task(each, each.tokens).tolist() == [4, 1, 0]


@pytest.mark.parametrize("axes", [40, 5])
def test_the_curvature_is_the_product_of_sums_over_tokens(axes):
    model, split = tiny_bora(), tiny_split((3, 0, 4))
    theta = random_weights(model)
    found = kfac(model, theta, split, axes=axes, temperature=0.5, token_budget=40)
    for (name, layer), each in sides(model, theta, split).items():
        own, long, short, task = found[name], each.long, each.short, each.task
        axes_long, axes_short, along = own.long[layer], own.short[layer], own.along[:, layer]
        n, k = axes_long.shape
        torch.testing.assert_close(axes_long.mT @ axes_long, torch.eye(k), atol=1e-5, rtol=0)
        moment = short.flatten(0, 1).mT @ short.flatten(0, 1)
        diagonal = axes_short.mT @ moment @ axes_short
        torch.testing.assert_close(diagonal, torch.diag(diagonal.diagonal()), atol=1e-4 * float(diagonal.max()), rtol=0)
        for d in range(TASKS):
            tokens = each.tokens[task == d].sum()
            of_long = (long[task == d] @ axes_long).square().sum((0, 1))
            if k < n:
                of_long = torch.cat([of_long, (long[task == d].square().sum() - of_long.sum())[None] / (n - k)])
            of_short = (short[task == d] @ axes_short).square().sum((0, 1))
            expected = of_long[:, None] * of_short / tokens.clamp(min=1) / 0.5
            torch.testing.assert_close(along[d], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_axes_are_the_largest_eigenvectors():
    model, split = tiny_bora(), tiny_split()
    theta = random_weights(model)
    # 40 axes are all of them, found from the whole matrix, and 5 come from its products with random vectors
    whole, few = (kfac(model, theta, split, axes=axes) for axes in (40, 5))
    shares = []
    for (name, layer), each in sides(model, theta, split).items():
        moment = (each.long.flatten(0, 1).mT @ each.long.flatten(0, 1)).double()
        best = torch.linalg.eigvalsh(moment).flip(0)
        axes = whole[name].long[layer].double()
        torch.testing.assert_close((axes.mT @ moment @ axes).diagonal(), best, rtol=1e-3, atol=1e-4 * float(best[0]))
        axes = few[name].long[layer].double()
        shares.append(float((axes.mT @ moment @ axes).trace() / best[: axes.shape[1]].sum()))
    assert min(shares) > 0.95
    assert max(shares) <= 1 + 1e-6


def one_token_documents(d, *, first=0):
    """All documents of two tokens, of one task: the input of every layer is the same in each of them."""
    return TokenSplit.from_documents([[first, v] for v in range(VOCABULARY)], task=[d] * VOCABULARY, num_tasks=TASKS)


def dense(curvature, layer, d, shape):
    """The curvature of one task at one layer as a matrix over the entries, in the order of ``flatten``."""
    long, short, along = curvature.long[layer], curvature.short[layer], curvature.along[d, layer]
    columns = torch.einsum("nk,rq->kqnr", long, short)
    vectors = torch.stack([from_columns(each, torch.empty(shape)) for each in columns.flatten(0, 1)]).flatten(1)
    return vectors.mT @ torch.diag(along.flatten()) @ vectors


def test_it_is_exact_where_the_information_is_a_kronecker_product():
    model, split = tiny_bora(), one_token_documents(1)
    theta = random_weights(model)
    found = kfac(model, theta, split, axes=EVERYTHING)
    [batch] = split.batches(token_budget=EVERYTHING)
    for name, gradients in document_gradients(model, theta, batch).items():
        for layer in range(gradients.shape[1]):
            g = gradients[:, layer].flatten(1)
            expected = g.mT @ g
            own = dense(found[name], layer, 1, gradients.shape[2:])
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
            assert not found[name].along[0].any()  # a task without documents


def test_the_empirical_information_of_the_model_s_own_documents_is_the_exact_one():
    """Σ_v p(v) g_v g_vᵀ over all tokens v, against documents that the model itself has drawn."""
    model, number = tiny_bora(), 6000
    theta, [every] = random_weights(model), one_token_documents(1).batches(token_budget=EVERYTHING)
    gradients = document_gradients(model, theta, every)
    with torch.no_grad():
        p = model.logits(every, theta)[0, 0].softmax(-1)[every.input_ids[:, 1]]
    drawn = torch.multinomial(p, number, replacement=True, generator=torch.Generator().manual_seed(0))
    documents = [[0, int(every.input_ids[v, 1])] for v in drawn]
    own = TokenSplit.from_documents(documents, task=[1] * number, num_tasks=TASKS)
    diagonal, factors = diagonal_fisher(model, theta, own), kfac(model, theta, own, axes=EVERYTHING)
    for name, gradient in gradients.items():
        exact = number * (p.view(-1, 1, 1, 1) * gradient.square()).sum(0)
        torch.testing.assert_close(diagonal[name][1].sum((1, 2)), exact.sum((1, 2)), rtol=0.1, atol=0)
        torch.testing.assert_close(factors[name].along[1].sum((1, 2)), exact.sum((1, 2)), rtol=0.1, atol=0)


def aligned(*, k, batch=(2,), shape=(1, 3, 4)):
    r, n = sorted(shape[1:])
    generator = torch.Generator().manual_seed(k)
    loc, stretch = torch.randn(*batch, *shape, generator=generator, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    scale = torch.rand(*batch, shape[0], k + (k < n), r, generator=generator, dtype=torch.float64) + 0.1
    long, short = orthonormal(shape[0], n, k, seed=1), orthonormal(shape[0], r, r, seed=2)
    return AlignedNormal(loc, scale, long, short, stretch=stretch, event_dim=3)


def covariance(normal, row):
    """The dense covariance of one event, from the axes and, for the other directions, a basis of them."""
    (n, k), shape = normal.long.shape[-2:], normal.event_shape
    whole = torch.linalg.qr(torch.cat([normal.long, torch.eye(n, dtype=torch.float64).expand(shape[0], n, n)], -1)).Q
    whole = torch.cat([normal.long, whole[..., k:]], -1)
    scale = normal.scale[row]
    scale = torch.cat([scale[..., :k, :], scale[..., k:, :].expand(*scale.shape[:-2], n - k, -1)], -2)
    columns = torch.einsum("lnk,lrq->lkqnr", whole, normal.short)[0].flatten(0, 1)
    vectors = torch.stack([from_columns(each, torch.empty(shape)) for each in columns]).flatten(1)
    return normal.stretch.flatten()[0] ** 2 * vectors.mT @ torch.diag(scale.flatten() ** 2) @ vectors


@pytest.mark.parametrize("shape", [(1, 3, 4), (1, 4, 3), (1, 3, 3)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_aligned_normal_is_the_dense_one(k, shape):
    normal = aligned(k=k, shape=shape)
    value = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for row in range(2):
        reference = MultivariateNormal(normal.loc[row].flatten(), covariance(normal, row))
        torch.testing.assert_close(normal.log_prob(value)[row], reference.log_prob(value[row].flatten()))
    wide = normal.expand((5, 2))
    torch.testing.assert_close(wide.log_prob(value), normal.log_prob(value).expand(5, 2))
    assert wide.rsample().shape == (5, 2, *shape)
    with poutine.seed(rng_seed=0):
        draws = normal.rsample(torch.Size([20_000])).flatten(2)
    for row in range(2):
        expected = covariance(normal, row)
        torch.testing.assert_close(draws[:, row].T.cov(), expected, atol=0.05 * float(expected.diagonal().max()), rtol=0)


@pytest.mark.parametrize("k", [2, 4])
def test_the_guide_is_the_joint_posterior_of_the_mean_and_the_tasks(k):
    """The Hessian of its log-density is the precision of the hierarchy, Dτ and −τ and τ + H_d, with H_d as dense matrices."""
    tau, (r, n) = 3.0, (3, 4)
    model = LinearGaussian(HierarchicalNormal(tau, "centered"), shape=(1, r, n), counts=(1, 2, 3))
    generator = torch.Generator().manual_seed(0)
    along = 5 * torch.rand(3, 1, k + (k < n), r, generator=generator, dtype=torch.float64)
    curvature = KroneckerCurvature(orthonormal(1, n, k), orthonormal(1, r, r, seed=1), along)
    guide = KfacLaplaceGuide(model, model.sites_at_maximum(tau), {"q.x": curvature})
    names = ["prior_mean.q.x", "theta.q.x"]
    start = torch.cat([guide.median()[name].reshape(-1, r * n) for name in names])

    def log_q(flat):
        values = dict(zip(names, (flat.view(4, r * n)[:1].view(1, r, n), flat.view(4, r * n)[1:].view(3, 1, r, n)), strict=True))
        return poutine.trace(poutine.condition(guide, data=values)).get_trace().log_prob_sum()

    found = -torch.autograd.functional.hessian(log_q, start.flatten())
    eye = torch.eye(r * n, dtype=torch.float64)
    expected = torch.kron(torch.eye(4, dtype=torch.float64), tau * eye)
    expected[: r * n, : r * n] *= 3
    for d in range(3):
        place = slice((d + 1) * r * n, (d + 2) * r * n)
        zeros = torch.zeros(1, 1, r, n, dtype=torch.float64)
        normal = AlignedNormal(zeros, along[[d]] ** -0.5, curvature.long, curvature.short, event_dim=3)
        expected[place, place] += torch.linalg.inv(covariance(normal, 0))
        expected[: r * n, place] = expected[place, : r * n] = -tau * eye
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_without_drawing_the_mean_only_the_deviations_are_drawn():
    model, data = tiny_bora(prior=HierarchicalNormal(50.0)), tiny_data()
    for build in (laplace_guide, laplace_kfac_guide):
        guide = build(model, data=data, draw_mean=False)
        with poutine.seed(rng_seed=0):
            trace = poutine.trace(guide).get_trace()
        for name, start in model.starts.items():
            assert torch.equal(trace.nodes[f"prior_mean.{name}"]["value"], start)
            drawn = trace.nodes[f"theta.{name}_decentered"]["value"]
            assert 0.5 < float(drawn.std()) <= 1.1  # in units of the prior


class Bowl:
    """Held-out documents that like the standard deviations of a temperature of 0.1 best."""

    def __init__(self, guide):
        self.guide, self.tokens, self.documents = guide, torch.tensor([3, 0, 4]), torch.tensor([1, 0, 1])
        self.first = guide.kept("curvature", "v_proj.lora_B").clone()

    def nll(self):
        ratio = self.guide.kept("curvature", "v_proj.lora_B").sum() / self.first.sum()
        return (ratio.double().log() - torch.tensor(10.0).log()).square() * self.tokens


@pytest.mark.parametrize("build", [laplace_guide, laplace_kfac_guide, laplace_kronecker_guide])
def test_held_out_documents_choose_the_temperature(build):
    model, data = tiny_bora(), tiny_data()
    guide = build(model, data=data, temperatures="1,0.1,0.01")
    bowl = Bowl(guide)
    found = guide.settle(bowl)
    assert found["temperature"] == 0.1
    assert found["temperatures"]["0.1"] == pytest.approx(0.0, abs=1e-6)
    assert found["temperatures"]["1.0"] == pytest.approx(5.3019, rel=1e-4)
    expected = build(model, data=data, temperature=0.1)
    torch.testing.assert_close(guide.kept("curvature", "v_proj.lora_B"), expected.kept("curvature", "v_proj.lora_B"))
    plain = build(model, data=data)
    assert plain.settle(bowl) == {}  # nothing to choose from
    with pytest.raises(InputError, match=r"temperature is 0.5 and temperatures are '1,2'; leave one of them out"):
        build(model, data=data, temperature=0.5, temperatures="1,2")
    with pytest.raises(InputError, match=r"temperatures is 'x'; give finite numbers above 0 with commas"):
        build(model, data=data, temperatures="x")


def test_bad_input():
    model, data = tiny_bora(), tiny_data()
    with pytest.raises(InputError, match=r"axes is 0; give a whole number from 1 up"):
        laplace_kfac_guide(model, data=data, axes=0)
    with pytest.raises(InputError, match=r"not the matrices of linear maps; use the guide laplace"):
        laplace_kfac_guide(model_with("wrapper"), data=data)
    with pytest.raises(InputError, match=r"latent 'q_proj.change' is not a matrix, .*; use the guide laplace"):
        laplace_kfac_guide(model_with("adapter"), data=data)
    with pytest.raises(InputError, match=r"lets the adapters of all tasks read a document; give a router by task"):
        laplace_kfac_guide(model_with("router"), data=data)
    starts = model.starts
    given = Given(starts, {name: torch.ones_like(start) + torch.arange(start.shape[-1]) for name, start in starts.items()})
    with pytest.raises(InputError, match=r"tau of 'v_proj.lora_A' differs between the entries of a matrix; use the guide"):
        laplace_kfac_guide(tiny_bora(prior=given), data=data)
