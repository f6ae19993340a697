#!/usr/bin/env python3
"""Train an embedding with pytorch-metric-learning (PML) and pml_extras, and report what it learned.

    python examples/train.py                                     # under a minute, no download
    python examples/train.py --loss center_contrastive --dataset cub --data-root DIR --download
    python examples/train.py --loss triplet --miner contextual --interfere --distill ema
    python examples/train.py --loss ntxent --label-noise 0.2 --drop-label-issues

The trainer, sampler, tester and record keeper are PML's. The components of pml_extras replace PML's
losses and miners. The test classes are not in the training set. The best epoch is the one with the
highest MAP@R on held-out images of the training classes. --resume continues a stopped run exactly.
"""

from __future__ import annotations

import math
import os
import sys
import time
from argparse import Namespace
from dataclasses import replace
from typing import Any

# OpenMP and tqdm read these variables when they are imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads do not block a shared machine
os.environ.setdefault("TQDM_LEAVE", "")  # false: remove a progress bar when it is complete
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")

import checkpoint
import cli
import datasets
import figures
import methods
import numpy as np
import report
import torch
from datasets import Images, UserError
from networks import Bfloat16, build_embedder, build_trunk
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from pml_extras.label_noise import LabelNoiseDetector


def run(args: Namespace) -> None:
    # Check all arguments and data before writing anything.
    device = cli.pick_device(args.device)
    cli.check_out(args)
    data = datasets.load(args.dataset, args.data_root, args.image_size, args.download)
    clean_set, val_set = datasets.hold_out(data.train)
    train_set = datasets.with_label_noise(clean_set, args.label_noise, args.seed)
    train_set = replace(train_set, flip=data.mirrored)
    args.batch_size, args.samples_per_class = cli.pick_batch(args, train_set)
    saved = cli.load_run(args) if args.resume else None

    checkpoint.seed_everything(args.seed)
    trainer = build_trainer(args, train_set, device)
    tester = build_tester(args, device)
    detector = LabelNoiseDetector(train_set.labels) if args.check_labels else None
    report.print_setup(args, device, train_set, val_set, data.test)
    before, embeddings_before = evaluate(tester, data.test, trainer.models)

    if saved:
        state = checkpoint.restore_run(saved, trainer, detector)
        print(f"resuming after epoch {state['epoch']}")
    else:
        accuracy, _ = evaluate(tester, val_set, trainer.models)
        state = checkpoint.new_run(cli.config(args), accuracy)
        report.clear(args.out)
        checkpoint.save_run(args.out / "checkpoint.pt", state, trainer, detector)
    train(args, state, trainer, tester, val_set, detector)

    checkpoint.save(args.out / "best.pt", state["best"])
    for name, model in trainer.models.items():
        model.load_state_dict(state["best"]["models"][name])
    after, embeddings_after = evaluate(tester, data.test, trainer.models)
    issues = detector and report.label_issues(args.out, detector, train_set, clean_set.labels)
    report.write(args, device, state, data.test, before, after, issues)
    embeddings = embeddings_before, embeddings_after
    report.draw(args, state, data.test, *embeddings, train_set, detector)


def build_trainer(args: Namespace, train_set: Images, device: torch.device) -> MetricLossOnly:
    trunk = build_trunk(train_set.channels, train_set.size)
    embedder = build_embedder(args.embedding_size)
    if args.amp:
        trunk, embedder = Bfloat16(trunk), Bfloat16(embedder)
    models = {"trunk": trunk.to(device), "embedder": embedder.to(device)}

    loss = methods.build_loss(args, len(train_set.names), models).to(device)
    miner = methods.build_miner(args)

    optimizers = {
        "trunk_optimizer": torch.optim.Adam(trunk.parameters(), lr=args.lr),
        "embedder_optimizer": torch.optim.Adam(embedder.parameters(), lr=args.lr),
    }
    # Proxies and centers are parameters of the loss. Without an optimizer they never move.
    if list(loss.parameters()):
        optimizers["metric_loss_optimizer"] = torch.optim.Adam(loss.parameters(), lr=args.loss_lr)

    sampler = MPerClassSampler(
        train_set.labels,
        m=args.samples_per_class,
        batch_size=args.batch_size,
        # One pass of the sampler is one epoch, so no partly used pass is lost at a checkpoint.
        length_before_new_iter=len(train_set),
    )
    return MetricLossOnly(
        models,
        optimizers,
        args.batch_size,
        {"metric_loss": loss},
        train_set,
        mining_funcs={"tuple_miner": miner.to(device)} if miner else {},
        sampler=sampler,
        data_device=device,
        dataloader_num_workers=args.workers,
    )


