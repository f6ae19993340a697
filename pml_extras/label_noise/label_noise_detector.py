"""Detection of wrong labels while a network trains."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from .._component import AccumulatorsMixin, HyperparametersMixin, accumulator_dtype
from ..functional import label_vote


class LabelNoiseDetector(HyperparametersMixin, AccumulatorsMixin):
    """Finds the labels of a training set that are probably wrong.

    Call :meth:`update` with the embeddings of the whole training set, for example after each epoch.
    Each update lets the samples vote on each other's labels, weighted by contextual similarity (see
    :func:`pml_extras.functional.label_vote`). The votes are averaged over the updates, because a
    network changes its predictions for wrongly labeled samples more often than for others.

    A label is an issue if it is outvoted, that is, another class gets more votes, and if its class
    gets a smaller fraction of the votes than its fraction of the other samples. The only sample of
    a class is never an issue: nothing speaks for its label, and nothing against it.

    Args:
        labels: (N,) labels of the training set, in the order of the dataset: a tensor, a list, an
            array or a pandas Series, of integers, or of strings or other values that can be sorted.
        num_neighbors: k >= 1 of the contextual similarity, including the sample itself. Default:
            chosen for each sample from the sizes of the classes, at most 40. A larger k than the
            classes have samples lets other classes outvote right labels, with a warning.

    Attributes:
        scores: (N,) float32, the mean over updates of each label's vote lift: the fraction of the
            vote that its class got, divided by the fraction expected by chance. All scores are 1
            before the first update.
        vote_margins: (N,) float32 in [-1, 1], the mean over updates of the fraction of the vote for
            the label's class, minus that of the best other class.
        is_issue: (N,) bool, whether the score is below 1 and the margin below 0.
        suggested_labels: (N,), the label with the most votes in the latest update.
        labels: (N,), the labels given. These and the suggested labels are a tensor if the labels
            are integers, else an array of the values given.
        num_updates: () int64, the number of updates so far.

    An update takes a nearest-neighbor search of O(N² D) operations. Its memory is O(N k²) at most
    for large sets, and O(N²) if dense matrices are faster (small sets, large neighborhoods). All
    state is in the ``state_dict``, so a resumed training run continues exactly.

    Raises:
        ValueError: if labels are not (N,) integers or sortable values, a hyperparameter is out of
            range, embeddings are not (N, D) finite numbers, or the dataset has other labels.

    Source: ours.

    Example:
        >>> import torch
        >>> from pml_extras.label_noise import LabelNoiseDetector
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
        >>> embeddings = torch.nn.functional.one_hot(labels).float()
        >>> labels[8] = 0
        >>> detector = LabelNoiseDetector(labels)
        >>> detector.update(embeddings).find_label_issues()
        tensor([8])
        >>> detector.suggested_labels[8]
        tensor(1)
    """

    label_codes: Tensor
    suggested_codes: Tensor
    num_updates: Tensor
    scores: Tensor
    vote_margins: Tensor

    def __init__(self, labels: Any, *, num_neighbors: int | None = None) -> None:
        super().__init__()
        codes, self._classes = _encode(labels)
        if num_neighbors is not None:
            num_neighbors = _checks.count("num_neighbors", num_neighbors)
            _warn_if_too_large(num_neighbors, codes)
        self.num_neighbors = num_neighbors
        self.register_buffer("label_codes", codes)
        self.register_buffer("suggested_codes", codes.clone())
        self.register_buffer("num_updates", torch.tensor(0))
        self.register_buffer("scores", torch.ones(len(codes), dtype=accumulator_dtype()))
        self.register_buffer("vote_margins", torch.zeros(len(codes), dtype=accumulator_dtype()))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved, error_msgs = state_dict.get(f"{prefix}label_codes"), args[-1]
        has_shape = saved is not None and saved.shape == self.label_codes.shape
        if has_shape and not torch.equal(saved.to(self.label_codes), self.label_codes):
            error_msgs.append("the saved labels are not the labels of this detector")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def labels(self) -> Any:
        return self._decode(self.label_codes)

    @property
    def suggested_labels(self) -> Any:
        return self._decode(self.suggested_codes)

    def _decode(self, codes: Tensor) -> Any:
        return codes if self._classes is None else self._classes[codes.cpu().numpy()]

    @property
    def is_issue(self) -> Tensor:
        return (self.scores < 1) & (self.vote_margins < 0)

    def update(self, embeddings: Tensor) -> LabelNoiseDetector:
        """Update the scores with embeddings of the training set, (N, D) in the labels' order."""
        _checks.embeddings(embeddings, finite=True)
        if len(embeddings) != len(self.label_codes):
            raise ValueError(
                f"embeddings must be those of {len(self.label_codes)} samples,"
                f" got {len(embeddings)}"
            )
        labels = self.label_codes.to(embeddings.device)
        vote = label_vote(embeddings, labels, num_neighbors=self.num_neighbors)
        self.num_updates += 1
        for mean, new in ((self.scores, vote.vote_lift), (self.vote_margins, vote.vote_margin)):
            mean += (new.to(mean) - mean) / self.num_updates
        self.suggested_codes = vote.suggested_label.to(self.suggested_codes)
        return self

    def find_label_issues(self) -> Tensor:
        """Indices of the label issues, most suspicious first."""
        return self._order()[: int(self.is_issue.sum())]

    def _order(self) -> Tensor:
        """Indices of all samples: the issues first, then the others, each by their scores."""
        by_score = self.scores.argsort(stable=True)
        return by_score[(~self.is_issue[by_score]).to(torch.uint8).argsort(stable=True)]

    def to_csv(
        self,
        path: str | Path,
        *,
        class_names: Sequence[str] | None = None,
        sample_names: Sequence[str] | None = None,
    ) -> None:
        """Write a table of all samples, the label issues first, each by their scores.

        Args:
            path: the file to write. An existing file is replaced.
            class_names: a name per label 0, 1, ..., if the labels are integers. Default: the
                labels.
            sample_names: a name per sample, in the order of the labels, for example its file.
                Default: the indices.
        """
        labels, suggested_labels = self.labels.tolist(), self.suggested_labels.tolist()
        if class_names is not None:
            labels = _names_of(labels, class_names)
            suggested_labels = _names_of(suggested_labels, class_names)
        # As lists, because a pandas Series looks up names by its index.
        samples = list(range(len(labels)) if sample_names is None else sample_names)
        if len(samples) != len(labels):
            raise ValueError(f"there are {len(samples)} sample_names for {len(labels)} samples")
        scores, is_issue = self.scores.tolist(), self.is_issue.tolist()
        # File names may have bytes that are not UTF-8.
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(["sample", "label", "score", "suggested_label", "is_issue"])
            for i in self._order().tolist():
                row = samples[i], labels[i], f"{scores[i]:.4g}", suggested_labels[i]
                writer.writerow([*row, int(is_issue[i])])

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
            dataset: the training set, without augmentation if possible. If this detector's labels
                are not integers, the dataset's must be their indices in sorted order.
            hook: another hook. Its return value is returned, so False still stops the training.
            collate_fn: the dataset's collate function, if it needs one.
        """

        def update_then_hook(trainer: Any) -> Any:
            embeddings, labels = tester.get_all_embeddings(
                dataset, trainer.models["trunk"], trainer.models["embedder"], collate_fn
            )
            if labels.ndim == 2 and labels.shape[1] > 1:
                labels = labels[:, tester.label_hierarchy_level]
            if not torch.equal(labels.flatten().to(self.label_codes), self.label_codes):
                raise ValueError("the dataset's labels are not the labels of this detector")
            self.update(embeddings)
            return hook(trainer) if hook is not None else None

        return update_then_hook


def _encode(labels: Any) -> tuple[Tensor, np.ndarray[Any, Any] | None]:
    """Labels as integers, and the values that these number, unless the labels are integers."""
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.shape == (0,):
        return torch.empty(0, dtype=torch.long), None
    if values.ndim != 1 or values.dtype.kind in "fc":
        raise ValueError(
            "labels must be N integers or other sortable values,"
            f" got {values.dtype} of shape {values.shape}"
        )
    if np.ma.is_masked(labels):
        raise ValueError("labels must not be masked")
    if values.dtype.kind in "iu":
        return torch.tensor(values.astype(np.int64)), None
    if any(map(_is_missing, np.asarray(labels, dtype=object))):
        raise ValueError("labels must not be missing (None or NaN)")
    try:
        classes, codes = np.unique(values, return_inverse=True)
    except TypeError as error:
        raise ValueError(f"labels must be values that can be sorted: {error}") from error
    return torch.from_numpy(codes.astype(np.int64)), classes


def _is_missing(value: Any) -> bool:
    """Whether it is None, NaN, NaT, or pandas' NA, whose comparison has no truth value."""
    try:
        return value is None or bool(value != value)
    except TypeError:
        return True


def _names_of(labels: Sequence[Any], class_names: Sequence[str]) -> list[str]:
    names = list(class_names)
    for label in labels:
        if not (isinstance(label, int) and 0 <= label < len(names)):
            raise ValueError(f"there are {len(names)} class_names and none for the label {label!r}")
    return [names[label] for label in labels]


def _warn_if_too_large(num_neighbors: int, codes: Tensor) -> None:
    _, class_index, sizes = torch.unique(codes, return_inverse=True, return_counts=True)
    too_few = (sizes > 1) & (sizes < num_neighbors)
    num_samples = int(too_few[class_index].sum())
    if num_samples > 0:
        warnings.warn(
            f"num_neighbors={num_neighbors} is more than the classes of {num_samples} of"
            f" {len(codes)} samples have: other classes may outvote right labels; leave it out to"
            " choose it from the class sizes",
            stacklevel=3,
        )
