"""The named choices of the configuration, one enumeration each."""

from enum import Enum

LANGUAGES = ("zh", "en", "mixed")
"""What a document is written in."""


class Quantization(Enum):
    """How the frozen base's matrices are held."""

    nf4 = "nf4"
    int8 = "int8"
    none = "none"


class Attention(Enum):
    """Which attention runs; every choice keeps the documents of a pack apart."""

    auto = "auto"
    documents = "documents"
    varlen = "varlen"
    flash = "flash"
    sdpa = "sdpa"
    eager = "eager"
    flex = "flex"


class RopeScaling(Enum):
    """How positions are scaled for longer texts than the base was trained on; none leaves them as the base has them."""

    none = "none"
    linear = "linear"
    yarn = "yarn"
    llama3 = "llama3"


class AdapterMethod(Enum):
    """The low-rank method: LoRA (2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), PiSSA (2404.02948), or none."""

    lora = "lora"
    rslora = "rslora"
    dora = "dora"
    pissa = "pissa"
    none = "none"


class SourceKind(Enum):
    """The shape of a source's rows; `auto` tells each row's by its fields."""

    auto = "auto"
    wiki = "wiki"
    text = "text"
    dialog = "dialog"
    messages = "messages"
    oasst1 = "oasst1"
    sharegpt = "sharegpt"
    belle = "belle"
    alpaca = "alpaca"
    preference = "preference"
    llama_factory = "llama_factory"


class OasstPaths(Enum):
    """Which conversations a message tree gives: the top-ranked reply at each turn, all, or one at random."""

    best = "best"
    all = "all"
    sampled = "sampled"


class Deduplication(Enum):
    """Which documents count as the same: none, equal after normalisation, or near by MinHash."""

    none = "none"
    exact = "exact"
    near = "near"


class Optimizer(Enum):
    """AdamW by torch, or by bitsandbytes with 8-bit and paged states."""

    auto = "auto"
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    paged_adamw = "paged_adamw"
    paged_adamw_8bit = "paged_adamw_8bit"


class Schedule(Enum):
    """What the learning rate does after warm-up."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"


class Embeddings(Enum):
    """What trains of the two embedding matrices."""

    auto = "auto"
    frozen = "frozen"
    new_rows = "new_rows"
    lora = "lora"
    full = "full"


class Template(Enum):
    """How a conversation is written: in the base's own template, or in one of a known family."""

    auto = "auto"
    base = "base"
    chatml = "chatml"
    llama2 = "llama2"
    llama3 = "llama3"
    mistral = "mistral"
    qwen = "qwen"


class Thinking(Enum):
    """What becomes of thoughts in replies: they train, are context only, or are left out."""

    train = "train"
    mask = "mask"
    drop = "drop"


class Device(Enum):
    """Where a worker computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Strategy(Enum):
    """How several workers or GPUs share a run."""

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    layers = "layers"


class Precision(Enum):
    """The type that matrix products compute in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Kernels(Enum):
    """What computes a block's element-by-element parts: torch's operators (plain), or one kernel each (triton)."""

    auto = "auto"
    plain = "plain"
    triton = "triton"


class Checkpointing(Enum):
    """Which activations are recomputed in the backward pass."""

    auto = "auto"
    none = "none"
    full = "full"


class Goal(Enum):
    """Whether less of a metric is better, or more."""

    minimize = "minimize"
    maximize = "maximize"


class Pruner(Enum):
    """What ends trials of a search early: nothing, or an evaluation worse than the median of earlier trials."""

    none = "none"
    median = "median"


class Tracker(Enum):
    """Where metrics go beside metrics.jsonl."""

    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"
    trackio = "trackio"
    mlflow = "mlflow"


class TrackingMode(Enum):
    """Whether W&B sends while training; `auto` is online when a key is in the environment."""

    auto = "auto"
    online = "online"
    offline = "offline"


MergeOnto = Enum("MergeOnto", {"16bit": "16bit", "nf4": "nf4"})
"""Weights that an adapter is added to: the base's own, or what its NF4 form stands for."""


class MergeRows(Enum):
    """Whether trained rows go into the base with the rest of an adapter, or without its low-rank matrices."""

    along = "along"
    only = "only"


class ModelFormat(Enum):
    """Files of a merged model: Hugging Face safetensors in 16 bits, a GGUF file, safetensors in NF4."""

    safetensors = "safetensors"
    gguf = "gguf"
    nf4 = "nf4"


class GgufType(Enum):
    """How a GGUF file holds its matrices."""

    f16 = "f16"
    q8_0 = "q8_0"