def build_tester(args: Namespace, device: torch.device) -> GlobalEmbeddingSpaceTester:
    return GlobalEmbeddingSpaceTester(
        batch_size=256,
        dataloader_num_workers=args.workers,
        data_device=device,
        accuracy_calculator=AccuracyCalculator(
            include=tuple(figures.METRICS),
            k="max_bin_count",  # enough neighbors for R-precision and MAP@R
            device=device,
            knn_func=CustomKNN(CosineSimilarity(), batch_size=1024),  # needs no faiss
        ),
    )


def evaluate(
    tester: GlobalEmbeddingSpaceTester, images: Images, models: dict[str, torch.nn.Module]
) -> tuple[dict[str, float], torch.Tensor]:
    """Retrieval accuracy with each image as a query among the others, and the embeddings."""
    embeddings, labels = tester.get_all_embeddings(images, models["trunk"], models["embedder"])
    accuracy = tester.accuracy_calculator.get_accuracy(embeddings, labels.squeeze(1))
    return {metric: accuracy[metric] for metric in figures.METRICS}, embeddings.cpu()


def train(
    args: Namespace,
    state: dict[str, Any],
    trainer: MetricLossOnly,
    tester: GlobalEmbeddingSpaceTester,
    val_set: Images,
    detector: LabelNoiseDetector | None,
) -> None:
    """Train the remaining epochs. Update ``state`` and save a checkpoint after each epoch."""
    batch_losses: list[float] = []
    log = report.EpochLog(args.out / "logs", state["history"])
    started = time.perf_counter() - state["seconds"]

    def end_of_iteration(trainer: MetricLossOnly) -> None:
        loss = trainer.losses["total_loss"].item()
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss} in epoch {trainer.epoch}; try a lower --lr")
        batch_losses.append(loss)

    def end_of_epoch(trainer: MetricLossOnly) -> None:
        accuracy, _ = evaluate(tester, val_set, trainer.models)
        row = {"epoch": trainer.epoch, "loss": float(np.mean(batch_losses)), **accuracy}
        batch_losses.clear()
        best, metric = state["best"], figures.PRIMARY_METRIC
        is_best = best is None or row[metric] > best[metric]
        if is_best:
            state["best"] = {**row, "models": checkpoint.copy_weights(trainer.models)}
        state.update(epoch=trainer.epoch, seconds=time.perf_counter() - started)
        state["history"].append(row)
        checkpoint.save_run(args.out / "checkpoint.pt", state, trainer, detector)
        log.add(row)
        report.print_epoch(row, is_best)
        if args.drop_label_issues:
            methods.drop_label_issues(trainer.sampler, detector)

    if args.drop_label_issues:  # a resumed run already has label issues
        methods.drop_label_issues(trainer.sampler, detector)
    # The detector and the teacher are updated after each epoch, before the hook that saves them.
    hook = end_of_epoch
    if detector:
        hook = detector.end_of_epoch_hook(tester, replace(trainer.dataset, flip=False), hook)
    if args.distill:
        hook = trainer.loss_funcs["metric_loss"].end_of_epoch_hook(hook)
    trainer.end_of_iteration_hook = end_of_iteration
    trainer.end_of_epoch_hook = hook
    trainer.train(start_epoch=state["epoch"] + 1, num_epochs=args.epochs)
    log.close()


if __name__ == "__main__":
    sys.exit(cli.call(run))
