"""TRL's own recipe on the documents of benchmarks/recipes.py, which starts this.

    python benchmarks/recipes_trl.py BASE TEXTS FOLDER STEPS SEED LENGTH SETTINGS

SFTTrainer with LoRA as TRL's command line gives it (rank 16, alpha 32, dropout 0.05). SETTINGS is JSON: of SFTConfig,
and `rank`, `alpha` and `target_modules` of LoraConfig.
"""

import itertools
import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Train, save the adapter, and tell how long each step took and how many characters they read."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    base, texts, folder, *numbers, given = sys.argv[1:]
    steps, seed, length = map(int, numbers)
    given = json.loads(given)
    lora = LoraConfig(
        r=given.pop("rank", 16),
        lora_alpha=given.pop("alpha", 32),
        lora_dropout=0.05,
        task_type="CAUSAL_LM",
        target_modules=given.pop("target_modules", None),
    )
    began: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments, **options) -> None:
            began.append(time.monotonic())

    rows = load_dataset("json", data_files=[str(file) for file in sorted(Path(texts).glob("*.jsonl"))], split="train")
    rows = rows.shuffle(seed=seed)
    settings = SFTConfig(
        output_dir=f"{folder}/trainer",
        max_steps=steps,
        seed=seed,
        max_length=length,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **given,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=settings,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora,
        callbacks=[Clock()],
    )
    trainer.train()
    times = [*began, time.monotonic()]
    trainer.save_model(f"{folder}/adapter")
    told = {
        "step_seconds": [after - before for before, after in itertools.pairwise(times)],
        "characters": steps * settings.per_device_train_batch_size * count_characters(trainer),
    }
    (Path(folder) / "told.json").write_text(json.dumps(told))


def count_characters(trainer) -> float:
    """Characters of a document as it is cut to length, by the mean of the first thousand."""
    texts = trainer.processing_class.batch_decode(trainer.train_dataset[:1000]["input_ids"])
    return sum(map(len, texts)) / len(texts)


if __name__ == "__main__":
    main()
