#!/usr/bin/env python3
"""Train an embedding with pytorch-metric-learning (PML) and pml_extras, and report what it learned.

    python examples/train.py                                     # under a minute, no download
    python examples/train.py --trunk timm:resnet50 --dataset folder --data-root DIR
    python examples/train.py --trunk efficientnet_lite0 --cache blocks.14 --dataset cub
    python examples/train.py --features embeddings.npz --loss triplet --miner contextual --rerank
    python examples/train.py --loss ntxent --distill ema --drop-label-issues
    python examples/train.py --protocol cars196 --data-root DIR

The trainer, sampler, tester and record keeper are PML's. The best epoch is the one with the highest
MAP@R on held-out images of the training classes. --resume continues a stopped run exactly.
"""

from __future__ import annotations

import math
import os
import sys
import time
from argparse import Namespace
from typing import Any

# Read at import. Idle OpenMP threads must not block a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_LEAVE", "")  # false: remove a progress bar when it is complete
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")

import checkpoint
import cli
import loaders
import methods
import networks
import numpy as np
import optimizers
import protocols
import report
import torch
from images import UserError
from metrics import PRIMARY_METRIC, RetrievalAccuracy
from networks import Networks, Trainer, for_testing
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from samples import Samples, hold_out, with_label_noise
from torch import nn

from pml_extras.label_noise import LabelNoiseDetector


def run(args: Namespace) -> None:
    # Check all arguments and data before writing anything.
    device = cli.pick_device(args.device)
    cli.check_out(args)
    data = loaders.load(args.dataset, args.data_root, args.download)
    # The papers have no validation set.
    train_set, val_set = (data.train, None) if args.protocol else hold_out(data.train)
    clean_labels = train_set.labels
    train_set = with_label_noise(train_set, args.label_noise, args.seed)
    args.batch_size, args.samples_per_class = cli.pick_batch(args, train_set)
    config = cli.config(args, train_set)
    saved = cli.load_run(args, config) if args.resume else None

    checkpoint.seed_everything(args.seed)
    tester = build_tester(args, device)
    sets = (train_set, val_set, data.test)
    network, (train_set, val_set, test_set) = networks.build(args, data, sets, tester, device)
    trainer = build_trainer(args, train_set, network, device)
    detector = LabelNoiseDetector(train_set.labels) if args.check_labels else None
    report.print_setup(args, device, train_set, val_set, data)
    features = None
    if args.init == "pca":
        features, _ = evaluate(tester, test_set, {**trainer.models, "embedder": nn.Identity()})
    before, embeddings_before = evaluate(tester, test_set, trainer.models)

    if saved:
        state = checkpoint.restore_run(saved, trainer, detector)
        print(f"resuming after epoch {state['epoch']}")
    else:
        accuracy = evaluate(tester, val_set, trainer.models)[0] if val_set else {}
        state = checkpoint.new_run(config, accuracy)
        report.clear(args.out)
        checkpoint.save_run(args.out / "checkpoint.pt", state, trainer, detector)
    train(args, state, trainer, network, tester, val_set, detector)

    network.load_weights(state["best"]["models"])
    checkpoint.save(args.out / "best.pt", state["best"])
    after, embeddings_after = evaluate(tester, test_set, trainer.models)
    accuracies = {"features": features, "before": before, "after": after}
    if args.rerank:
        calculator = RetrievalAccuracy(device=device, rerank=True)
        accuracies["re-ranked"] = calculator.evaluate(embeddings_after, test_set)
    issues = detector and report.label_issues(args.out, detector, train_set, clean_labels)
    report.write(args, device, state, data, accuracies, issues)
    report.draw(args, state, data.test, embeddings_before, embeddings_after, train_set, detector)


