import unittest

import torch
from pytorch_metric_learning.distillation import (
    EMATeacher,
    SelfDistillation,
    SnapshotTeacher,
)
from pytorch_metric_learning.losses import ListwiseDistillationLoss, TripletMarginLoss

from .. import TEST_DEVICE


class TestSelfDistillation(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.trunk = torch.nn.Linear(6, 8).to(TEST_DEVICE)
        self.inputs = torch.randn(16, 6, device=TEST_DEVICE)
        self.labels = torch.randint(4, (16,), device=TEST_DEVICE)

    def perturb_weights(self):
        with torch.no_grad():
            for parameter in self.trunk.parameters():
                parameter.add_(torch.randn_like(parameter))

    def test_adds_the_divergence_from_the_snapshot(self):
        loss_func = SelfDistillation(
            TripletMarginLoss(), SnapshotTeacher(self.trunk), num_epochs=4, alpha=8.0
        )
        loss_func(self.trunk(self.inputs), self.labels)
        loss_func.end_epoch()
        with torch.no_grad():
            teacher_embeddings = self.trunk(self.inputs)
        self.perturb_weights()
        embeddings = self.trunk(self.inputs)
        divergence = ListwiseDistillationLoss()(embeddings, ref_emb=teacher_embeddings)
        expected = TripletMarginLoss()(embeddings, self.labels) + loss_func.weight * divergence
        self.assertGreater(loss_func.weight, 0)
        torch.testing.assert_close(loss_func(embeddings, self.labels), expected)
        loss_func.eval()
        expected = TripletMarginLoss()(embeddings, self.labels)
        torch.testing.assert_close(loss_func(embeddings, self.labels), expected)

    def test_ema_differs_from_the_initial_and_the_current_weights(self):
        initial_weight = self.trunk.weight.detach().clone()
        teacher = EMATeacher(self.trunk, decay=0.5)
        loss_func = SelfDistillation(TripletMarginLoss(), teacher, num_epochs=4)
        loss_func.end_epoch()
        for _ in range(2):
            self.perturb_weights()
            loss_func(self.trunk(self.inputs), self.labels).backward()
        parameters = teacher.network.named_parameters()
        ema_weight = next(p for name, p in parameters if name.endswith("weight"))
        self.assertFalse(torch.equal(ema_weight, self.trunk.weight))
        self.assertFalse(torch.equal(ema_weight, initial_weight))
