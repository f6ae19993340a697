import unittest

import torch
from pytorch_metric_learning.losses import CenterContrastiveLoss
from torch.nn.functional import normalize

from .. import TEST_DEVICE, TEST_DTYPES


def formula(embeddings, centers, labels, scale, margin, center_weight):
    x, c = normalize(embeddings), normalize(centers)
    losses = []
    for i, y in enumerate(labels):
        logits = scale * (c @ x[i])
        logits[y] -= scale * margin
        cross_entropy = logits.logsumexp(0) - logits[y]
        losses.append(cross_entropy + center_weight * (x[i] - c[y]).square().sum())
    return torch.stack(losses).mean()


class TestCenterContrastiveLoss(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.labels = torch.randint(10, (32,)).to(TEST_DEVICE)

    def test_equals_the_formula_with_gradients(self):
        for dtype in TEST_DTYPES:
            loss_func = CenterContrastiveLoss(
                10,
                8,
                scale=12,
                margin=0.1,
                center_weight=0.7,
                negative_classes="all",
            )
            loss_func = loss_func.to(TEST_DEVICE)
            embeddings = torch.randn(32, 8, device=TEST_DEVICE).to(dtype).requires_grad_()
            loss = loss_func(embeddings, self.labels)
            loss.backward()

            x = embeddings.detach().double().requires_grad_()
            centers = loss_func.centers.detach().double().requires_grad_()
            expected = formula(x, centers, self.labels, 12, 0.1, 0.7)
            expected.backward()
            rtol, atol = (1e-2, 1e-3) if dtype == torch.float16 else (1e-4, 1e-6)
            for actual, reference in [
                (loss, expected),
                (embeddings.grad, x.grad),
                (loss_func.centers.grad, centers.grad),
            ]:
                torch.testing.assert_close(actual.double(), reference, rtol=rtol, atol=atol)

    def test_ema_centers_follow_the_class_means(self):
        loss_func = CenterContrastiveLoss(10, 8, center_update="ema", momentum=0.9)
        loss_func = loss_func.to(TEST_DEVICE)
        embeddings = torch.randn(32, 8, device=TEST_DEVICE)
        loss_func(embeddings, self.labels)
        for label in self.labels.unique():
            # The first batch of a class sets its center.
            mean = normalize(embeddings)[self.labels == label].mean(0)
            torch.testing.assert_close(loss_func.centers[label], normalize(mean, dim=0))
        before = loss_func.centers.clone()
        loss_func.eval()
        loss_func(embeddings.flip(0), self.labels)
        self.assertTrue(torch.equal(loss_func.centers, before))

    def test_invalid_input_is_rejected(self):
        loss_func = CenterContrastiveLoss(10, 8).to(TEST_DEVICE)
        embeddings = torch.randn(32, 8, device=TEST_DEVICE)
        with self.assertRaises(ValueError):
            loss_func(embeddings)
        with self.assertRaises(ValueError):
            loss_func(embeddings, self.labels.cpu() + 10)
        with self.assertRaises(ValueError):
            loss_func(embeddings, self.labels, None, embeddings.clone(), self.labels.clone())
