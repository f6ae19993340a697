"""What a row of the table says of a component: how to make it, and what it can do.

``Component.capabilities()`` has each capability's meaning, for whoever writes it down elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Literal, get_type_hints

import torch
from torch import Tensor, nn

NUM_CLASSES, EMBEDDING_SIZE = 6, 8  # of a component, where a contract asks for no others


@dataclass(frozen=True)
class Component:
    """A row. Its capabilities are statements: contracts rely on them and never try things out.

    What a row leaves unsaid holds as for most of PML's losses. Where a component states that it
    cannot do something, contracts check that it refuses.
    """

    name: str
    kind: Literal["loss", "miner", "regularizer", "knn_func"]
    factory: Callable[..., Any]
    """Given num_classes, embedding_size, the networks in training or None, and PML's arguments."""
    _: KW_ONLY

    takes_tuples: Annotated[bool, "Takes a miner's tuples."] = True
    weights_samples: Annotated[
        bool, "Tuples weight the samples they name, rather than choose the pairs to compare."
    ] = False
    needs_labels: Annotated[bool, "Needs labels."] = True
    needs_teacher_embeddings: Annotated[
        bool, "Needs a teacher's embeddings for ref_emb, which trainers do not give."
    ] = False
    takes_references: Annotated[
        bool, "Compares a batch with ref_emb, as DistributedLossWrapper(efficient=True) asks."
    ] = True
    supports_cross_batch_memory: Annotated[
        bool, "Goes into CrossBatchMemory and SelfSupervisedLoss."
    ] = True
    goes_in_distributed_wrapper: Annotated[
        bool, "Goes into DistributedLossWrapper, where processes are one with the joined batch."
    ] = True
    cosine_only: Annotated[bool, "Takes no distance but CosineSimilarity."] = False
    regularizes_weights: Annotated[bool, "Takes a weight_regularizer."] = False
    hands_on_unit_vectors: Annotated[
        bool, "Normalises embeddings before an embedding_regularizer sees them."
    ] = False
    keeps_dtypes: Annotated[
        bool, "Its parameters and buffers keep their dtypes, whatever that of the embeddings."
    ] = True
    syncs_device: Annotated[
        bool, "Makes the host wait for a GPU at each step, as PML's lists of pairs do."
    ] = False
    watches_a_network: Annotated[
        bool, "Wants embeddings of a network's latest pass, and to be told when an epoch ends."
    ] = False
    synced_buffers: Annotated[
        tuple[str, ...],
        "What in its state_dict is taken over the batches of all processes, to the last bit.",
    ] = ()
    without_draws: Annotated[
        dict[str, Any] | None,
        "The settings under which its random draws change nothing, if it draws any.",
    ] = None

    @classmethod
    def capabilities(cls) -> dict[str, str]:
        """The meaning of each capability, by its name."""
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
        """A fresh one, the same each time.

        Without ``models``, one that watches a network has a small one of its own.
        """
        torch.manual_seed(seed)
        return self.factory(num_classes, embedding_size, models, **kwargs)

    def embed(self, thing: Any, x: Tensor) -> Tensor:
        """x as it reaches the component: through the network of its own, if it watches one."""
        return thing.teacher._trunk(x) if self.watches_a_network else x

    def use(self, thing: Any, embeddings: Tensor, labels: Tensor | None, *args: Any) -> Any:
        """Use the component, or a wrapper that it is in: a loss for losses, else what comes out."""
        if self.kind == "regularizer":
            return thing.interfere(embeddings, labels)
        if self.kind == "knn_func":
            return thing(embeddings, 3, embeddings, True)
        if self.needs_teacher_embeddings:
            return thing(embeddings, labels, *args, ref_emb=embeddings.detach().relu())
        return thing(embeddings, labels, *args)

    def call(self, thing: Any, x: Tensor, labels: Tensor | None, *args: Any) -> Any:
        return self.use(thing, self.embed(thing, x), labels, *args)
