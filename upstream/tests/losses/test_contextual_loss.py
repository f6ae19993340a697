import unittest

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import (
    ContextualLoss,
    ContrastiveLoss,
    CrossBatchMemory,
    SelfSupervisedLoss,
)
from torch.nn.functional import normalize

from .. import TEST_DEVICE, TEST_DTYPES


class Step(torch.autograd.Function):
    """The Heaviside function, with a straight-through estimator in backward."""

    @staticmethod
    def forward(ctx, x):
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * 10


def formula(embeddings, labels, k=4, slack=0.05, margins=(0.75, 0.6), target=0.25):
    """The three terms, as in the paper and the authors' code."""
    x = normalize(embeddings)
    same = labels[:, None] == labels
    not_self = ~torch.eye(len(x), dtype=torch.bool, device=x.device)

    distances = (2 - 2 * x @ x.T).clamp_min(0)
    ordered = distances.detach().sort(1).values
    knn = Step.apply(ordered[:, k - 1 : k] + slack - distances)
    half_knn = Step.apply(ordered[:, k // 2 - 1 : k // 2] + slack - distances)
    size = knn.detach().sum(1, keepdim=True)
    overlap = knn @ knn.T / size
    overlap = overlap + (1 - knn) @ (1 - knn).T / (len(x) - size)
    reciprocal = half_knn * half_knn.T
    expanded = reciprocal @ (0.5 * overlap * knn) / reciprocal.sum(1, keepdim=True)
    errors = (expanded + expanded.T) / 2 - same.to(x.dtype)
    contextual = (errors * not_self).square().mean()

    positive = (margins[0] - x @ x.T)[same & not_self].clamp_min(0)
    negative = (x @ x.T - margins[1])[~same].clamp_min(0)
    contrastive = sum(v.sum() / max(1, int((v > 0).sum())) for v in (positive, negative))
    similarity = ((x @ x.T).mean() - target).square()
    return contextual, contrastive, similarity


class TestContextualLoss(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.labels = torch.arange(8, device=TEST_DEVICE).repeat_interleave(5)
        self.embeddings = torch.randn(8, 7).repeat_interleave(5, 0) + 0.6 * torch.randn(40, 7)
        self.embeddings = self.embeddings.to(TEST_DEVICE)

    def test_equals_the_formula_with_gradients(self):
        for dtype in TEST_DTYPES:
            if dtype == torch.float16:  # rounding changes the neighborhoods
                continue
            embeddings = self.embeddings.clone().to(dtype).detach().requires_grad_()
            loss = ContextualLoss()(embeddings, self.labels)
            loss.backward()
            x = embeddings.detach().double().requires_grad_()
            terms = formula(x, self.labels)
            expected = 0.4 * terms[0] + 0.5 * terms[1] + 0.1 * terms[2]
            expected.backward()
            torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(embeddings.grad.double(), x.grad, rtol=1e-3, atol=1e-5)

    def test_half_precision_is_finite(self):
        for dtype in TEST_DTYPES:
            embeddings = self.embeddings.clone().to(dtype).detach().requires_grad_()
            loss = ContextualLoss()(embeddings, self.labels)
            loss.backward()
            self.assertTrue(loss.isfinite())
            self.assertTrue(embeddings.grad.isfinite().all())

    def test_contrastive_term_takes_tuples(self):
        loss_func = ContextualLoss(contextual_weight=0, similarity_weight=0, contrastive_weight=1)
        a = torch.tensor([0, 5, 10], device=TEST_DEVICE)
        n = torch.tensor([9, 20, 30], device=TEST_DEVICE)
        loss = loss_func(self.embeddings, self.labels, (a, a + 1, a, n))
        x = normalize(self.embeddings.double())
        parts = [(0.75 - (x[a] * x[a + 1]).sum(1)), ((x[a] * x[n]).sum(1) - 0.6)]
        expected = sum(p.clamp_min(0).sum() / max(1, int((p > 0).sum())) for p in parts)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)

    def test_labels_are_required(self):
        with self.assertRaises(ValueError):
            ContextualLoss()(self.embeddings)


class TestContextualLossInWrappers(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)

    def test_cross_batch_memory_equals_the_loss_with_references(self):
        for dtype in TEST_DTYPES:
            loss_func = ContextualLoss()
            memory = CrossBatchMemory(loss_func, embedding_size=8, memory_size=48)
            batches = []
            for _ in range(5):  # fills the memory and wraps around
                embeddings = torch.randn(16, 8, device=TEST_DEVICE).to(dtype)
                labels = torch.randint(4, (16,), device=TEST_DEVICE)
                batches = [*batches, (embeddings, labels)][-3:]
                loss = memory(embeddings, labels)
                ref_emb, ref_labels = (torch.cat(x) for x in zip(*batches))
                # The last references are the batch itself: self pairs are no positive pairs.
                same = labels[:, None] == ref_labels
                self_pairs = torch.zeros_like(same)
                self_pairs[:, -16:].fill_diagonal_(True)
                pairs = (*torch.where(same & ~self_pairs), *torch.where(~same))
                expected = loss_func(embeddings, labels, pairs, ref_emb, ref_labels)
                torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)

    def test_self_supervised_loss_equals_the_loss_with_sample_indices_as_labels(self):
        for dtype in TEST_DTYPES:
            views = [torch.randn(16, 8, device=TEST_DEVICE).to(dtype) for _ in range(2)]
            indices = torch.arange(16, device=TEST_DEVICE)
            loss_func = ContextualLoss(num_neighbors=2)
            expected = loss_func(torch.cat(views), torch.cat([indices, indices]))
            self.assertTrue(torch.equal(SelfSupervisedLoss(loss_func)(*views), expected))
            loss_func = ContextualLoss(num_neighbors=1)
            expected = loss_func(views[0], indices, ref_emb=views[1], ref_labels=indices.clone())
            one_way = SelfSupervisedLoss(loss_func, symmetric=False)
            self.assertTrue(torch.equal(one_way(*views), expected))

    def test_contrastive_term_equals_contrastive_loss(self):
        embeddings = torch.randn(16, 8, device=TEST_DEVICE)
        labels = torch.randint(4, (16,), device=TEST_DEVICE)
        ours = ContextualLoss(contextual_weight=0, similarity_weight=0, contrastive_weight=1)
        theirs = ContrastiveLoss(pos_margin=0.75, neg_margin=0.6, distance=CosineSimilarity())
        torch.testing.assert_close(ours(embeddings, labels), theirs(embeddings, labels))
