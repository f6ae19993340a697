"""Listwise Self-Distillation (arXiv 2206.08880) around any loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pytorch_metric_learning.losses import BaseLossWrapper
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import Tensor

from .._component import HyperparametersMixin, check_count, require
from ..losses import ListwiseDistillationLoss
from .teacher import Teacher


class SelfDistillation(HyperparametersMixin, BaseLossWrapper, ModuleWithRecords):
    r"""Any loss, plus what the network knew of similarities an epoch ago.

    .. math:: L = L_\mathrm{loss} + \frac{t}{T}\,\alpha\,L_\mathrm{distillation}

    in epoch t = 0, 1, ..., with :class:`pml_extras.losses.ListwiseDistillationLoss` as the second
    term. In epoch 0, where its weight is 0, the teacher is not asked.

    In PML's trainers, pass ``end_of_epoch_hook(your_hook)`` as the trainer's hook. In a loop of
    your own, call :meth:`end_epoch` at the end of each epoch.

    Args:
        loss: any loss called as PML's, a CrossBatchMemory, DistributedLossWrapper or MultipleLosses
            among them.
        teacher: a :class:`SnapshotTeacher` or :class:`EMATeacher` of the network in training.
        num_epochs: T >= 1. From epoch T on, the weight stays at alpha.
        alpha: >= 0. The authors use 50 to 200, and up to 1000 in later work.
        temperature: > 0, in units of cosine similarity.
        **kwargs: PML's ``collect_stats``. Statistics for the log: ``base_loss``,
            ``distillation_loss`` (before its weight) and ``distillation_weight``.

    Attributes:
        epoch: t, the number of epochs that have ended. It is in the state_dict, with what the
            teacher needs to go on exactly after a resume.

    Raises:
        ValueError: for a setting out of range.
        RuntimeError: if the trunk's latest passes do not add up to as many samples as there are
            embeddings. Only numbers are compared: ask with the embeddings of the latest pass, or of
            the latest ones in their order, so that two losses on two views are one call.

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
        check_count("num_epochs", num_epochs)
        require(0 <= alpha < math.inf, "alpha", "lie in [0, inf)", alpha)
        super().__init__(loss=loss, **kwargs)
        self.loss = loss
        self.distillation = ListwiseDistillationLoss(temperature=temperature)
        self.teacher = teacher
        self.num_epochs = num_epochs
        self.alpha = alpha
        self.temperature = temperature
        self.epoch = 0
        self.add_to_recordable_attributes(list_of_names=list(self.hyperparameters()))
        self.add_to_recordable_attributes(
            list_of_names=["base_loss", "distillation_loss", "distillation_weight"], is_stat=True
        )

    def forward(self, embeddings: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the wrapped loss; all arguments go to it.

        In eval mode, and where gradients are disabled, it is the wrapped loss alone.
        """
        self.reset_stats()
        if not (self.training and torch.is_grad_enabled() and self.weight > 0):
            self.teacher.forget()
            base_loss: Tensor = self.loss(embeddings, *args, **kwargs)
            return base_loss
        # The teacher first: if the embeddings are not of its batch, a loss with state must not have
        # learnt from them.
        distillation: Tensor = self.distillation(
            embeddings, ref_emb=self.teacher.embed(len(embeddings))
        )
        loss: Tensor = self.loss(embeddings, *args, **kwargs)
        if self.collect_stats:
            self.base_loss, self.distillation_loss = loss.item(), distillation.item()
            self.distillation_weight = self.weight
        return loss + self.weight * distillation

    @property
    def weight(self) -> float:
        """What the distillation term is multiplied by in the present epoch."""
        return self.alpha * min(self.epoch / self.num_epochs, 1.0)

    def end_epoch(self) -> None:
        """Go on to the next epoch, with the network as it stands for a teacher."""
        self.epoch += 1
        self.teacher.end_epoch()

    def end_of_epoch_hook(self, hook: Callable[[Any], Any] | None = None) -> Callable[[Any], Any]:
        """A hook for PML's trainers, which ends the epoch here and then calls ``hook``, if given.

        Returns what ``hook`` returns, so that False still stops the training. Put a hook that saves
        inside rather than before it: what it saves then is the start of the next epoch.
        """

        def end_epoch_then_hook(trainer: Any) -> Any:
            self.end_epoch()
            self.epoch = trainer.epoch  # PML counts from 1: epochs that have ended
            return hook(trainer) if hook is not None else None

        return end_epoch_then_hook

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        """Any loss will do, since all that happens to it is that it is called."""

    def get_extra_state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "teacher": self.teacher.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.teacher.load_state_dict(state["teacher"])
