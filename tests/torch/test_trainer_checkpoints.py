"""Does a run under a trainer go on from the newest whole checkpoint as if it had not been interrupted?"""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import optimisers as opt  # noqa: E402 torch may not be there

RULE = opt.Chain(opt.AddNoise(0.1, seed=3), opt.AdamW(opt.Cosine(0.05, 40), lam=0.1))

pytestmark = pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
)


def equal(mine: Any, theirs: Any) -> None:
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def fitted(folder: Path, epochs: int, make: Any = None, every: int = 3, **options: Any) -> tuple[Any, Any]:
    """(module, callback) after so many epochs of six shuffled batches under Lightning, with dropout."""
    import lightning

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)
            )

        def training_step(self, batch: Any, n: int) -> Any:
            return (self.net(batch) ** 2).mean()

        def configure_optimizers(self) -> Any:
            optimizer = make(self) if make else opt.TorchOptimizer(self, RULE)
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 9])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.arange(36.0).reshape(12, 3), batch_size=2, shuffle=True)

    torch.manual_seed(0)
    module = Lit()
    callback = opt.lightning_callback(opt.Checkpoints(folder, every=every), **options)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
    )
    trainer.fit(module)
    assert trainer.global_step == 6 * epochs
    return module, callback


def test_lightning_goes_on_to_the_bit_from_the_end_of_an_epoch(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    whole, _ = fitted(tmp_path / "whole", 3)
    fitted(tmp_path / "parts", 2, more=lambda: {"best": 0.5})
    found, callback = fitted(tmp_path / "parts", 3)
    equal(found, whole)
    assert callback.resumed.step == 12
    assert callback.resumed.more == {"best": 0.5}
    assert list(opt.Checkpoints(tmp_path / "parts").files) == [12, 15, 18]


def test_lightning_passes_by_a_damaged_checkpoint_and_counts_on(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    whole, _ = fitted(tmp_path / "whole", 2, every=6)
    fitted(tmp_path / "parts", 2, every=6)
    newest = opt.Checkpoints(tmp_path / "parts").files[12]
    newest.write_bytes(newest.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="an older checkpoint is taken"):
        found, callback = fitted(tmp_path / "parts", 2, every=6)
    equal(found, whole)
    assert callback.resumed.step == 6
    assert opt.saved(newest).more["step"] == 12


def test_another_optimiser_of_a_trainer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    with pytest.raises(opt.BadState, match="are Adam; its checkpoints take one TorchOptimizer"):
        fitted(tmp_path, 1, lambda module: torch.optim.Adam(module.parameters()))


def trained(folder: Path, steps: int) -> tuple[Any, Any]:
    """(model, callback) after so many steps of a run of eight under the Trainer, whose batches are alike."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step >= steps

    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(
        GPT2Config(
            **sizes,
            bos_token_id=0,
            eos_token_id=0,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0),
        )
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=8,
        per_device_train_batch_size=4,
        warmup_steps=2,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    callback = opt.trainer_callback(opt.Checkpoints(folder, every=2), lambda: {"best": 0.5})
    words, optimizer = torch.arange(8), opt.TorchOptimizer(model, RULE)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": words, "labels": words}] * 32,
        optimizers=(optimizer, None),
        callbacks=[callback, Ends()],
    )
    trainer.train()
    assert trainer.state.global_step == steps
    assert {int(entries["step"]) for entries in optimizer.state.values()} == {steps}
    return model, callback


def test_the_trainer_goes_on_to_the_bit_where_its_data_are_alike(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    whole, _ = trained(tmp_path / "whole", 8)
    trained(tmp_path / "parts", 5)
    found, callback = trained(tmp_path / "parts", 8)
    equal(found, whole)
    assert callback.resumed.step == 4
    assert callback.resumed.more == {"best": 0.5}