def build_trainer(
    args: Namespace, train_set: Samples, network: Networks, device: torch.device
) -> Trainer:
    loss = methods.build_loss(args, len(train_set.names), network.models).to(device)
    miner = methods.build_miner(args)
    optimizers_by_name = optimizers.build_optimizers(args, network.models, loss)
    steps_per_epoch = len(train_set) // args.batch_size
    sampler = MPerClassSampler(
        train_set.labels,
        m=args.samples_per_class,
        batch_size=args.batch_size,
        # One pass of the sampler is one epoch, so no partly used pass is lost at a checkpoint.
        length_before_new_iter=len(train_set),
    )
    return Trainer(
        network,
        optimizers_by_name,
        args.batch_size,
        {"metric_loss": loss},
        train_set,
        mining_funcs={"tuple_miner": miner.to(device)} if miner else {},
        sampler=sampler,
        lr_schedulers=optimizers.build_schedulers(args, optimizers_by_name, steps_per_epoch),
        freeze_these=["trunk"] if args.freeze_trunk else [],
        freeze_trunk_batchnorm=args.freeze_norm,
        data_device=device,
        dataloader_num_workers=network.workers,
    )


def build_tester(args: Namespace, device: torch.device) -> GlobalEmbeddingSpaceTester:
    return GlobalEmbeddingSpaceTester(
        # Small batches fit the cache of a CPU, and large networks are much faster with them.
        batch_size=16 if device.type == "cpu" and args.trunk != "small" else 256,
        dataloader_num_workers=args.workers,
        data_device=device,
        accuracy_calculator=RetrievalAccuracy(protocols.RECALL_AT.get(args.protocol, ()), device),
    )


def evaluate(
    tester: GlobalEmbeddingSpaceTester, samples: Samples, models: dict[str, nn.Module]
) -> tuple[dict[str, float], torch.Tensor]:
    """Retrieval accuracy and embeddings."""
    embeddings, _ = tester.get_all_embeddings(samples, models["trunk"], models["embedder"])
    return tester.accuracy_calculator.evaluate(embeddings, samples), embeddings.cpu()


def train(
    args: Namespace,
    state: dict[str, Any],
    trainer: Trainer,
    network: Networks,
    tester: GlobalEmbeddingSpaceTester,
    val_set: Samples | None,
    detector: LabelNoiseDetector | None,
) -> None:
    """Train the remaining epochs. Update ``state`` and save a checkpoint after each epoch."""
    batch_losses: list[float] = []
    log = report.EpochLog(args.out / "logs", state["history"])
    started = time.perf_counter() - state["seconds"]
    throughput = report.Throughput()

    def end_of_iteration(trainer: Trainer) -> None:
        loss = trainer.losses["total_loss"].item()
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss} in epoch {trainer.epoch}; try a lower --lr")
        batch_losses.append(loss)
        throughput.add(args.batch_size)

    def end_of_epoch(trainer: Trainer) -> None:
        accuracy = evaluate(tester, val_set, trainer.models)[0] if val_set else {}
        row = {"epoch": trainer.epoch, "loss": float(np.mean(batch_losses)), **accuracy}
        best = state["best"]
        is_best = not (best and val_set) or row[PRIMARY_METRIC] > best[PRIMARY_METRIC]
        if is_best:
            state["best"] = {**row, "models": network.weights()}
        state.update(epoch=trainer.epoch, seconds=time.perf_counter() - started)
        state["history"].append(row)
        checkpoint.save_run(args.out / "checkpoint.pt", state, trainer, detector)
        log.add(row)
        report.print_epoch(row, is_best, throughput.rate)
        batch_losses.clear()
        if args.drop_label_issues:
            methods.drop_label_issues(trainer.sampler, detector)
        throughput.restart()

    if args.drop_label_issues:  # a resumed run already has label issues
        methods.drop_label_issues(trainer.sampler, detector)
    # The detector and the teacher are updated after each epoch, before the hook that saves them.
    hook = end_of_epoch
    if detector:
        hook = detector.end_of_epoch_hook(tester, for_testing(trainer.dataset), hook)
    if args.distill:
        hook = trainer.loss_funcs["metric_loss"].end_of_epoch_hook(hook)
    trainer.end_of_iteration_hook = end_of_iteration
    trainer.end_of_epoch_hook = hook
    trainer.train(start_epoch=state["epoch"] + 1, num_epochs=args.epochs)
    log.close()


if __name__ == "__main__":
    sys.exit(cli.call(run))
