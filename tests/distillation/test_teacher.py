"""Teachers of networks as users have them: replaced methods, casts, wrappers, saved files."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from pytorch_metric_learning.losses import NTXentLoss
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from helpers.processes import run_processes
from helpers.state import same_state
from pml_extras.distillation import EMATeacher, SelfDistillation, SnapshotTeacher

TEACHERS = pytest.mark.parametrize("make_teacher", [SnapshotTeacher, EMATeacher])


def make_trunk():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def make_loss(teacher, epoch=1, **kwargs):
    loss_func = SelfDistillation(NTXentLoss(), teacher, num_epochs=1, **kwargs)
    loss_func.epoch = epoch
    return loss_func


def change_weights(trunk, scale=0.3):
    with torch.no_grad():
        for p in trunk.parameters():
            p += scale * torch.randn_like(p)


# ---- The copy is independent.


def replace_forward(trunk):
    trunk.forward = torch.compile(trunk.forward, backend="eager")


def replace_inner_forward(trunk):
    inner = trunk[3]
    original = inner.forward
    inner.forward = lambda x: original(x)


class WithFunctions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)
        self.steps = [lambda x: self.first(x), lambda x: self.second(x)]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


@TEACHERS
@pytest.mark.parametrize("kind", ["forward", "inner forward", "functions"])
def test_a_copy_that_shares_weights_is_refused_at_the_first_batch(make_teacher, kind):
    trunk = WithFunctions() if kind == "functions" else make_trunk()
    if kind != "functions":
        {"forward": replace_forward, "inner forward": replace_inner_forward}[kind](trunk)
    before = copy.deepcopy(trunk.state_dict())
    make_teacher(trunk)
    with pytest.raises(ValueError, match="shares weights with the network"):
        trunk(torch.randn(6, 5))
    after = trunk.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@TEACHERS
@pytest.mark.parametrize("kind", ["inner forward", "functions"])
def test_a_network_that_cannot_be_copied_can_be_built(make_teacher, kind):
    trunk = WithFunctions() if kind == "functions" else make_trunk()
    if kind == "inner forward":
        replace_inner_forward(trunk)
    make_copy = WithFunctions if kind == "functions" else make_trunk
    teacher = make_teacher(trunk, copy_module=lambda module: make_copy())
    x = torch.randn(6, 5)
    trunk.eval()
    assert torch.allclose(trunk(x), teacher.embed(6))
    change_weights(trunk)
    assert not torch.allclose(trunk(x), teacher.embed(6))


@pytest.mark.parametrize("make_teacher", [SnapshotTeacher])
def test_weight_norm_and_lazy_modules(make_teacher):
    normed = nn.utils.weight_norm(nn.Linear(5, 3))
    normed(torch.randn(2, 5))  # computes the weight, which deepcopy refuses
    with pytest.raises(ValueError, match=r"cannot be copied .*pass copy_module"):
        make_teacher(normed)
    make_teacher(normed, copy_module=lambda module: nn.utils.weight_norm(nn.Linear(5, 3)))
    normed(torch.randn(2, 5))
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="weight is not initialized: make the teacher after"):
        make_teacher(lazy)
    lazy(torch.randn(2, 5))
    make_teacher(lazy)


def test_the_check_does_not_disturb_training():
    """Random numbers, gradients, running statistics and the input stay as they are."""
    runs = []
    for has_teacher in (False, True):
        trunk = nn.Sequential(nn.ReLU(inplace=True), make_trunk(), nn.Dropout(0.5))
        if has_teacher:
            SnapshotTeacher(trunk)
        torch.manual_seed(1)
        x = torch.randn(6, 5)
        output = trunk(x)
        output.sum().backward()
        grads = [p.grad for p in trunk.parameters()]
        runs.append([output, x, torch.rand(1), *grads, *trunk.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- The copy follows the network.


@TEACHERS
@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.bfloat16], ids=["double", "bf16"])
def test_follows_the_dtype_of_the_network(make_teacher, convert):
    trunk = make_trunk()
    teacher = make_teacher(trunk)
    convert(trunk)
    dtype = trunk[0].weight.dtype
    loss_func = make_loss(teacher)
    for _ in range(2):
        x, labels = torch.randn(6, 5, dtype=dtype), torch.arange(6) % 2
        loss = loss_func(trunk(x).float(), labels)
        change_weights(trunk)
        loss_func.end_epoch()
    assert loss.isfinite()
    assert {p.dtype for p in teacher.network.parameters()} == {dtype}


@TEACHERS
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_follows_the_device_of_the_network(make_teacher):
    trunk = make_trunk()
    teacher = make_teacher(trunk)
    trunk.cuda()
    loss_func = make_loss(teacher)
    loss_func(trunk(torch.randn(6, 5).cuda()), torch.arange(6) % 2)
    assert {p.device.type for p in teacher.network.parameters()} == {"cuda"}


def test_an_average_in_bfloat16_moves_as_far_as_in_float32():
    """After 3,000 steps at decay 0.999, 95% of the way; in bfloat16 alone it was 15%."""
    trunk = nn.Linear(2, 2, bias=False).bfloat16()
    nn.init.zeros_(trunk.weight)
    teacher = EMATeacher(trunk, decay=0.999)
    loss_func = make_loss(teacher, epoch=0)
    x, labels = torch.randn(2, 2, dtype=torch.bfloat16), torch.arange(2)
    loss_func(trunk(x), labels)
    nn.init.ones_(trunk.weight)
    for _ in range(3000):
        loss_func(trunk(x), labels)
    moved = teacher.state_dict()["network.0.weight"]
    assert moved.dtype == torch.float32
    assert moved.mean().item() == pytest.approx(1 - 0.999**3000, abs=1e-3)
    assert teacher.network[0].weight.dtype == torch.bfloat16
    assert teacher.network[0].weight.float().mean().item() == pytest.approx(0.95, abs=5e-3)


def test_a_narrow_average_resumes_exactly():
    def run(steps, state=None):
        trunk = make_trunk().bfloat16()
        teacher = EMATeacher(trunk, decay=0.9)
        loss_func, generator = make_loss(teacher), torch.Generator().manual_seed(0)
        if state:
            loss_func.load_state_dict(state)
        for step in range(3):
            x = torch.randn(6, 5, generator=generator).bfloat16()
            if step in steps:
                loss_func(trunk(x), torch.arange(6) % 2)
            with torch.no_grad():
                for p in trunk.parameters():
                    p += 0.1
        return loss_func.state_dict()

    expected = run(range(3))
    resumed = run([2], run([0, 1]))
    for name, value in expected.items():
        if name.startswith("teacher") and "running" not in name and "tracked" not in name:
            assert torch.equal(resumed[name], value), name


# ---- Several forms of networks.


class DictTrunk(nn.Module):
    def __init__(self, returns):
        super().__init__()
        self.layer, self.returns = nn.Linear(5, 3), returns

    def forward(self, x):
        return self.returns(self.layer(x))


RETURNS = {
    "dict": (lambda x: {"pooled": x}, lambda output: output["pooled"]),
    "tuple": (lambda x: (x, None), lambda output: output[0]),
    "SimpleNamespace": (
        lambda x: SimpleNamespace(pooler_output=x),
        lambda output: output.pooler_output,
    ),
}


@TEACHERS
@pytest.mark.parametrize("kind", RETURNS)
def test_outputs_that_are_no_tensors(make_teacher, kind):
    returns, get_embeddings = RETURNS[kind]
    trunk, x = DictTrunk(returns), torch.randn(6, 5)
    teacher = make_teacher(trunk, get_embeddings=get_embeddings)
    embeddings = get_embeddings(trunk(x))
    assert torch.equal(teacher.embed(6), embeddings)
    make_teacher(trunk := DictTrunk(returns))
    with pytest.raises(ValueError, match=f"returned a {kind}: pass get_embeddings"):
        trunk(x)


def test_embeddings_of_another_shape_are_refused_at_the_first_batch():
    SnapshotTeacher(trunk := nn.Conv1d(5, 3, 1))
    with pytest.raises(ValueError, match=r"the teacher's embeddings must have shape \(batch_size"):
        trunk(torch.randn(6, 5, 2))


@TEACHERS
@pytest.mark.parametrize("order", ["teacher first", "compiled first", "compiled afterwards"])
def test_compiled_networks(make_teacher, order):
    torch._dynamo.reset()
    trunk = make_trunk().eval()
    if order == "compiled first":
        trunk = torch.compile(trunk, backend="eager")
    teacher = make_teacher(trunk)
    called = torch.compile(trunk, backend="eager") if order != "compiled first" else trunk
    x = torch.randn(6, 5)
    for _ in range(2):
        embeddings = called(x)
        assert torch.allclose(teacher.embed(6), embeddings, atol=1e-6)
        teacher.end_batch()
        assert len(teacher._pending_batches) == 1


def test_recomputed_passes_do_not_count():
    """Activation checkpointing calls the trunk again in backward."""
    trunk = make_trunk()
    teacher = EMATeacher(trunk, decay=0.5)
    loss_func = make_loss(teacher)
    for step in range(1, 4):
        x = torch.randn(6, 5, requires_grad=True)
        f = checkpoint(trunk, x, use_reentrant=False)
        loss_func(f, torch.arange(6) % 2).backward()
        assert teacher.num_updates == step
        assert len(teacher._pending_batches) == 1


def test_two_views_in_two_passes_are_one_update():
    trunk = make_trunk()
    teacher = EMATeacher(trunk)
    loss_func = make_loss(teacher)
    for step in range(1, 4):
        f = torch.cat([trunk(torch.randn(6, 5)) for _ in range(2)])
        loss_func(f, torch.arange(12) % 3)
        assert teacher.num_updates == step


def train_in_ddp(rank):
    trunk = make_trunk()
    parallel = DistributedDataParallel(trunk)
    results = []
    for make_teacher in (SnapshotTeacher, EMATeacher):
        teacher = make_teacher(parallel)
        loss_func = make_loss(teacher)
        torch.manual_seed(rank)
        x = torch.randn(6, 5)
        loss = loss_func(parallel(x), torch.arange(6) % 2)
        loss.backward()
        assert teacher.network[0] is not trunk
        assert teacher.network[0][0].weight is not trunk[0].weight
        results.append([p.grad for p in trunk.parameters()])
        teacher.remove()
    return results


@pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package")
def test_distributed_data_parallel(tmp_path):
    first, second = run_processes(train_in_ddp, tmp_path)
    for a, b in zip(first[1], second[1], strict=True):
        assert a.isfinite().all()
        assert torch.allclose(a, b)


def shard(rank):
    from torch.distributed.fsdp import fully_shard

    messages = []
    trunk = make_trunk()
    late = SnapshotTeacher(late_trunk := make_trunk())
    fully_shard(trunk), fully_shard(late_trunk)
    for call in (lambda: SnapshotTeacher(trunk), lambda: EMATeacher(trunk), late._follow_network):
        with pytest.raises(ValueError, match="is sharded over processes") as raised:
            call()
        messages.append(str(raised.value))
    return messages


@pytest.mark.skipif(not hasattr(torch.distributed, "fsdp"), reason="torch has no FSDP")
def test_sharded_networks_are_refused(tmp_path):
    for messages in run_processes(shard, tmp_path):
        assert all("whole parameters: use DistributedDataParallel" in m for m in messages)


# ---- Files.


@TEACHERS
def test_a_saved_trunk_does_not_carry_the_teacher(make_teacher):
    def size(module):
        file = io.BytesIO()
        torch.save(module, file)
        return file

    trunk = nn.Linear(200, 200)
    plain = len(size(trunk).getvalue())
    make_teacher(trunk)
    trunk(torch.randn(6, 200))
    file = size(trunk)
    assert len(file.getvalue()) < 1.1 * plain
    file.seek(0)
    loaded, x = torch.load(file, weights_only=False), torch.randn(2, 200)
    assert torch.equal(loaded(x), trunk(x))
    copied = copy.deepcopy(trunk)
    assert torch.equal(copied(x), trunk(x))


class Tied(nn.Module):
    """The second layer has the weight of the first, as in language models."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def trained_loss(trunk, make_teacher):
    loss_func = make_loss(make_teacher(trunk), epoch=0)
    for _ in range(2):
        x = torch.randn(6, 5, dtype=next(trunk.parameters()).dtype)
        loss_func(trunk(x), torch.arange(6) % 2)
        change_weights(trunk)
        loss_func.end_epoch()
    return loss_func


