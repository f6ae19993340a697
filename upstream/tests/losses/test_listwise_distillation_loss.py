import unittest

import torch
from pytorch_metric_learning.losses import ListwiseDistillationLoss
from torch.nn.functional import kl_div, log_softmax, normalize

from .. import TEST_DEVICE, TEST_DTYPES


class TestListwiseDistillationLoss(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)

    def test_equals_the_formula_with_gradient(self):
        for dtype in TEST_DTYPES:
            student = torch.randn(16, 8, device=TEST_DEVICE).to(dtype).requires_grad_()
            teacher = torch.randn(16, 12, device=TEST_DEVICE).to(dtype)
            loss = ListwiseDistillationLoss(temperature=0.5)(student, ref_emb=teacher)
            loss.backward()

            x = student.detach().double().requires_grad_()
            lists = [
                log_softmax(normalize(e) @ normalize(e).T / 0.5, 1) for e in (x, teacher.double())
            ]
            expected = 0.25 * kl_div(*lists, reduction="batchmean", log_target=True)
            expected.backward()
            rtol, atol = (1e-2, 1e-4) if dtype == torch.float16 else (1e-4, 1e-7)
            torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=atol)
            torch.testing.assert_close(student.grad.double(), x.grad, rtol=rtol, atol=atol)

    def test_the_teacher_is_required(self):
        with self.assertRaises(ValueError):
            ListwiseDistillationLoss()(torch.randn(16, 8, device=TEST_DEVICE))
