import unittest

import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.miners import ContextualSimilarityMiner
from pytorch_metric_learning.utils.functional import contextual_similarity

from .. import TEST_DEVICE, TEST_DTYPES


def pairs_by_loop(distances, labels, k, margin):
    """The positive and the negative pairs without the noise filter."""
    s = contextual_similarity(distances, num_neighbors=k, slack=0.0).tolist()
    d, y = distances.tolist(), labels.tolist()
    positives, negatives = set(), set()
    for i in range(len(y)):
        pos = [j for j in range(len(y)) if j != i and y[j] == y[i]]
        neg = [j for j in range(len(y)) if y[j] != y[i]]
        for j in pos:
            farther = d[i][j] > min(d[i][m] for m in neg)
            if s[i][j] < max(s[i][m] for m in neg) + margin and (s[i][j] > 0 or farther):
                positives.add((i, j))
        for j in neg:
            nearer = d[i][j] < max(d[i][m] for m in pos)
            if s[i][j] > min(s[i][m] for m in pos) - margin and (s[i][j] > 0 or nearer):
                negatives.add((i, j))
    return positives, negatives


class TestContextualSimilarityMiner(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.labels = torch.arange(6, device=TEST_DEVICE).repeat_interleave(5)
        self.centers = torch.eye(6, 8).repeat_interleave(5, 0)

    def embeddings(self, noise):
        return (self.centers + noise * torch.randn(30, 8)).to(TEST_DEVICE)

    def test_equals_a_loop_over_pairs(self):
        embeddings = self.embeddings(noise=0.5)
        x = torch.nn.functional.normalize(embeddings.double())
        expected = pairs_by_loop((2 - 2 * x @ x.T).clamp_min(0), self.labels, 4, 0.1)
        self.assertTrue(all(expected))
        for dtype in TEST_DTYPES:
            if dtype == torch.float16:  # rounding changes the order of the neighbors
                continue
            for distance in [CosineSimilarity(), LpDistance()]:
                miner = ContextualSimilarityMiner(filter_noise=False, distance=distance)
                a1, p, a2, n = (x.tolist() for x in miner(embeddings.to(dtype), self.labels))
                self.assertEqual((set(zip(a1, p)), set(zip(a2, n))), expected)

    def test_separated_classes_have_no_hard_pairs(self):
        for dtype in TEST_DTYPES:
            miner = ContextualSimilarityMiner(margin=0)
            pairs = miner(self.embeddings(noise=0.1).to(dtype), self.labels)
            self.assertTrue(all(len(x) == 0 for x in pairs))

    def test_a_wrong_label_gives_no_positives(self):
        embeddings, labels = self.embeddings(noise=0.1), self.labels.clone()
        labels[0] = 3
        for filter_noise in [False, True]:
            a1, p, _, _ = ContextualSimilarityMiner(filter_noise=filter_noise)(embeddings, labels)
            self.assertEqual(bool(((a1 == 0) | (p == 0)).any()), not filter_noise)
