"""The type of the rows in the conformance table: how to make a component, and what it supports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

NUM_CLASSES, EMBEDDING_SIZE = 6, 8  # of a component, unless a test asks for others


def capability(default: Any, description: str) -> Any:
    return field(default=default, kw_only=True, metadata={"description": description})


@dataclass(frozen=True)
class Component:
    """A row of the table.

    Its capabilities declare what the component supports. The tests rely on them: what a component
    supports must work, and what it does not support must raise an error. The defaults hold for most
    of PML's losses. The descriptions are shown in the documentation.
    """

    name: str
    kind: Literal["loss", "miner", "regularizer", "knn_func"]
    factory: Callable[..., Any]
    """Takes num_classes, embedding_size, the networks in training or None, and PML's arguments."""

    takes_tuples: bool = capability(True, "Accepts the tuples of a miner")
    weights_samples: bool = capability(
        False, "Tuples weight samples by how often they occur, instead of selecting pairs"
    )
    needs_labels: bool = capability(True, "Requires labels")
    needs_teacher_embeddings: bool = capability(
        False, "Requires a teacher's embeddings as ref_emb, which PML's trainers do not pass"
    )
    takes_references: bool = capability(
        True, "Accepts ref_emb, which DistributedLossWrapper(efficient=True) passes"
    )
    supports_cross_batch_memory: bool = capability(
        True,
        "Works in CrossBatchMemory and SelfSupervisedLoss",
    )
    supports_distributed_wrapper: bool = capability(
        True,
        "Works in DistributedLossWrapper: processes get the same result as one process with the "
        "whole batch",
    )
    cosine_only: bool = capability(False, "Requires CosineSimilarity as its distance")
    supports_weight_regularizer: bool = capability(False, "Accepts a weight_regularizer")
    normalizes_before_regularizer: bool = capability(
        False, "Passes normalized embeddings to an embedding_regularizer"
    )
    keeps_dtypes: bool = capability(
        True, "Parameters and buffers keep their dtype for embeddings of any dtype"
    )
    syncs_device: bool = capability(
        False, "Makes the host wait for the GPU in each step, as PML's pair selection does"
    )
    observes_network: bool = capability(
        False, "Observes a network in training, and must be told when an epoch ends"
    )
    synced_buffers: tuple[str, ...] = capability(
        (), "Buffers that are equal in all processes, to the last bit"
    )
    without_randomness: dict[str, Any] | None = capability(  # noqa: RUF009
        None, "Hyperparameters with which random draws have no effect, if there are random draws"
    )

    @classmethod
    def capabilities(cls) -> dict[str, str]:
        """The description of each capability, by its name."""
        return {f.name: f.metadata["description"] for f in fields(cls) if f.metadata}

    def make(
        self,
        num_classes: int = NUM_CLASSES,
        embedding_size: int = EMBEDDING_SIZE,
        models: list[nn.Module] | None = None,
        seed: int = 1,
        **kwargs: Any,
    ) -> Any:
        """A new instance, the same for the same seed.

        One that observes a network gets a small network of its own if ``models`` is None.
        """
        torch.manual_seed(seed)
        return self.factory(num_classes, embedding_size, models, **kwargs)

    def embed(self, instance: Any, x: Tensor) -> Tensor:
        """The component's input: the output of the network that it observes, or x itself."""
        return instance.teacher._trunk(x) if self.observes_network else x

    def use(self, instance: Any, embeddings: Tensor, labels: Tensor | None, *args: Any) -> Any:
        """Call the component, or a wrapper of it, as a training step or a tester would."""
        if self.kind == "regularizer":
            return instance.interfere(embeddings, labels)
        if self.kind == "knn_func":
            return instance(embeddings, 3, embeddings, True)
        if self.needs_teacher_embeddings:
            return instance(embeddings, labels, *args, ref_emb=embeddings.detach().relu())
        return instance(embeddings, labels, *args)

    def call(self, instance: Any, x: Tensor, labels: Tensor | None, *args: Any) -> Any:
        """Embed ``x`` and use the component."""
        return self.use(instance, self.embed(instance, x), labels, *args)
