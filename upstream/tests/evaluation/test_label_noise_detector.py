import unittest

import torch
from pytorch_metric_learning.evaluation import LabelNoiseDetector

from .. import TEST_DEVICE


class TestLabelNoiseDetector(unittest.TestCase):
    def test_finds_the_wrong_labels(self):
        torch.manual_seed(0)
        true_labels = torch.arange(4).repeat_interleave(10)
        embeddings = torch.eye(8)[true_labels] + 0.05 * torch.randn(40, 8)
        labels = true_labels.clone()
        wrong = torch.tensor([3, 17, 31])
        labels[wrong] = (labels[wrong] + 1) % 4
        detector = LabelNoiseDetector(labels, num_neighbors=8).to(TEST_DEVICE)
        detector.update(embeddings.to(TEST_DEVICE))
        self.assertEqual(set(detector.find_label_issues().tolist()), set(wrong.tolist()))
        self.assertTrue(torch.equal(detector.suggested_labels.cpu(), true_labels))
