"""Listwise Self-Distillation (arXiv 2206.08880) around any loss."""

from collections.abc import Callable
from typing import Any

import torch
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import Tensor

from .. import _checks
from .._component import ExtraStateMixin, HyperparametersMixin, is_training_step
from ..losses import ListwiseDistillationLoss
from .teacher import Teacher


class SelfDistillation(HyperparametersMixin, ExtraStateMixin, ModuleWithRecords):
    r"""Adds self-distillation to any loss: the network also matches the similarity distributions of
    an earlier version of itself.

    .. math:: L = L_\mathrm{loss} + \frac{t}{T}\,\alpha\,L_\mathrm{distillation}

    in epoch t = 0, 1, ..., with :class:`pml_extras.losses.ListwiseDistillationLoss` as the second
    term. In epoch 0 its weight is 0, and the teacher is not used.

    In a loop of your own, the explicit form is as short:
    ``loss(x, labels) + weight * ListwiseDistillationLoss()(x, ref_emb=teacher_embeddings)``.
    This class is for code that only calls ``loss(embeddings, labels)``, such as PML's trainers:
    pass ``end_of_epoch_hook(your_hook)`` as the trainer's hook. In your own loop, call
    :meth:`end_epoch` at the end of each epoch.

    Args:
        loss: any loss that is called like PML's, including CrossBatchMemory,
            DistributedLossWrapper and MultipleLosses.
        teacher: a :class:`SnapshotTeacher` or :class:`EMATeacher` of the network in training.
        num_epochs: T >= 1. From epoch T on, the weight stays at alpha.
        alpha: >= 0. The authors use 50 to 200, and up to 1000 in later work.
        temperature: > 0, in units of cosine similarity.
        **kwargs: PML's ``collect_stats``. Statistics for the log: ``base_loss``,
            ``distillation_loss`` (before its weight) and ``distillation_weight``; all are 0 while
            the weight is 0.

    Attributes:
        epoch: t, the number of completed epochs. The state_dict contains it, and what the teacher
            needs to continue exactly after a resume.

    Raises:
        ValueError: for a hyperparameter out of range.
        RuntimeError: if the trunk's latest passes do not add up to as many samples as there are
            embeddings. Only sample counts are checked, so pass the embeddings of the latest batch;
            or of the latest passes in their order, for example two views in one call.

    Source: arXiv 2206.08880; alpha's default is the authors' for CUB with a triplet loss. The EMA
    teacher is ours.

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.losses import TripletMarginLoss
        >>> from pml_extras.distillation import SelfDistillation, SnapshotTeacher
        >>> trunk = torch.nn.Linear(4, 2)
        >>> loss_func = SelfDistillation(TripletMarginLoss(), SnapshotTeacher(trunk), num_epochs=2)
        >>> for epoch in range(2):
        ...     inputs, labels = torch.randn(8, 4), torch.arange(8) % 4
        ...     loss_func(trunk(inputs), labels).backward()
        ...     loss_func.end_epoch()
    """

    def __init__(
        self,
        loss: torch.nn.Module,
        teacher: Teacher,
        num_epochs: int,
        *,
        alpha: float = 50.0,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        num_epochs = _checks.count("num_epochs", num_epochs)
        _checks.non_negative(alpha=alpha)
        super().__init__(**kwargs)
        self.loss = loss
        self.distillation = ListwiseDistillationLoss(temperature=temperature)
        self.teacher = teacher
        self.num_epochs = num_epochs
        self.alpha = alpha
        self.temperature = temperature
        self.epoch = 0
        self.record("base_loss", "distillation_loss", "distillation_weight")

    def forward(self, embeddings: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The wrapped loss, which gets all arguments, plus the distillation term.

        In eval mode, without gradients, and while the weight is 0, it is the wrapped loss alone.
        """
        self.reset_stats()
        if not is_training_step(self):
            return self.loss(embeddings, *args, **kwargs)  # type: ignore[no-any-return]
        if self.weight == 0:
            self.teacher.skip_batch()
            loss: Tensor = self.loss(embeddings, *args, **kwargs)
            self.teacher.end_batch()
            return loss
        # The teacher first: if the embeddings are not of its batch, the loss must not change state.
        teacher_embeddings = self.teacher.embed(len(embeddings))
        distillation: Tensor = self.distillation(embeddings, ref_emb=teacher_embeddings)
        loss = self.loss(embeddings, *args, **kwargs)
        self.teacher.end_batch()
        if self.collect_stats:
            self.base_loss, self.distillation_loss = loss.item(), distillation.item()
            self.distillation_weight = self.weight
        return loss + self.weight * distillation

    @property
    def weight(self) -> float:
        """The weight of the distillation term in the current epoch."""
        return self.alpha * min(self.epoch / self.num_epochs, 1.0)

    def end_epoch(self) -> None:
        """Start the next epoch; a snapshot teacher becomes the network as it is now."""
        self.epoch += 1
        self.teacher.end_epoch()

    def end_of_epoch_hook(self, hook: Callable[[Any], Any] | None = None) -> Callable[[Any], Any]:
        """A hook for PML's trainers that ends the epoch and then calls ``hook``, if given.

        It returns what ``hook`` returns, so False still stops the training. Pass a hook that saves
        checkpoints as ``hook``: it then saves the state at the start of the next epoch.
        """

        def end_epoch_then_hook(trainer: Any) -> Any:
            self.end_epoch()
            # PML counts from 1, so this is the number of completed epochs.
            self.epoch = trainer.epoch
            return hook(trainer) if hook is not None else None

        return end_epoch_then_hook

    def extra_state(self) -> dict[str, Tensor]:
        teacher = {f"teacher.{name}": t for name, t in self.teacher.state_dict().items()}
        return {"epoch": torch.tensor(self.epoch), **teacher}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.epoch = int(state.pop("epoch", self.epoch))
        self.teacher.load_state_dict({n.removeprefix("teacher."): t for n, t in state.items()})
