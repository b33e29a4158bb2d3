"""unsloth's own way of QLoRA on the rows of benchmarks/gpu.py, which starts this: `gpu_unsloth.py SETTINGS.json`."""

import json
import sys
from pathlib import Path
from typing import Any

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Train by the settings in a file."""
    # First, as it changes what the others import.
    from unsloth import FastLanguageModel  # isort: skip
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    length, rank, rows = (settings.pop(name) for name in ("length", "rank", "rows"))
    model, tokenizer = FastLanguageModel.from_pretrained(
        settings.pop("model_name_or_path"), max_seq_length=length, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0,
        target_modules=LAYERS,
        use_gradient_checkpointing="unsloth" if settings.pop("checkpointing") else False,
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(max_length=length, dataset_text_field="text", **settings),
        train_dataset=load_dataset("json", data_files=rows, split="train"),
        processing_class=tokenizer,
    )
    trainer.train()


if __name__ == "__main__":
    main()
