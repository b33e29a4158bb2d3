"""Small tokenizers, and runs over sources that a test writes itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from cqlora.base import Base
from cqlora.config.schema import (
    CleanConfig,
    DataConfig,
    HardwareConfig,
    ModelConfig,
    PretrainConfig,
    RunConfig,
    SftConfig,
    SourceConfig,
)
from cqlora.data.sources import SAMPLE_DIR

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def sample_texts() -> list[str]:
    """The bundled passages."""
    files = [SAMPLE_DIR / f"sample_{language}" / "train.jsonl" for language in ("zh", "en")]
    return [json.loads(line)["text"] for file in files for line in file.read_text("utf-8").splitlines()]


def write_base(folder: Path, tokenizer: Tokenizer, bos: str | None, eos: str) -> Base:
    """A base folder as far as this room reads it."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
    config = {"vocab_size": tokenizer.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(config))
    return Base(
        path=folder,
        config=config,
        tokenizer_file=folder / "tokenizer.json",
        first_added_row=None,
        added_rows=0,
    )


@pytest.fixture(scope="session")
def byte_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Byte-level BPE, as in SmolLM2 and Llama 3; its bos is the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(), trainer)
    return write_base(tmp_path_factory.mktemp("bases") / "byte", tokenizer, "<|endoftext|>", "<|endoftext|>")


def sentence_tokenizer() -> Tokenizer:
    """BPE with byte fallback over ▁-marked words, without the part that puts the first ▁."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<unk>", "<s>", "</s>", *CONTROL[1:], *alphabet],
        limit_alphabet=600,
        show_progress=False,
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = [f"▁{word}" for text in sample_texts() for word in text.replace("\n", " ").split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    document = json.loads(tokenizer.to_str())
    # Byte tokens are vocabulary, not control tokens.
    document["added_tokens"] = [token for token in document["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(document))


@pytest.fixture(scope="session")
def legacy_llama_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A SentencePiece-like tokenizer that puts a ▁ before every stretch of text."""
    tokenizer = sentence_tokenizer()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return write_base(tmp_path_factory.mktemp("bases") / "legacy", tokenizer, "<s>", "</s>")


@pytest.fixture(scope="session")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A SentencePiece-like tokenizer that puts a ▁ before the first word only."""
    tokenizer = sentence_tokenizer()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return write_base(tmp_path_factory.mktemp("bases") / "llama", tokenizer, "<s>", "</s>")


@pytest.fixture(params=["byte_base", "legacy_llama_base", "llama_base"])
def any_base(request: pytest.FixtureRequest) -> Base:
    """Each of the tokenizers in turn."""
    base: Base = request.getfixturevalue(request.param)
    return base


MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """Builds a run's configuration: sources by name, then fields of data, clean and stage."""

    def make(
        sources: dict[str, SourceConfig],
        stage: str = "pretrain",
        length: int = 128,
        seed: int = 1,
        clean: dict[str, Any] | None = None,
        system_prompt: str = "",
        **data: Any,
    ) -> RunConfig:
        stages = {
            "pretrain": lambda: PretrainConfig(name=stage, sequence_length=length, global_batch_size=1),
            "sft": lambda: SftConfig(
                name=stage, sequence_length=length, global_batch_size=1, system_prompt=system_prompt
            ),
        }
        settings = {
            "root": "",
            "cache_dir": str(tmp_path / "cache"),
            "workers": 1,
            "clean": CleanConfig(**(clean or {})),
            **data,
        }
        return RunConfig(
            model=ModelConfig(
                name="test",
                path="unused",
                vocab_size=8,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_key_value_heads=1,
                max_position_embeddings=1 << 20,
            ),
            data=DataConfig(name="test", sources=sources, **settings),
            stage=stages[stage](),
            hardware=HardwareConfig(name="test", micro_batch_size=1),
            seed=seed,
        )

    return make


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    """Rows as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file
