"""Trainers that torchrun starts in two processes: they come to what one process comes to, go on from their
own checkpoints, and each process keeps its part of the state.
"""

import functools
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import optimisers as opt
from tests.processes import found_by

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="gloo does not meet there"),
]

STEPS = 4

RULE = opt.Chain(opt.ClipGlobalNorm(0.1), opt.AdamW(0.05, lam=0.1))


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))


def batches(rank: int = 0, count: int = 1) -> list[Any]:
    torch.manual_seed(1)
    return [torch.randn(8, 6)[rank::count] for _ in range(STEPS)]


def loss(net: Any, x: Any) -> Any:
    return (net(x) - x[:, :2].sin()).square().mean()


def alone() -> dict[str, Any]:
    """What one process comes to with whole batches."""
    net = network()
    optimizer = opt.TorchOptimizer(net, RULE)
    for x in batches():
        optimizer.zero_grad()
        loss(net, x).backward()
        optimizer.step()
    return dict(net.state_dict())


def whole(net: Any) -> dict[str, Any]:
    return {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in net.state_dict().items()}


def in_parts(optimizer: Any) -> bool:
    """Whether each process keeps a part of the state only."""
    large = [x for e in optimizer.state.values() for x in e.values() if x.numel() > 1]
    return bool(large) and all(isinstance(x, DTensor) and x.to_local().numel() < x.numel() for x in large)


# -- Lightning -----------------------------------------------------------------------------------------------


def lightning(folder: Path, how: str) -> dict[str, Any]:
    """Two epochs, and from the checkpoint after the first the second one again."""
    import lightning as pl
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def configure_model(self) -> None:
            if how == "ZeRO-1" or isinstance(next(self.net.parameters()), DTensor):
                return
            mesh: Any = self.device_mesh
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=mesh["data_parallel"])

        def training_step(self, batch: Any) -> Any:
            return loss(self.net, batch)

        def configure_optimizers(self) -> Any:
            return opt.TorchOptimizer(self, RULE, shard=dist.group.WORLD if how == "ZeRO-1" else None)

        def train_dataloader(self) -> Any:
            own = batches(dist.get_rank(), dist.get_world_size())
            half = own[: STEPS // 2] if self.current_epoch == 0 else own[STEPS // 2 :]
            return torch.utils.data.DataLoader(half, batch_size=None)

    def fit(epochs: int, checkpoint: Path | None = None) -> Any:
        module = Lit()
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(gradient_as_bucket_view=True)
            if how == "ZeRO-1"
            else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            reload_dataloaders_every_n_epochs=1,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, ckpt_path=checkpoint)
        assert in_parts(trainer.optimizers[0])
        return trainer, module

    file = folder / f"lightning {how}"
    _, module = fit(2)
    first, _ = fit(1)
    first.save_checkpoint(file)
    _, again = fit(2, file)
    return whole(module.net) | {f"again {k}": x for k, x in whole(again.net).items()}


# -- Accelerate ----------------------------------------------------------------------------------------------


def accelerate(folder: Path, how: str) -> dict[str, Any]:
    """All steps, and from the folder after half of them the others again."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    def fit(steps: slice, then: str = "") -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True)
        if how == "FSDP2":  # Accelerate takes it on devices only: from here on it does as there
            known: Any = AcceleratorState()
            PartialState._shared_state["distributed_type"] = known.distributed_type = DistributedType.FSDP
            known.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="NO_WRAP")
        net = network()
        optimizer = opt.TorchOptimizer(net, RULE, shard=dist.group.WORLD if how == "ZeRO-1" else None)
        net, optimizer = accelerator.prepare(net, optimizer)
        if then == "load":
            accelerator.load_state(folder / f"accelerate {how}")
        for x in batches(dist.get_rank(), dist.get_world_size())[steps]:
            optimizer.zero_grad()
            accelerator.backward(loss(net, x))
            optimizer.step()
        assert in_parts(optimizer.optimizer)
        if then == "save":
            optimizer.optimizer.consolidate_state_dict()
            accelerator.save_state(folder / f"accelerate {how}")
        return whole(accelerator.unwrap_model(net))

    found = fit(slice(None))
    fit(slice(0, STEPS // 2), "save")
    again = fit(slice(STEPS // 2, None), "load")
    return found | {f"again {k}": x for k, x in again.items()}


# -- the Trainer of Transformers -----------------------------------------------------------------------------


def language_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    without = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    sizes = {"vocab_size": 17, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **without, bos_token_id=0, eos_token_id=0))


def transformers(folder: Path, how: str = "alone") -> dict[str, Any]:
    """Four steps of four examples, and from the checkpoint after the second the others again."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class PutTogether(TrainerCallback):
        """Before the first process saves its state_dict, all put it together."""

        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            if control.should_save:
                optimizer.optimizer.consolidate_state_dict()

    words = torch.randint(0, 17, (32, 8), generator=torch.Generator().manual_seed(5))
    where = folder / f"transformers {how}"

    def fit(resume: str | None = None) -> Any:
        model = language_model()
        arguments = TrainingArguments(
            output_dir=str(where),
            max_steps=STEPS,
            per_device_train_batch_size=4 if how == "alone" else 2,
            learning_rate=0.02,
            weight_decay=0.1,
            max_grad_norm=0.5,
            save_steps=STEPS // 2,
            logging_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
        )
        settings: dict[str, Any] = {"rule": opt.AdamW(), "lr": 0.02}
        if how == "ZeRO-1":
            settings["shard"] = dist.group.WORLD
        trainer = Trainer(
            model,
            arguments,
            train_dataset=[{"input_ids": w, "labels": w} for w in words],
            optimizer_cls_and_kwargs=(opt.TorchOptimizer, settings),
            callbacks=[PutTogether()],
        )
        trainer.train(resume_from_checkpoint=resume)
        assert how != "ZeRO-1" or in_parts(trainer.optimizer.optimizer)
        return model.state_dict()

    found = fit()
    again = fit(str(where / f"checkpoint-{STEPS // 2}"))
    return found | {f"again {k}": x for k, x in again.items()}


