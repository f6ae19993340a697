"""The type of the rows in the conformance table: how to make a component, and what it supports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Literal, get_type_hints

import torch
from torch import Tensor, nn

NUM_CLASSES, EMBEDDING_SIZE = 6, 8  # of a component, unless a test asks for others


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
    _: KW_ONLY

    takes_tuples: Annotated[bool, "Accepts the tuples of a miner"] = True
    weights_samples: Annotated[
        bool, "Tuples give weights to the samples instead of selecting pairs"
    ] = False
    needs_labels: Annotated[bool, "Requires labels"] = True
    needs_teacher_embeddings: Annotated[
        bool, "Requires a teacher's embeddings as ref_emb, which PML's trainers do not pass"
    ] = False
    takes_references: Annotated[
        bool, "Accepts ref_emb, which DistributedLossWrapper(efficient=True) passes"
    ] = True
    supports_cross_batch_memory: Annotated[
        bool, "Works in CrossBatchMemory and SelfSupervisedLoss"
    ] = True
    supports_distributed_wrapper: Annotated[
        bool,
        "Works in DistributedLossWrapper: processes get the same result as one process with the "
        "whole batch",
    ] = True
    cosine_only: Annotated[bool, "Requires CosineSimilarity as its distance"] = False
    supports_weight_regularizer: Annotated[bool, "Accepts a weight_regularizer"] = False
    normalizes_before_regularizer: Annotated[
        bool, "Passes normalized embeddings to an embedding_regularizer"
    ] = False
    keeps_dtypes: Annotated[
        bool, "Parameters and buffers keep their dtype for embeddings of any dtype"
    ] = True
    syncs_device: Annotated[
        bool, "Makes the host wait for the GPU in each step, as PML's pair selection does"
    ] = False
    observes_network: Annotated[
        bool, "Observes a network in training, and must be told when an epoch ends"
    ] = False
    synced_buffers: Annotated[
        tuple[str, ...], "Buffers that are equal in all processes, to the last bit"
    ] = ()
    without_randomness: Annotated[
        dict[str, Any] | None,
        "Hyperparameters with which random draws have no effect, if there are random draws",
    ] = None

    @classmethod
    def capabilities(cls) -> dict[str, str]:
        """The description of each capability, by its name."""
        hints = get_type_hints(cls, include_extras=True)
        return {n: h.__metadata__[0] for n, h in hints.items() if hasattr(h, "__metadata__")}

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