@TEACHERS
def test_tied_weights_are_saved_once_and_restored(make_teacher, tmp_path):
    loss_func = trained_loss(Tied(), make_teacher)
    safetensors.torch.save_file(loss_func.state_dict(), tmp_path / "plain.safetensors")
    safetensors.torch.save_model(loss_func, tmp_path / "model.safetensors")
    restored = make_loss(make_teacher(Tied()), epoch=0)
    safetensors.torch.load_model(restored, tmp_path / "model.safetensors")
    assert same_state(restored.state_dict(), loss_func.state_dict())
    again = make_loss(make_teacher(Tied()), epoch=0)
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "plain.safetensors"))
    assert same_state(again.state_dict(), loss_func.state_dict())


@TEACHERS
def test_a_checkpoint_in_several_files_restores_the_state(make_teacher):
    state = trained_loss(make_trunk(), make_teacher).state_dict()
    restored = make_loss(make_teacher(make_trunk()), epoch=0)
    for name, tensor in state.items():
        missing, unexpected = restored.load_state_dict({name: tensor}, strict=False)
        assert set(missing) == state.keys() - {name}
        assert not unexpected
    assert same_state(restored.state_dict(), state)


@TEACHERS
def test_a_checkpoint_of_a_wider_network_is_not_rounded(make_teacher):
    wide = trained_loss(make_trunk().double(), make_teacher)
    trunk = make_trunk()
    restored = make_loss(make_teacher(trunk), epoch=0)
    trunk.double()  # after the teacher was made, before any batch
    restored.load_state_dict(wide.state_dict())
    assert same_state(restored.state_dict(), wide.state_dict())


