import copy
import os
import tempfile
import unittest

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pytorch_metric_learning.losses import (
    CenterContrastiveLoss,
    ContextualLoss,
    ShardedCenterContrastiveLoss,
)
from pytorch_metric_learning.miners import ContextualSimilarityMiner
from pytorch_metric_learning.regularizers import ClassInterferenceRegularizer
from pytorch_metric_learning.utils.distributed import (
    DistributedLossWrapper,
    DistributedMinerWrapper,
)
from torch.nn.parallel import DistributedDataParallel

WORLD_SIZE = 2


def make_cases():
    """Yields tuples of a network, a loss and a miner."""
    torch.manual_seed(0)
    for loss_func in [
        ContextualLoss(),
        CenterContrastiveLoss(4, 8, center_update="ema"),
        CenterContrastiveLoss(4, 8),
        # With two classes, the class mean that an embedding moves toward is not random.
        ClassInterferenceRegularizer(2, 8, strength=0.2).attach(ContextualLoss()),
    ]:
        for miner in [None, ContextualSimilarityMiner(margin=0.5)]:
            yield torch.nn.Linear(6, 8), loss_func, miner


def make_batch(seed, num_classes=2):
    torch.manual_seed(seed)
    return torch.randn(32, 6), torch.arange(num_classes).repeat(32 // num_classes)


def train(model, loss_func, miner, local_part):
    """Two steps: the second depends on the state of the loss after the first."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(2):
        inputs, labels = (local_part(x) for x in make_batch(seed))
        optimizer.zero_grad()
        embeddings = model(inputs)
        indices_tuple = miner(embeddings, labels) if miner else None
        loss_func(embeddings, labels, indices_tuple).backward()
        optimizer.step()


def process(rank, file, trained, sharded):
    """Compares training with half of each batch per process to one process with all of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=WORLD_SIZE)

    def local_part(x):
        return x.chunk(WORLD_SIZE)[rank]

    for (model, loss_func, miner), expected in zip(make_cases(), trained):
        train(
            DistributedDataParallel(model),
            DistributedLossWrapper(loss_func),
            DistributedMinerWrapper(miner) if miner else None,
            local_part,
        )
        for actual, reference in zip(model.parameters(), expected):
            torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-5)

    centers, loss, gradient = sharded
    loss_func = ShardedCenterContrastiveLoss(4, 6)
    with torch.no_grad():
        loss_func.centers.to_local().copy_(local_part(centers))
    inputs, labels = (local_part(x) for x in make_batch(0, num_classes=4))
    inputs.requires_grad_()
    actual = loss_func(inputs, labels)
    actual.backward()
    torch.testing.assert_close(actual, loss)
    # The gradient is multiplied by the world size, because DistributedDataParallel divides it.
    torch.testing.assert_close(inputs.grad, WORLD_SIZE * local_part(gradient))
    dist.destroy_process_group()


class TestDistributedNewLosses(unittest.TestCase):
    def test_equals_one_process(self):
        trained = []
        for model, loss_func, miner in make_cases():
            before = copy.deepcopy(model.state_dict())
            train(model, loss_func, miner, lambda x: x)
            self.assertFalse(torch.equal(model.weight, before["weight"]))
            trained.append([parameter.detach() for parameter in model.parameters()])

        loss_func = CenterContrastiveLoss(4, 6)
        inputs, labels = make_batch(0, num_classes=4)
        inputs.requires_grad_()
        loss = loss_func(inputs, labels)
        loss.backward()
        sharded = loss_func.centers.detach(), loss.detach(), inputs.grad

        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "rendezvous")
            mp.spawn(process, args=(file, trained, sharded), nprocs=WORLD_SIZE)
