import unittest

import torch
from pytorch_metric_learning.losses import (
    CenterContrastiveLoss,
    ContextualLoss,
    ListwiseDistillationLoss,
)
from pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    ClassWeightedReducer,
    DoNothingReducer,
    MeanReducer,
    PerAnchorReducer,
    SumReducer,
    ThresholdReducer,
)
from pytorch_metric_learning.regularizers import LpRegularizer

from .. import TEST_DEVICE


class TestReducersOfNewLosses(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.embeddings = torch.randn(32, 8, device=TEST_DEVICE)
        self.labels = torch.arange(8, device=TEST_DEVICE).repeat_interleave(4)
        self.weights = torch.rand(8)

    def cases(self):
        teacher = torch.randn(32, 8, device=TEST_DEVICE)
        yield CenterContrastiveLoss, {"num_classes": 8, "embedding_size": 8}, {}
        yield ContextualLoss, {}, {}
        yield ListwiseDistillationLoss, {}, {"ref_emb": teacher, "ref_labels": self.labels.clone()}

    def test_each_reducer(self):
        weights = self.weights.to(TEST_DEVICE)[self.labels]

        def mean_above(losses, low):
            return losses[losses > low].mean() if (losses > low).any() else losses.sum() * 0

        reducers = [
            (MeanReducer(), lambda losses: losses.mean()),
            (SumReducer(), lambda losses: losses.sum()),
            (AvgNonZeroReducer(), lambda losses: mean_above(losses, 0)),
            (ThresholdReducer(low=0.1), lambda losses: mean_above(losses, 0.1)),
            (ClassWeightedReducer(self.weights), lambda losses: (losses * weights).mean()),
            (PerAnchorReducer(), lambda losses: losses.mean()),
        ]
        for loss_class, kwargs, extra in self.cases():
            torch.manual_seed(0)
            sub_losses = loss_class(**kwargs, reducer=DoNothingReducer()).to(TEST_DEVICE)(
                self.embeddings, self.labels, **extra
            )
            for reducer, reduce in reducers:
                torch.manual_seed(0)
                loss_func = loss_class(**kwargs, reducer=reducer).to(TEST_DEVICE)
                loss = loss_func(self.embeddings, self.labels, **extra)
                expected = sum(reduce(sub_loss["losses"]) for sub_loss in sub_losses.values())
                torch.testing.assert_close(loss, expected)

    def test_embedding_regularizer(self):
        for loss_class, kwargs, extra in self.cases():
            losses = []
            for regularizer in [None, LpRegularizer()]:
                torch.manual_seed(0)
                loss_func = loss_class(**kwargs, embedding_regularizer=regularizer)
                losses.append(loss_func.to(TEST_DEVICE)(self.embeddings, self.labels, **extra))
            norms = self.embeddings.norm(dim=1).mean()
            torch.testing.assert_close(losses[1], losses[0] + norms)