@TEACHERS
def test_extra_state_of_the_network_is_saved(make_teacher):
    class Counting(nn.Linear):
        count = 0

        def get_extra_state(self):
            return {"count": self.count}

        def set_extra_state(self, state):
            self.count = state["count"]

    trunk = Counting(5, 3)
    trunk.count = 7
    loss_func = make_loss(make_teacher(trunk))
    assert loss_func.state_dict()["teacher.network.0._extra_state"] == {"count": 7}


# ---- The copy embeds what the network embedded.


@TEACHERS
def test_a_hook_that_changes_the_input_is_applied_once(make_teacher):
    trunk = nn.Linear(5, 3)
    trunk.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    teacher = make_teacher(trunk)
    assert torch.equal(trunk(torch.randn(6, 5)), teacher.embed(6))


@pytest.mark.parametrize("changed_by", ["the network", "the next view"])
def test_an_input_that_was_overwritten_is_refused(changed_by):
    trunk = nn.Sequential(nn.ReLU(inplace=changed_by == "the network"), make_trunk())
    teacher = SnapshotTeacher(trunk)
    buffer = torch.randn(6, 5)
    trunk(buffer)
    if changed_by == "the next view":
        buffer.copy_(torch.randn(6, 5))
        trunk(buffer)
    with pytest.raises(RuntimeError, match="was changed in place"):
        teacher.embed(6 if changed_by == "the network" else 12)


