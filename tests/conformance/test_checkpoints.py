"""Checkpoints as other libraries write them: safetensors, Hugging Face's Trainer, accelerate."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from helpers.state import same_state

from .capabilities import EMBEDDING_SIZE, NUM_CLASSES

pytestmark = pytest.mark.filterwarnings(
    "ignore:num_neighbors", "ignore:torch.distributed is disabled", "ignore:Detected an existing"
)


def test_state_dict_holds_tensors_only(component, x, labels):
    instance = component.make(collect_stats=True)
    component.call(instance, x, labels)
    assert all(isinstance(value, torch.Tensor) for value in instance.state_dict().values())


def test_safetensors_restores_the_state(component, x, labels, tmp_path):
    instance = component.make()
    for _ in range(2):
        component.call(instance, x, labels)
    save_file(instance.state_dict(), tmp_path / "state.safetensors")
    restored = component.make(seed=99)
    restored.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert same_state(dict(restored.state_dict()), dict(instance.state_dict()))


def test_distributed_checkpoints_restore_the_state(component, x, labels, tmp_path):
    instance = component.make()
    for _ in range(2):
        component.call(instance, x, labels)
    if not instance.state_dict():
        pytest.skip("has no state")
    dcp.save(get_model_state_dict(instance), checkpoint_id=tmp_path / "checkpoint")
    restored = component.make(seed=99)
    state = get_model_state_dict(restored)
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
    set_model_state_dict(restored, state)
    assert same_state(dict(restored.state_dict()), dict(instance.state_dict()))


class Model(nn.Module):
    """A network with its loss, as Hugging Face's Trainer and accelerate train them."""

    def __init__(self, component):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(5, EMBEDDING_SIZE)
        self.loss = component.make(models=[self.trunk])

    def forward(self, x, labels):
        embeddings = self.trunk(x)
        return {"loss": self.loss(embeddings, labels), "embeddings": embeddings}


class Data(Dataset):
    def __init__(self):
        self.labels = torch.arange(96) % NUM_CLASSES
        self.x = torch.randn(96, 5, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.labels[i]}


def end_epoch(model, component):
    if component.observes_network:
        model.loss.end_epoch()


# Losses that PML's trainers can call, and so others too.
TRAINED = pytest.mark.components_with(needs_teacher_embeddings=False)


@TRAINED
def test_hugging_face_trainer_resumes_exactly(loss_component, tmp_path):
    def train(max_steps, resume=None):
        model = Model(loss_component)
        end_epoch(model, loss_component)
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            max_steps=max_steps,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            per_device_train_batch_size=24,
            per_device_eval_batch_size=24,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            use_cpu=True,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=Data(), eval_dataset=Data())
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    expected = train(4)
    resumed = train(4, str(tmp_path / "run" / "checkpoint-2"))
    assert same_state(dict(resumed), dict(expected))


@TRAINED
def test_accelerate_resumes_exactly(loss_component, tmp_path):
    def train(steps, load=None, save=None):
        model = Model(loss_component)
        end_epoch(model, loss_component)
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        model, optimizer, loader = accelerator.prepare(
            model, optimizer, DataLoader(Data(), batch_size=24)
        )
        if load:
            accelerator.load_state(str(load))
        for step, batch in enumerate(loader):
            if step in steps:
                optimizer.zero_grad()
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                with torch.no_grad():
                    model(**batch)  # a validation
        if save:
            accelerator.save_state(str(save))
        return accelerator.unwrap_model(model).state_dict()

    expected = train(range(4))
    train(range(2), save=tmp_path / "state")
    resumed = train(range(2, 4), load=tmp_path / "state")
    assert same_state(dict(resumed), dict(expected))
