"""A LoRA fine-tuning run with TRL and PEFT, measured: run by the Python of an environment that has them.

python trl_lora.py MODEL DATA --steps 4 --dtype float32|bfloat16   prints one JSON object
"""

import argparse
import json
import resource

import torch
from clock import Clock
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save")
    parser.add_argument("--adapter", help="start from this adapter in place of a fresh one")
    parser.add_argument("--all-tokens", action="store_true", help="the rows are no chats, or all is trained")
    parser.add_argument("--full", action="store_true", help="train all weights")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--same", action="store_true", help="the rows in their order")
    return parser.parse_args()


def main():
    given = arguments()
    torch.set_num_threads(given.threads)
    with open(given.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    config = SFTConfig(
        output_dir="unused", max_steps=given.steps, per_device_train_batch_size=8, max_length=512,
        learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
        gradient_checkpointing=given.checkpointing, bf16=given.dtype == "bfloat16", packing=given.packing,
        assistant_only_loss=not given.all_tokens, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
        disable_tqdm=True, seed=0,
    )  # fmt: skip
    clock = Clock()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if given.adapter:
        model = PeftModel.from_pretrained(model, given.adapter, is_trainable=True)
    trainer = SFTTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), callbacks=[clock],
        processing_class=AutoTokenizer.from_pretrained(given.model),
        peft_config=None if given.adapter or given.full else lora,
    )  # fmt: skip
    if given.same:
        trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    tokens = []
    step = trainer.training_step

    def counted(model, inputs, *more):
        mask = inputs.get("attention_mask")
        tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
        return step(model, inputs, *more)

    trainer.training_step = counted
    trainer.train()
    if given.save:
        trainer.save_model(given.save)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rates = [count / seconds for count, seconds in zip(tokens, clock.seconds, strict=False)]
    print(
        json.dumps(
            {
                "tokens_per_second": rates,
                "tokens": tokens,
                "peak_bytes": peak,
                "losses": losses,
                "norms": norms,
            }
        )
    )


if __name__ == "__main__":
    main()