@TEACHERS
def test_buffers_that_are_not_persistent_are_copied(make_teacher):
    trunk = nn.Linear(5, 3)
    trunk.register_buffer("offset", torch.zeros(3), persistent=False)
    trunk.register_forward_hook(lambda module, args, output: output + module.offset)
    teacher = make_teacher(trunk)
    trunk(torch.randn(6, 5))
    trunk.offset.fill_(3)
    teacher.end_batch()
    teacher.end_epoch()
    x = torch.randn(6, 5)
    assert torch.equal(trunk(x), teacher.embed(6))


@TEACHERS
def test_weights_shared_by_trunk_and_embedder(make_teacher):
    trunk, embedder = nn.Linear(5, 5), nn.Linear(5, 5)
    embedder.weight = trunk.weight
    teacher = make_teacher(trunk, embedder)
    assert torch.equal(embedder(trunk(torch.randn(6, 5))), teacher.embed(6))


@TEACHERS
@pytest.mark.parametrize("change", ["parametrization", "new layer", "other width"])
def test_a_network_that_changes_later_is_refused(make_teacher, change):
    trunk = nn.Sequential(nn.Linear(5, 3, bias=False))
    teacher = make_teacher(trunk)
    trunk(torch.randn(6, 5))
    if change == "parametrization":
        nn.utils.parametrizations.orthogonal(trunk[0])
    elif change == "new layer":
        trunk.append(nn.Linear(3, 3))
    else:
        trunk[0] = nn.Linear(5, 4, bias=False)
    with pytest.raises(
        ValueError, match="has other parameters or buffers than the teacher: in the"
    ):
        trunk(torch.randn(6, 5))
    teacher.remove()
    with pytest.raises(ValueError, match="other parameters"):
        make_teacher(trunk, copy_module=lambda module: nn.Sequential(nn.Linear(5, 2)))


def test_parameters_that_are_integers_are_copied():
    trunk = nn.Linear(5, 3)
    trunk.steps = nn.Parameter(torch.zeros(1, dtype=torch.long), requires_grad=False)
    teacher = EMATeacher(trunk)
    for step in range(3):
        trunk(torch.randn(6, 5))
        trunk.steps.fill_(step)
        teacher.end_batch()
    assert teacher.network[0].steps == 2


def test_a_trunk_that_contains_the_loss_is_refused():
    class WholeModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.loss = SelfDistillation(NTXentLoss(), SnapshotTeacher(self), num_epochs=2)

        def forward(self, x):
            return self.layer(x)

    with pytest.raises(ValueError, match="the trunk contains the loss"):
        WholeModel()(torch.randn(6, 5))


def test_scripted_networks_are_refused():
    with pytest.raises(ValueError, match="is a ScriptModule"):
        SnapshotTeacher(torch.jit.script(nn.Linear(5, 3)))


def test_a_network_without_gradients_is_noticed_in_the_first_epoch():
    trunk = make_trunk()
    loss_func = make_loss(EMATeacher(trunk), epoch=0)
    x = torch.randn(6, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="seen no batch"):
        loss_func(checkpoint(trunk, x, use_reentrant=True), torch.arange(6) % 2)


def test_networks_of_fabric():
    from lightning_fabric import Fabric

    trunk = make_trunk()
    teacher = SnapshotTeacher(Fabric(accelerator="cpu", devices=1).setup(trunk))
    trunk.eval()
    x = torch.randn(6, 5)
    assert torch.equal(trunk(x), teacher.embed(6))
