import unittest

import torch
from pytorch_metric_learning.losses import CrossBatchMemory, TripletMarginLoss
from pytorch_metric_learning.regularizers import ClassInterferenceRegularizer

from .. import TEST_DEVICE, TEST_DTYPES


class TestClassInterferenceRegularizer(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.labels = torch.arange(2, device=TEST_DEVICE).repeat_interleave(8)

    def test_moves_embeddings_toward_the_other_of_two_classes(self):
        for dtype in TEST_DTYPES:
            regularizer = ClassInterferenceRegularizer(2, 8, strength=0.2, normalize=False)
            regularizer = regularizer.to(TEST_DEVICE)
            first, second = (torch.randn(16, 8, device=TEST_DEVICE).to(dtype) for _ in range(2))
            # No class has a mean yet, so no embedding moves.
            self.assertTrue(torch.equal(regularizer.interfere(first, self.labels), first))
            means = first.float().view(2, 8, 8).mean(1)
            other_means = means[1 - self.labels].to(dtype)
            perturbed = regularizer.interfere(second, self.labels)
            rtol = 1e-2 if dtype == torch.float16 else 1e-5
            torch.testing.assert_close(
                perturbed, second + 0.2 * (other_means - second), rtol=rtol, atol=rtol
            )
            means = 0.9 * means + 0.1 * second.float().view(2, 8, 8).mean(1)
            torch.testing.assert_close(regularizer.class_means, means, rtol=1e-3, atol=1e-4)

    def test_attaches_to_a_loss_and_detaches(self):
        loss_func = TripletMarginLoss()
        first, second = (torch.randn(16, 8, device=TEST_DEVICE) for _ in range(2))
        expected = loss_func(second, self.labels)
        regularizer = ClassInterferenceRegularizer(2, 8, strength=0.2).to(TEST_DEVICE)
        self.assertIs(regularizer.attach(loss_func), loss_func)
        loss_func(first, self.labels)
        self.assertNotEqual(loss_func(second, self.labels), expected)
        loss_func.eval()
        self.assertEqual(loss_func(second, self.labels), expected)
        loss_func.train()
        regularizer.detach(loss_func)
        self.assertEqual(loss_func(second, self.labels), expected)

    def test_embedding_regularizer_and_wrappers_are_rejected(self):
        regularizer = ClassInterferenceRegularizer(2, 8).to(TEST_DEVICE)
        embeddings = torch.randn(16, 8, device=TEST_DEVICE)
        with self.assertRaises(TypeError):
            TripletMarginLoss(embedding_regularizer=regularizer)(embeddings, self.labels)
        with self.assertRaises(TypeError):
            regularizer.attach(CrossBatchMemory(TripletMarginLoss(), embedding_size=8))
