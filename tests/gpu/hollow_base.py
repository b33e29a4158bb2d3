"""A base folder of any shape whose weights take no room: a file with a header and a hole."""

import json
import math
import os
from pathlib import Path

from cqlora.config.schema import ModelConfig
from cqlora.data.chat import CHAT_TEMPLATE
from cqlora.data.sources import SAMPLE_DIR
from cqlora.model.tiny import llama_config, read_sample_texts, train_tokenizer
from cqlora.plan.shapes import block_matrices

TOKENS = 2_000
"""Of the tokenizer; the rows of a base are as many as its shape says."""


def write_hollow_base(model: ModelConfig, folder: Path) -> Path:
    """Write config.json, a tokenizer trained on the bundled sample and zeros in bfloat16; return the folder."""
    tokenizer = train_tokenizer(read_sample_texts(SAMPLE_DIR), TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    llama_config(model, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    if model.head_norms:
        file = folder / "config.json"
        kind = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
        file.write_text(json.dumps(json.loads(file.read_text()) | kind))
    write_hole(list_tensors(model), folder / "model.safetensors")
    return folder


def list_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a LLaMA of this shape, or of a Qwen 3 where its heads are normalised."""
    rows = (model.vocab_size, model.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": rows, "model.norm.weight": rows[1:]}
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = rows
    for block in range(model.num_hidden_layers):
        prefix = f"model.layers.{block}"
        for name, matrix in block_matrices(model).items():
            part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            shapes[f"{prefix}.{part}.{name}.weight"] = (matrix.outputs, matrix.inputs)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = rows[1:]
        for norm in ("q_norm", "k_norm") if model.head_norms else ():
            shapes[f"{prefix}.self_attn.{norm}.weight"] = (model.head_size,)
    return shapes


def write_hole(shapes: dict[str, tuple[int, ...]], file: Path) -> None:
    """A safetensors file (eight bytes of length, a JSON header, the data) whose data is left to the file system."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)
