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
    """The Heaviside function, with a constant slope in backward."""

    @staticmethod
    def forward(ctx, x):
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * 10


def plain_terms(embeddings, labels, k=4, slack=0.05, margins=(0.75, 0.6), target=0.25):
    """The three terms, as the paper and its authors' code state them."""
    x = normalize(embeddings)
    same = labels[:, None] == labels
    not_self = ~torch.eye(len(x), dtype=torch.bool, device=x.device)

    distances = (2 - 2 * x @ x.T).clamp_min(0)
    ordered = distances.detach().sort(1).values
    near = Step.apply(ordered[:, k - 1 : k] + slack - distances)
    nearest = Step.apply(ordered[:, k // 2 - 1 : k // 2] + slack - distances)
    size = near.detach().sum(1, keepdim=True)
    agreement = near @ near.T / size
    agreement = agreement + (1 - near) @ (1 - near).T / (len(x) - size)
    mutual = nearest * nearest.T
    context = mutual @ (0.5 * agreement * near) / mutual.sum(1, keepdim=True)
    errors = (context + context.T) / 2 - same.to(x.dtype)
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
            if dtype == torch.float16:  # rounding moves neighbours over the step
                continue
            embeddings = self.embeddings.clone().to(dtype).detach().requires_grad_()
            loss = ContextualLoss()(embeddings, self.labels)
            loss.backward()
            x = embeddings.detach().double().requires_grad_()
            terms = plain_terms(x, self.labels)
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

    def test_cross_batch_memory_is_the_loss_with_references(self):
        for dtype in TEST_DTYPES:
            loss_func = ContextualLoss()
            memory = CrossBatchMemory(loss_func, embedding_size=8, memory_size=48)
            batches = []
            for _ in range(5):  # goes round the queue
                embeddings = torch.randn(16, 8, device=TEST_DEVICE).to(dtype)
                labels = torch.randint(4, (16,), device=TEST_DEVICE)
                batches = [*batches, (embeddings, labels)][-3:]
                loss = memory(embeddings, labels)
                ref_emb, ref_labels = (torch.cat(x) for x in zip(*batches))
                # A batch's own rows are the last of the references, and no positives of themselves.
                same = labels[:, None] == ref_labels
                selves = torch.zeros_like(same)
                selves[:, -16:].fill_diagonal_(True)
                pairs = (*torch.where(same & ~selves), *torch.where(~same))
                expected = loss_func(embeddings, labels, pairs, ref_emb, ref_labels)
                torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)

    def test_self_supervised_loss_numbers_the_samples(self):
        for dtype in TEST_DTYPES:
            views = [torch.randn(16, 8, device=TEST_DEVICE).to(dtype) for _ in range(2)]
            numbers = torch.arange(16, device=TEST_DEVICE)
            loss_func = ContextualLoss(num_neighbors=2)
            expected = loss_func(torch.cat(views), torch.cat([numbers, numbers]))
            self.assertTrue(torch.equal(SelfSupervisedLoss(loss_func)(*views), expected))
            loss_func = ContextualLoss(num_neighbors=1)
            expected = loss_func(views[0], numbers, ref_emb=views[1], ref_labels=numbers.clone())
            one_way = SelfSupervisedLoss(loss_func, symmetric=False)
            self.assertTrue(torch.equal(one_way(*views), expected))

    def test_contrastive_part_equals_contrastive_loss(self):
        embeddings = torch.randn(16, 8, device=TEST_DEVICE)
        labels = torch.randint(4, (16,), device=TEST_DEVICE)
        ours = ContextualLoss(contextual_weight=0, similarity_weight=0, contrastive_weight=1)
        theirs = ContrastiveLoss(pos_margin=0.75, neg_margin=0.6, distance=CosineSimilarity())
        torch.testing.assert_close(ours(embeddings, labels), theirs(embeddings, labels))
