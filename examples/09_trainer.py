"""Hugging Face's Trainer fine-tunes a tiny GPT-2: Muon steps the hidden matrices, AdamW all else.

The model is small and random, and what it learns is to count: nothing is downloaded.
"""

import tempfile
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import optimisers as opt

WORDS, LENGTH = 16, 12


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Sentences that count upwards from anywhere, by one, around `WORDS`."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(WORDS, (count, 1), generator=generator)
    rows = (starts + torch.arange(LENGTH)) % WORDS
    return [{"input_ids": row, "labels": row} for row in rows]


def main(steps: int = 60) -> list[float]:
    """Train, and return the losses that the Trainer logs."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS,
            n_positions=LENGTH,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    rules = {opt.hidden_matrices: opt.Muon(0.02), "**": opt.AdamW(3e-3, lam=0.01)}
    optimizer = opt.TorchOptimizer(model, rules)
    print(opt.explain(optimizer.tree))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=16,
                lr_scheduler_type="cosine",
                warmup_steps=steps // 10,
                max_grad_norm=1.0,
                logging_steps=steps // 6,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=sentences(512, 0),
            optimizers=(optimizer, None),
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