# -- torchtitan ----------------------------------------------------------------------------------------------


class Container:
    """Optimisers as torchtitan makes and saves them: `optimizer_cls(params, **kwargs)` for each part of a
    pipeline, or for each parameter, stepped in backward; one flat state of all.
    """

    optimizer_cls: Any = functools.partial(opt.TorchOptimizer, rule=opt.AdamW())
    kwargs: ClassVar = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, parts: list[Any], *, in_backward: bool) -> None:
        self.parts = parts
        lists = [(part, [[p] for p in part.parameters()]) for part in parts]
        if not in_backward:
            lists = [(part, [list(part.parameters())]) for part in parts]
        self.each = [
            (part, self.optimizer_cls(params, **self.kwargs)) for part, several in lists for params in several
        ]
        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.9**n) for _, o in self.each]
        if in_backward:
            for _, optimizer in self.each:
                p = optimizer.param_groups[0]["params"][0]
                p.register_post_accumulate_grad_hook(lambda _, o=optimizer: self.step_one(o))

    @staticmethod
    def step_one(optimizer: Any) -> None:
        optimizer.step()
        optimizer.zero_grad()

    def step(self) -> None:
        for (_, optimizer), scheduler in zip(self.each, self.schedulers, strict=True):
            self.step_one(optimizer)
            scheduler.step()

    def state(self) -> dict[str, Any]:
        states = [dcp.get_optimizer_state_dict(part, o, options=self.options) for part, o in self.each]
        found: dict[str, Any] = {}
        for one in (*states, *map(dcp.get_model_state_dict, self.parts)):
            found |= one
        return found

    def load(self, file: Path, steps: int) -> None:
        found = self.state()
        checkpoint.load(found, checkpoint_id=file)
        for part in self.parts:
            dcp.set_model_state_dict(part, {k: found[k] for k in part.state_dict()})
        for part, optimizer in self.each:
            dcp.set_optimizer_state_dict(part, optimizer, found, options=self.options)
        for scheduler in self.schedulers:
            scheduler.last_epoch = steps - 1
            scheduler.step()


def torchtitan(folder: Path, how: str) -> dict[str, Any]:
    """All steps, and from the checkpoint after half of them the others again."""
    file = folder / f"torchtitan {how}"

    def fit(steps: slice, then: str = "") -> dict[str, Any]:
        net, mesh = network(), dist.device_mesh.init_device_mesh("cpu", (2,))
        for i in (0, 2):
            fully_shard(net[i], mesh=mesh)
        parts = [torch.nn.ModuleDict({key: net[int(key)]}) for key in ("0", "2")]
        held = Container(parts, in_backward=how == "in backward")
        if then == "load":
            held.load(file, steps.start)
        for x in batches(dist.get_rank(), dist.get_world_size())[steps]:
            loss(net, x).backward()
            held.step()
        assert all(in_parts(optimizer) for _, optimizer in held.each)
        if then == "save":
            checkpoint.save(held.state(), checkpoint_id=file)
        return whole(net)

    found = fit(slice(None))
    fit(slice(0, STEPS // 2), "save")
    again = fit(slice(STEPS // 2, None), "load")
    return found | {f"again {k}": x for k, x in again.items()}


def by_torch() -> dict[str, Any]:
    """What the AdamW of torch comes to with whole batches."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)
    for x in batches():
        optimizer.zero_grad()
        loss(net, x).backward()
        optimizer.step()
        scheduler.step()
    return dict(net.state_dict())


RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "lightning, ZeRO-1": lambda folder: lightning(folder, "ZeRO-1"),
    "lightning, FSDP2": lambda folder: lightning(folder, "FSDP2"),
    "accelerate, ZeRO-1": lambda folder: accelerate(folder, "ZeRO-1"),
    "accelerate, FSDP2": lambda folder: accelerate(folder, "FSDP2"),
    "torchtitan": lambda folder: torchtitan(folder, "by parts"),
    "torchtitan, in backward": lambda folder: torchtitan(folder, "in backward"),
    "transformers, DDP": lambda folder: transformers(folder, "DDP"),
    "transformers, ZeRO-1": lambda folder: transformers(folder, "ZeRO-1"),
}


def one_of_two(folder: Path) -> None:
    """Run all of them as one of the processes; what goes wrong is kept as text."""
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    for name, run in RUNS.items():
        try:
            result: Any = run(folder)
        except Exception:  # noqa: BLE001 the test of this part shows it
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes wrote what they found."""
    for name in ("lightning", "accelerate", "transformers"):
        pytest.importorskip(name)
    found = tmp_path_factory.mktemp("launched")
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "tests.torch.test_launched", str(found)),
        ],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    for rank in range(2):
        (found / f"{rank}.log").write_text(run.stdout + run.stderr)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_come_to_what_one_does_and_go_on_from_their_checkpoint(
    name: str, folder: Path, tmp_path: Path
) -> None:
    peers = {"transformers": lambda: transformers(tmp_path), "torchtitan": by_torch}
    wanted = peers.get(name.split(",", maxsplit=1)[0], alone)()
    for rank in range(2):
        found = found_by(rank, name, folder)
        for k, x in wanted.items():
            key = k.removeprefix("again ")
            for way in (key, f"again {key}"):
                assert torch.allclose(found[way], x, rtol=1e-5, atol=1e-5), way


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
