"""Which labels of a training set to have a look at."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._component import ShowsSettings, check_count, check_embeddings, check_finite
from ..functional import label_vote


class LabelTrust(ShowsSettings, torch.nn.Module):
    """Watches a training set while a network is trained on it, and tells which labels to distrust.

    Now and then, at the end of each epoch, say, it looks at the embeddings of the whole set and
    lets the samples vote on each other's labels, by contextual similarity: see
    :func:`pml_extras.functional.label_vote`. What a network believes of a wrong label changes as it
    trains, what it believes of a right one less so; so the looks are averaged.

    Args:
        labels: of the training set, in its order: N integers.
        num_neighbors: k >= 1 of the contextual similarity, the sample itself included.

    Attributes:
        looks: (), how many there were.
        support: (N,), the mean over the looks of how many times the share that a class of its size
            has by chance each label got of the vote. Below 1, the label is distrusted.
        trusted: (N,), the share of the looks in which no other label got more.
        winner: (N,), the label that got most in the last look.

    A look at N samples is a search for their nearest neighbours, of N² D operations; its memory
    grows with N k. All there is to know is in the ``state_dict``, so that a report goes on where a
    stopped training does.

    Raises:
        ValueError: for labels that are no (N,) integers, a setting out of range, embeddings that
            are no (N, D) finite numbers, or a dataset whose labels are others.

    Source: ours.

    Example:
        >>> import torch
        >>> from pml_extras.inference import LabelTrust
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
        >>> embeddings = torch.nn.functional.one_hot(labels).float()
        >>> labels[8] = 0
        >>> trust = LabelTrust(labels, num_neighbors=3)
        >>> _ = trust.look(embeddings)
        >>> trust.distrusted()
        tensor([8])
        >>> trust.winner[8]
        tensor(1)
    """

    settings = ("num_neighbors",)
    labels: Tensor
    looks: Tensor
    support: Tensor
    trusted: Tensor
    winner: Tensor

    def __init__(self, labels: Tensor | Sequence[int], num_neighbors: int = 40) -> None:
        super().__init__()
        check_count("num_neighbors", num_neighbors)
        labels = torch.as_tensor(labels)
        if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"labels must be N integers, got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        self.num_neighbors = num_neighbors
        self.register_buffer("labels", labels.clone())
        self.register_buffer("looks", torch.tensor(0))
        self.register_buffer("support", torch.ones(len(labels)))
        self.register_buffer("trusted", torch.ones(len(labels)))
        self.register_buffer("winner", labels.clone())

    def look(self, embeddings: Tensor) -> LabelTrust:
        """Take the embeddings of the training set, (N, D) in the labels' order, into account."""
        check_embeddings(embeddings)
        check_finite(embeddings=embeddings)
        if len(embeddings) != len(self.labels):
            raise ValueError(
                f"embeddings must be those of {len(self.labels)} samples, got {len(embeddings)}"
            )
        vote = label_vote(embeddings, self.labels.to(embeddings.device), self.num_neighbors)
        self.looks += 1
        for mean, value in ((self.support, vote.support), (self.trusted, vote.trusted)):
            mean += (value.to(mean) - mean) / self.looks
        self.winner = vote.winner.to(self.winner)
        return self

    def distrusted(self) -> Tensor:
        """The numbers of the samples whose support is below 1, those with the least first."""
        order = self.support.argsort(stable=True)
        return order[self.support[order] < 1]

    def write_csv(
        self,
        path: str | Path,
        names: Sequence[str] | None = None,
        samples: Sequence[str] | None = None,
    ) -> None:
        """Write a table of all samples, those with the least support first.

        Args:
            path: of the file; one that is there is replaced.
            names: of the classes, by their labels; default: the labels.
            samples: what the samples are called, their files say; default: their numbers.
        """
        named = (lambda label: names[label]) if names is not None else (lambda label: label)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["sample", "label", "support", "trusted", "winner", "distrusted"])
            for i in self.support.argsort(stable=True).tolist():
                support = self.support[i].item()
                writer.writerow(
                    [
                        i if samples is None else samples[i],
                        named(int(self.labels[i])),
                        f"{support:.4g}",
                        f"{self.trusted[i].item():.4g}",
                        named(int(self.winner[i])),
                        int(support < 1),
                    ]
                )

    def end_of_epoch_hook(
        self,
        tester: Any,
        dataset: Any,
        hook: Callable[[Any], Any] | None = None,
        collate_fn: Any = None,
    ) -> Callable[[Any], Any]:
        """A hook for PML's trainers, which looks at the training set and then calls ``hook``.

        Args:
            tester: PML's, which embeds the dataset as it embeds any other.
            dataset: the training set, without augmentation if that is to be had.
            hook: what else is to be done; what it returns is returned, so that False still stops
                the training.
            collate_fn: the dataset's, if it needs one.
        """

        def look_then_hook(trainer: Any) -> Any:
            embeddings, labels = tester.get_all_embeddings(
                dataset, trainer.models["trunk"], trainer.models["embedder"], collate_fn
            )
            if not torch.equal(labels.flatten().to(self.labels), self.labels):
                raise ValueError("the dataset's labels are not those that are looked after")
            self.look(embeddings)
            return hook(trainer) if hook is not None else None

        return look_then_hook
