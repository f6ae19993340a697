import unittest

import torch
from pytorch_metric_learning.evaluation import ContextualKNN
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch.nn.functional import normalize

from .. import TEST_DEVICE


class TestContextualKNN(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.embeddings = torch.randn(40, 8, device=TEST_DEVICE)

    def test_the_nearest_stays_first(self):
        _, indices = ContextualKNN(num_neighbors=5)(self.embeddings, 7, self.embeddings, True)
        x = normalize(self.embeddings)
        nearest = (x @ x.T).fill_diagonal_(-2).argmax(1)
        self.assertTrue(torch.equal(indices[:, 0], nearest))

    def test_works_in_accuracy_calculator(self):
        labels = torch.arange(4, device=TEST_DEVICE).repeat_interleave(10)
        embeddings = torch.eye(8, device=TEST_DEVICE)[labels] + 0.05 * self.embeddings
        calculator = AccuracyCalculator(
            include=("mean_average_precision_at_r",),
            k="max_bin_count",
            knn_func=ContextualKNN(num_neighbors=8),
        )
        accuracy = calculator.get_accuracy(embeddings, labels)
        self.assertEqual(accuracy["mean_average_precision_at_r"], 1)
