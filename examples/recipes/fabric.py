#!/usr/bin/env python3
"""Lightning Fabric: the same loop on a CPU, one GPU or several, in any precision.

pip install lightning-fabric
python examples/recipes/fabric.py
python examples/recipes/fabric.py --accelerator cpu --devices 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from digits import build_model, embed, load, map_at_r, seed_everything
from lightning_fabric import Fabric
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch.optim import Adam
from torch.utils.data import DataLoader

from pml_extras.losses import CenterContrastiveLoss


def main(
    epochs: int = 3,
    accelerator: str = "auto",
    devices: int = 1,
    precision: str = "bf16-mixed",
    path: Path = Path("runs/fabric.ckpt"),
) -> float:
    fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision)
    fabric.launch()
    seed_everything()
    train, test = load()
    model = build_model()
    # A loss with parameters is a module like any other. Its centers have their own learning rate.
    loss_func = CenterContrastiveLoss(num_classes=10, embedding_size=32)
    groups = [{"params": model.parameters()}, {"params": loss_func.parameters(), "lr": 0.1}]
    model, optimizer = fabric.setup(model, Adam(groups, lr=2e-3))
    loss_func = fabric.to_device(loss_func)
    # PML's wrapper joins the batches of all devices, so the centers get the same gradient on each.
    batch_loss = DistributedLossWrapper(loss_func) if fabric.world_size > 1 else loss_func

    seed_everything(fabric.global_rank)  # each device draws its own batches
    sampler = MPerClassSampler(train.tensors[1], m=8, batch_size=80, length_before_new_iter=1600)
    loader = DataLoader(train, batch_size=80, sampler=sampler)
    batches = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    for epoch in range(epochs):
        for images, labels in batches:
            loss = batch_loss(model(images), labels)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
        fabric.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    fabric.save(path, {"model": model, "loss": loss_func, "optimizer": optimizer})

    score = map_at_r(embed(model, fabric.to_device(test.tensors[0])).cpu(), test.tensors[1])
    fabric.print(f"MAP@R on held-out images {score:.3f}")
    return score


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--path", type=Path, default=Path("runs/fabric.ckpt"))
    main(**vars(parser.parse_args()))
