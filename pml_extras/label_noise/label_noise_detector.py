"""Detection of wrong labels while a network trains."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._component import HyperparametersMixin
from ..functional import label_vote


class LabelNoiseDetector(HyperparametersMixin, torch.nn.Module):
    """Finds the labels of a training set that are probably wrong.

    Call :meth:`update` with the embeddings of the whole training set, for example after each epoch.
    Each update lets the samples vote on each other's labels, weighted by contextual similarity (see
    :func:`pml_extras.functional.label_vote`). The scores are averaged over the updates, because a
    network changes its predictions for wrongly labeled samples more often than for others.

    Args:
        labels: (N,) integer labels of the training set, in the order of the dataset.
        num_neighbors: k >= 1 of the contextual similarity, including the sample itself.

    Attributes:
        scores: (N,) float32, the mean over updates of each label's vote lift: the fraction of the
            vote that its class got, divided by the fraction expected by chance. A score below 1
            marks a suspected label issue. All scores are 1 before the first update.
        suggested_labels: (N,), the label with the most votes in the latest update.
        num_updates: () int64, the number of updates so far.

    An update takes a nearest-neighbor search of O(N² D) operations. Its memory is O(N k²) at most
    for large sets, and O(N²) if dense matrices are faster (small sets, large neighborhoods). All
    state is in the ``state_dict``, so a resumed training run continues exactly.

    Raises:
        ValueError: if labels are not (N,) integers, a hyperparameter is out of range, embeddings
            are not (N, D) finite numbers, or the dataset has other labels.

    Source: ours.

    Example:
        >>> import torch
        >>> from pml_extras.label_noise import LabelNoiseDetector
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
        >>> embeddings = torch.nn.functional.one_hot(labels).float()
        >>> labels[8] = 0
        >>> detector = LabelNoiseDetector(labels, num_neighbors=3)
        >>> detector.update(embeddings).find_label_issues()
        tensor([8])
        >>> detector.suggested_labels[8]
        tensor(1)
    """

    labels: Tensor
    num_updates: Tensor
    scores: Tensor
    suggested_labels: Tensor

    def __init__(self, labels: Tensor | Sequence[int], *, num_neighbors: int = 40) -> None:
        super().__init__()
        _checks.count("num_neighbors", num_neighbors)
        labels = torch.as_tensor(labels)
        if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"labels must be N integers, got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        self.num_neighbors = num_neighbors
        self.register_buffer("labels", labels.clone())
        self.register_buffer("num_updates", torch.tensor(0))
        self.register_buffer("scores", torch.ones(len(labels)))
        self.register_buffer("suggested_labels", labels.clone())

    def update(self, embeddings: Tensor) -> LabelNoiseDetector:
        """Update the scores with embeddings of the training set, (N, D) in the labels' order."""
        _checks.embeddings(embeddings, finite=True)
        if len(embeddings) != len(self.labels):
            raise ValueError(
                f"embeddings must be those of {len(self.labels)} samples, got {len(embeddings)}"
            )
        labels = self.labels.to(embeddings.device)
        vote = label_vote(embeddings, labels, num_neighbors=self.num_neighbors)
        self.num_updates += 1
        self.scores += (vote.vote_lift.to(self.scores) - self.scores) / self.num_updates
        self.suggested_labels = vote.suggested_label.to(self.suggested_labels)
        return self

    def find_label_issues(self) -> Tensor:
        """Indices of the samples whose score is below 1, most suspicious first."""
        order = self.scores.argsort(stable=True)
        return order[self.scores[order] < 1]

    def to_csv(
        self,
        path: str | Path,
        *,
        class_names: Sequence[str] | None = None,
        sample_names: Sequence[str] | None = None,
    ) -> None:
        """Write a table of all samples, most suspicious first.

        Args:
            path: the file to write. An existing file is replaced.
            class_names: a name per label. Default: the labels.
            sample_names: a name per sample, for example its file. Default: the indices.
        """

        def class_name(label: int) -> str | int:
            return label if class_names is None else class_names[label]

        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["sample", "label", "score", "suggested_label", "is_issue"])
            for i in self.scores.argsort(stable=True).tolist():
                sample = i if sample_names is None else sample_names[i]
                label = class_name(int(self.labels[i]))
                suggested_label = class_name(int(self.suggested_labels[i]))
                score = self.scores[i].item()
                writer.writerow([sample, label, f"{score:.4g}", suggested_label, int(score < 1)])

    def end_of_epoch_hook(
        self,
        tester: Any,
        dataset: Any,
        hook: Callable[[Any], Any] | None = None,
        collate_fn: Any = None,
    ) -> Callable[[Any], Any]:
        """A hook for PML's trainers that embeds the training set, updates, and calls ``hook``.

        Args:
            tester: a PML tester, which computes the embeddings.
            dataset: the training set, without augmentation if possible.
            hook: another hook. Its return value is returned, so False still stops the training.
            collate_fn: the dataset's collate function, if it needs one.
        """

        def update_then_hook(trainer: Any) -> Any:
            embeddings, labels = tester.get_all_embeddings(
                dataset, trainer.models["trunk"], trainer.models["embedder"], collate_fn
            )
            if not torch.equal(labels.flatten().to(self.labels), self.labels):
                raise ValueError("the dataset's labels are not the labels of this detector")
            self.update(embeddings)
            return hook(trainer) if hook is not None else None

        return update_then_hook
