"""One script for every engine: train on the best quarter of the candidates.

    torchrun --nproc_per_node 2 examples/launch/train.py

Without `--model` and `--data` (a text file) it trains a tiny model on numbers, half of them noise.
It takes every option of TrainingArguments, too; README.md beside this file has the launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from transformers.distributed.configuration_utils import DistributedConfig

from onlinesel.callbacks.hf import OnlineSelection
from onlinesel.strategies import UDS


@dataclass
class Options:
    model: str = ""  # name or folder of a causal language model
    data: str = ""  # text file, cut into rows of 128 tokens
    candidates: int = 4  # rows scored for each row that trains
    fsdp_size: int = 1  # processes that share a --model with FSDP2, by transformers itself


def main() -> None:
    """Read the options, train, and say on which engine."""
    parser = hf.HfArgumentParser((Options, hf.TrainingArguments))
    # Without use_cpu the Trainer does not see the other processes of a machine without a GPU.
    parser.set_defaults(use_cpu=not torch.cuda.is_available(), max_steps=40, logging_steps=10)
    options, args = parser.parse_args_into_dataclasses()
    hf.set_seed(args.seed)
    counting = (torch.arange(256).unsqueeze(1) + torch.arange(24)) % 64
    rows = torch.cat([counting, torch.randint(64, (256, 24))]).tolist()
    if options.data:
        tokenizer = hf.AutoTokenizer.from_pretrained(options.model)
        tokens = tokenizer(Path(options.data).read_text("utf-8")).input_ids
        rows = [tokens[i : i + 128] for i in range(0, len(tokens) - 127, 128)]
    if options.model:
        shards = DistributedConfig(fsdp_size=options.fsdp_size) if options.fsdp_size > 1 else None
        model = hf.AutoModelForCausalLM.from_pretrained(options.model, distributed_config=shards)
    else:
        sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, intermediate_size=128))
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    trainer = hf.Trainer(model, args, train_dataset=dataset)
    trainer.add_callback(OnlineSelection(trainer, UDS(), candidates=options.candidates))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        engine = type(trainer.model_wrapped).__name__
        loss = [log["loss"] for log in trainer.state.log_history if "loss" in log][-1]
        print(f"{engine} on {args.world_size} process(es): loss {loss:.2f}")


if __name__ == "__main__":
    main()
