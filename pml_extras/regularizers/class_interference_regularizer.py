"""Class Interference Regularization (arXiv 2009.02396)."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from pytorch_metric_learning.regularizers import BaseRegularizer
from torch import Tensor
from torch.nn.functional import normalize as unit

from .._component import (
    HyperparametersMixin,
    check_class_labels,
    check_count,
    check_embeddings,
    require,
)
from .._distributed import joined_batch
from ..functional import class_interference, moving_class_means

HOOK_NAME = "class_interference"  # of the hook and the submodule of a loss with an interference


class ClassInterferenceRegularizer(HyperparametersMixin, BaseRegularizer):
    r"""Moves training embeddings towards other classes' means before a loss sees them.

    .. math::
        e_i' &= e_i + b_i\,\sigma\,(m_{n_i} - e_i) \\
        b_i &\sim \mathrm{Bernoulli}(p), \qquad
            n_i \sim \mathrm{Uniform}\{c \ne y_i : c \text{ has been seen}\}

    drawn independently for each embedding. Afterwards the clean embeddings update the class means:
    :math:`m_c \leftarrow \beta m_c + (1 - \beta)\,\text{batch mean}`.

    Changing embeddings needs labels, and PML's ``embedding_regularizer`` slot gives none, so attach
    the regularizer to the loss instead. The loss keeps its type and goes on working in trainers and
    wrappers, and the class means travel in its state_dict. Attach to the loss itself rather than to
    a wrapper around it, so that references and memory banks stay clean. What a loss keeps itself is
    made of what it sees: EMA centers are averages of moved embeddings, and ``ContextualLoss``
    no longer knows a moved sample's own row in a memory for its own.

    In eval mode nothing is changed or learnt. Under torch.distributed the means are over the
    batches of all processes, any of which may be empty, and equal in them to the last bit; all
    processes must call the loss, in training, as often. The means are taken in float64, which some
    devices (MPS) have not.

    Args:
        num_classes: C >= 2; labels lie in [0, C).
        embedding_size: D >= 1.
        strength: :math:`\sigma` in [0, 0.5). Below 0.5 an embedding at its class's mean stays
            closer to it than to the other one.
        probability: p in [0, 1].
        momentum: :math:`\beta` in [0, 1], how much of a mean is kept at each batch of its class.
        normalize: normalise the embeddings before and after, for losses on cosine similarity.
        random_strength: draw each embedding's strength from U(0, ``strength``).
        generator: a ``torch.Generator`` for the draws, whose state joins the state_dict. Default:
            torch's global generator.
        **kwargs: PML's ``collect_stats``. Statistics for the log: ``avg_shift`` (mean distance the
            embeddings were moved) and ``num_seen_classes``.

    Attributes:
        class_means: (C, D) float32.
        class_counts: (C,) int64, how many embeddings each class has had; 0: not seen.

    Raises:
        ValueError: for a label outside [0, C) (labels on a GPU are left to its own check),
            embeddings of another size, or a setting out of range.
        TypeError: when used in a regularizer slot, or attached to a wrapper.

    Source: the abstract of arXiv 2009.02396, "randomly moving them towards the average embeddings
    of the negative classes". The body was not available to us: the equation, the moving averages
    and all defaults are ours.

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.losses import TripletMarginLoss
        >>> from pml_extras.regularizers import ClassInterferenceRegularizer
        >>> regularizer = ClassInterferenceRegularizer(num_classes=10, embedding_size=8)
        >>> loss_func = regularizer.attach(TripletMarginLoss())
        >>> loss = loss_func(torch.randn(32, 8), torch.randint(10, (32,)))
    """

    hyperparameters = (
        "num_classes",
        "embedding_size",
        "strength",
        "probability",
        "momentum",
        "normalize",
        "random_strength",
    )

    class_means: Tensor
    class_counts: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        strength: float = 0.1,
        probability: float = 1.0,
        momentum: float = 0.9,
        normalize: bool = True,
        random_strength: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        check_count("num_classes", num_classes, least=2)
        check_count("embedding_size", embedding_size)
        require(0 <= strength < 0.5, "strength", "lie in [0, 0.5)", strength)
        require(0 <= probability <= 1, "probability", "lie in [0, 1]", probability)
        require(0 <= momentum <= 1, "momentum", "lie in [0, 1]", momentum)
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.strength = strength
        self.probability = probability
        self.momentum = momentum
        self.normalize = normalize
        self.random_strength = random_strength
        self.generator = generator
        self.add_to_recordable_attributes(list_of_names=list(self.hyperparameters))
        self.add_to_recordable_attributes(
            list_of_names=["avg_shift", "num_seen_classes"], is_stat=True
        )
        self._batch: tuple[Tensor, Tensor] | None = None  # what is still to be learnt from
        self.register_buffer("class_means", torch.zeros(num_classes, embedding_size))
        self.register_buffer("class_counts", torch.zeros(num_classes, dtype=torch.long))

    def interfere(self, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        """The embeddings, (N, D), as the loss is to see them; in training, learns from them too."""
        interfered = self._interfere(embeddings, labels)
        self._learn()
        return interfered

    def _interfere(self, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        self._batch = None
        if not self.training:
            return embeddings
        self.reset_stats()
        labels = check_class_labels(labels, self.num_classes)
        check_embeddings(embeddings, self.embedding_size)
        if labels.shape != embeddings.shape[:1]:
            raise ValueError(
                f"labels must have shape ({len(embeddings)},), got {tuple(labels.shape)}"
            )
        labels = labels.to(embeddings.device, torch.long)
        self._batch = embeddings.detach(), labels
        if len(embeddings) == 0:
            return embeddings
        interfered = class_interference(
            embeddings,
            labels,
            self.class_means,
            self.class_counts,
            self.strength,
            self.probability,
            self.normalize,
            self.random_strength,
            self.generator,
        ).to(embeddings.dtype)
        if self.collect_stats:
            clean = unit(embeddings) if self.normalize else embeddings
            self.avg_shift = (interfered - clean).detach().norm(dim=1).mean().item()
        return interfered

    @torch.no_grad()
    def _learn(self) -> None:
        """Update the means with the clean embeddings of the batch."""
        if self._batch is None:
            return
        embeddings, labels = joined_batch(self._batch[0].to(self.class_means.dtype), self._batch[1])
        if self.normalize:
            embeddings = unit(embeddings)
        self.class_means[labels], self.class_counts[labels] = moving_class_means(
            self.class_means, self.class_counts, embeddings, labels, self.momentum
        )
        self._batch = None
        if self.collect_stats:
            self.num_seen_classes = int((self.class_counts > 0).sum())

    def attach(self, loss: torch.nn.Module) -> torch.nn.Module:
        """Interfere with the embeddings of every call of ``loss`` from now on; returns ``loss``."""
        if isinstance(getattr(loss, "loss", None), torch.nn.Module):
            raise TypeError(
                f"{type(loss).__name__} wraps a loss: attach to that, its .loss, so that the"
                " references stay clean"
            )
        if hasattr(loss, HOOK_NAME):
            raise ValueError(f"{type(loss).__name__} has a class interference attached already")
        loss.add_module(HOOK_NAME, self)
        # As register_forward_pre_hook(with_kwargs=True) and register_forward_hook do, but under a
        # name: record-keeper logs every dict in a loss, and the number for a key would crash it.
        before, with_kwargs, after = _hooks(loss)
        before[HOOK_NAME], with_kwargs[HOOK_NAME] = self._before_loss, True
        after[HOOK_NAME] = self._after_loss
        return loss

    def detach(self, loss: torch.nn.Module) -> torch.nn.Module:
        """Undo :meth:`attach`; returns ``loss``."""
        if getattr(loss, HOOK_NAME, None) is not self:
            raise ValueError(f"this regularizer is not attached to that {type(loss).__name__}")
        delattr(loss, HOOK_NAME)
        for hooks in _hooks(loss):
            del hooks[HOOK_NAME]
        return loss

    def _before_loss(
        self, loss: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = ("embeddings", "labels")  # the first two arguments of every PML loss
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        kwargs["embeddings"] = self._interfere(kwargs["embeddings"], kwargs.get("labels"))
        positional = tuple(kwargs.pop(name) for name in names[: len(args)])
        return (*positional, *args[2:]), kwargs

    def _after_loss(self, loss: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._learn()  # only now: a batch that the loss has refused is not learnt from

    def compute_loss(self, embeddings: Tensor) -> NoReturn:
        raise TypeError(
            "ClassInterferenceRegularizer changes embeddings, which a regularizer slot cannot:"
            " call regularizer.attach(loss) instead"
        )

    def get_extra_state(self) -> Tensor | None:
        return None if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state: Tensor | None) -> None:
        if self.generator is not None and state is not None:
            self.generator.set_state(state.cpu())


def _hooks(module: torch.nn.Module) -> tuple[dict[Any, Any], ...]:
    """Where a module keeps its hooks before forward, which of them take kwargs, and those after."""
    return (
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
    )
