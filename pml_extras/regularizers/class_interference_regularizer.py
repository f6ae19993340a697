"""Class Interference Regularization (arXiv 2009.02396)."""

from typing import Any, NoReturn

import torch
from pytorch_metric_learning.regularizers import BaseRegularizer
from torch import Tensor
from torch.nn.functional import normalize as normalize_rows

from .. import _checks
from .._component import (
    AccumulatorsMixin,
    ExtraStateMixin,
    HyperparametersMixin,
    accumulator_dtype,
    is_training_step,
)
from ..functional import class_interference, moving_class_means
from ..functional._distributed import gather_batch

ATTACHED_AS = "class_interference"  # the name of the submodule and of the hooks of a loss


class ClassInterferenceRegularizer(
    HyperparametersMixin, AccumulatorsMixin, ExtraStateMixin, BaseRegularizer
):
    r"""Moves training embeddings toward the means of other classes before a loss sees them.

    .. math::
        e_i' &= e_i + b_i\,\sigma\,(m_{n_i} - e_i) \\
        b_i &\sim \mathrm{Bernoulli}(p), \qquad
            n_i \sim \mathrm{Uniform}\{c \ne y_i : c \text{ has a mean}\}

    drawn independently for each embedding. Afterwards the clean embeddings update the class means:
    :math:`m_c \leftarrow \beta m_c + (1 - \beta)\,\text{batch mean}`.

    This needs labels, which PML's ``embedding_regularizer`` slot does not pass. So attach the
    regularizer to the loss instead: ``regularizer.attach(loss)``. The loss keeps its type and works
    in trainers and wrappers as before, and the class means are in its state_dict. Attach to the
    loss itself, not to a wrapper around it, so that references and memory banks stay clean. The
    loss's own state is computed from what the loss sees: EMA centers are averages of perturbed
    embeddings, and ``ContextualLoss`` does not recognize a perturbed sample's own row in a memory.

    In eval mode and under ``torch.no_grad()`` the embeddings are not changed and the means are not
    updated; :meth:`update_class_means` updates them in any case. Under torch.distributed the means
    are over the batches of all processes, which may be empty, and they are equal bit by bit; all
    processes must call the loss in training equally often. The means are computed in float64, which
    some devices (MPS) do not support. They are kept in float32 or wider, also if the module is cast
    to half precision.

    Args:
        num_classes: C >= 2; labels lie in [0, C).
        embedding_size: D >= 1.
        strength: :math:`\sigma` in [0, 0.5). Below 0.5 an embedding at its class's mean stays
            closer to it than to the other mean.
        probability: p in [0, 1].
        momentum: :math:`\beta` in [0, 1], how much of a mean is kept at each batch of its class.
        normalize: normalize the embeddings before and after, for losses on cosine similarity.
        random_strength: draw each embedding's strength from U(0, ``strength``).
        generator: a ``torch.Generator`` for the draws, whose state is in the state_dict. Default:
            torch's global generator.
        **kwargs: PML's ``collect_stats``. Statistics for the log: ``avg_shift`` (the mean distance
            by which embeddings were moved) and ``num_seen_classes``.

    Attributes:
        class_means: (C, D) float32.
        class_counts: (C,) int64, how many embeddings are in each mean; 0 means no mean.

    Raises:
        ValueError: for a label outside [0, C) (labels on a GPU are left to its own check),
            embeddings of another size, or a hyperparameter out of range.
        TypeError: in a regularizer slot, or if attached to a wrapper.

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
        num_classes = _checks.count("num_classes", num_classes, least=2)
        embedding_size = _checks.count("embedding_size", embedding_size)
        _checks.in_half_open_range(0, 0.5, strength=strength)
        _checks.in_range(0, 1, probability=probability, momentum=momentum)
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.strength = strength
        self.probability = probability
        self.momentum = momentum
        self.normalize = normalize
        self.random_strength = random_strength
        self.generator = generator
        self.record("avg_shift", "num_seen_classes")
        self._pending_batch: tuple[Tensor, Tensor] | None = None  # not yet in the means
        means = torch.zeros(num_classes, embedding_size, dtype=accumulator_dtype())
        self.register_buffer("class_means", means)
        self.register_buffer("class_counts", torch.zeros(num_classes, dtype=torch.long))

    def interfere(self, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        """The perturbed embeddings, (N, D). In training mode, also updates the class means."""
        perturbed = self._perturb(embeddings, labels)
        self._update_pending()
        return perturbed

    def _perturb(self, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        self._pending_batch = None
        if not is_training_step(self):
            return embeddings
        self.reset_stats()
        sizes = self.embedding_size, self.num_classes
        labels = _checks.class_batch(embeddings, labels, *sizes)
        self._pending_batch = embeddings.detach(), labels
        if len(embeddings) == 0:
            return embeddings
        perturbed = class_interference(
            embeddings,
            labels,
            self.class_means,
            self.class_counts,
            strength=self.strength,
            probability=self.probability,
            normalize=self.normalize,
            random_strength=self.random_strength,
            generator=self.generator,
        ).to(embeddings.dtype)
        if self.collect_stats:
            clean = normalize_rows(embeddings) if self.normalize else embeddings
            self.avg_shift = (perturbed - clean).detach().norm(dim=1).mean().item()
        return perturbed

    def _update_pending(self) -> None:
        if self._pending_batch is not None:
            batch, self._pending_batch = self._pending_batch, None
            self._update_class_means(*batch)

    def update_class_means(self, embeddings: Tensor, labels: Tensor) -> None:
        """Update the class means with a batch, as a training step does, in any mode.

        Args:
            embeddings: (N, D), clean, any floating dtype.
            labels: (N,) integers in [0, C).

        Raises:
            ValueError: for other arguments.
        """
        sizes = self.embedding_size, self.num_classes
        self._update_class_means(embeddings, _checks.class_batch(embeddings, labels, *sizes))

    @torch.no_grad()
    def _update_class_means(self, embeddings: Tensor, labels: Tensor) -> None:
        embeddings, labels = gather_batch(embeddings.to(self.class_means.dtype), labels)
        if self.normalize:
            embeddings = normalize_rows(embeddings)
        self.class_means[labels], self.class_counts[labels] = moving_class_means(
            self.class_means, self.class_counts, embeddings, labels, momentum=self.momentum
        )
        if self.collect_stats:
            self.num_seen_classes = int((self.class_counts > 0).sum())

    def attach(self, loss: torch.nn.Module) -> torch.nn.Module:
        """Perturb the embeddings in every call of ``loss`` from now on. Returns ``loss``."""
        if isinstance(getattr(loss, "loss", None), torch.nn.Module):
            raise TypeError(
                f"{type(loss).__name__} wraps a loss: attach to that, its .loss, so that the"
                " references stay clean"
            )
        if hasattr(loss, ATTACHED_AS):
            raise ValueError(f"{type(loss).__name__} already has a class interference attached")
        loss.add_module(ATTACHED_AS, self)
        pre_hooks, pre_hooks_with_kwargs, hooks = _hook_dicts(loss)
        pre_hooks[ATTACHED_AS], pre_hooks_with_kwargs[ATTACHED_AS] = self._before_loss, True
        hooks[ATTACHED_AS] = self._after_loss
        return loss

    def detach(self, loss: torch.nn.Module) -> torch.nn.Module:
        """Undo :meth:`attach`. Returns ``loss``."""
        if getattr(loss, ATTACHED_AS, None) is not self:
            raise ValueError(f"this regularizer is not attached to that {type(loss).__name__}")
        delattr(loss, ATTACHED_AS)
        for hooks in _hook_dicts(loss):
            del hooks[ATTACHED_AS]
        return loss

    def _before_loss(
        self, loss: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = ("embeddings", "labels")  # the first two arguments of every PML loss
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        kwargs["embeddings"] = self._perturb(kwargs["embeddings"], kwargs.get("labels"))
        positional = tuple(kwargs.pop(name) for name in names[: len(args)])
        return (*positional, *args[2:]), kwargs

    def _after_loss(self, loss: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._update_pending()  # only now, so that a batch that the loss refuses changes nothing

    def compute_loss(self, embeddings: Tensor) -> NoReturn:
        raise TypeError(
            "ClassInterferenceRegularizer changes embeddings, which a regularizer slot cannot do:"
            " call regularizer.attach(loss) instead"
        )

    def extra_state(self) -> dict[str, Tensor]:
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        if self.generator is not None and "generator" in state:
            self.generator.set_state(state["generator"].cpu())


def _hook_dicts(module: torch.nn.Module) -> tuple[dict[Any, Any], ...]:
    """The private dicts where torch keeps a module's forward pre-hooks, which of them take kwargs,
    and its forward hooks.

    ``register_forward_pre_hook`` would use an integer as the key. record-keeper logs every dict of
    a loss and fails on such keys, so hooks are entered under a string.
    """
    pre_hooks, with_kwargs = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
    return pre_hooks, with_kwargs, module._forward_hooks
