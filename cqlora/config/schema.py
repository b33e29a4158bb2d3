"""The typed configuration: every default of the project, and the checks between fields.

Hydra composes `configs/` over these schemas; `OmegaConf.to_object` then builds the dataclasses, whose
`__post_init__` refuses what cannot run. Nothing here imports torch.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import II, MISSING

from cqlora.architectures import ATTENTION_LAYERS, MLP_LAYERS
from cqlora.config.base_shape import register_resolver
from cqlora.config.checks import check_fields, require_divides, require_positive, require_range, require_used
from cqlora.config.choices import (
    LANGUAGES,
    AdapterMethod,
    Attention,
    Checkpointing,
    Deduplication,
    Device,
    Embeddings,
    Kernels,
    OasstPaths,
    Optimizer,
    Precision,
    Pruner,
    Quantization,
    RopeScaling,
    Schedule,
    SourceKind,
    Strategy,
    Template,
    Thinking,
)
from cqlora.config.sweeps import SweepConfig, check_measured
from cqlora.config.tracking import TrackingConfig
from cqlora.errors import ConfigError
from cqlora.system.companions import check_accepted

_INSTALLED_CONFIGS = Path(__file__).parent.parent / "configs"
CONFIG_DIR = _INSTALLED_CONFIGS if _INSTALLED_CONFIGS.is_dir() else Path(__file__).parents[2] / "configs"
"""`configs/` at the root of a checkout or an editable install, `cqlora/configs/` inside a wheel."""


MOST_PROMPTS = 10
"""Bundled prompts of the language that has the fewest."""

SETTLED = {
    "model": ("attention",),
    "stage": ("embeddings", "optimizer", "template"),
    "hardware": ("device", "precision", "gradient_scaler", "activation_checkpointing", "kernels"),
}
"""By group: what `cqlora.launch.settle` puts in the place of `auto` before a run starts; workers compute by it.

`stage.template` is a key of instruction tuning alone.
"""
SETTLED_KEYS = frozenset(f"{group}.{name}" for group, names in SETTLED.items() for name in names)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A base model: where it lies, what shape it has, how its frozen weights are held."""

    name: str = MISSING
    """The group's name, as runs and trackers show it."""
    path: str = MISSING
    """Folder of the base in Hugging Face form (config, safetensors, tokenizer)."""
    accept_changed: list[str] = field(default_factory=list)
    """Files beside the base's weights that may be others than when it was written, the run started or its
    `stage.init_adapter` trained, such as [generation_config.json]; no step's result depends on them."""
    random_init: bool = False
    """Build a random model of this shape at `path` when the folder is not there, with a tokenizer
    trained on the bundled sample."""
    vocab_size: int = MISSING
    """Rows of the embedding matrix before any extension."""
    hidden_size: int = MISSING
    """Width of the model."""
    intermediate_size: int = MISSING
    """Width of a block's feed-forward layer."""
    num_hidden_layers: int = MISSING
    """Blocks."""
    num_attention_heads: int = MISSING
    """Heads of queries."""
    num_key_value_heads: int = MISSING
    """Heads of keys and values, which the heads of queries share where there are fewer."""
    head_dim: int | None = None
    """Width of one attention head; null is hidden_size / num_attention_heads."""
    max_position_embeddings: int = MISSING
    """Positions that the base was trained for."""
    rope_scaling: RopeScaling = RopeScaling.none
    """Scale the base's positions: linear (2306.15595), yarn (2309.00071) or llama3 (as Llama 3.1); none leaves them as
    the base has them."""
    rope_factor: float = 1.0
    """How many times the base's positions a scaled one has."""
    tie_word_embeddings: bool = False
    """Input and output share one embedding matrix."""
    biases: list[str] = field(default_factory=list)
    """Linear layers of a block that have a bias, such as [q_proj, k_proj, v_proj] in Qwen 2."""
    head_norms: bool = False
    """Each head's queries and keys are normalised, as in Qwen 3."""
    sequence_length: int = 2048
    """Tokens in a pack unless the stage says otherwise."""
    quantization: Quantization = Quantization.nf4
    """How the frozen base is held: in 4 bits (nf4), in 8 bits (int8), or in 16 (none)."""
    double_quantization: bool = True
    """nf4 only: quantise the scales too, which saves 0.37 bits a weight."""
    attention: Attention = Attention.auto
    """Which attention runs; auto takes the fastest here, and each keeps documents of a pack apart."""

    def __post_init__(self) -> None:
        check_fields(self, paths=("path",), filled=("name",))
        check_accepted("model.accept_changed", self.accept_changed)
        require_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        require_positive(self, "max_position_embeddings")
        require_used(self, "double_quantization", self.quantization is Quantization.nf4, "model.quantization=nf4")
        require_positive(self, "num_attention_heads", "num_key_value_heads", "sequence_length")
        if self.head_dim is None:
            require_divides(self, "model", "num_attention_heads", "hidden_size")
        else:
            require_positive(self, "head_dim")
        require_divides(self, "model", "num_key_value_heads", "num_attention_heads")
        self._check_positions()
        unknown = set(self.biases) - {*ATTENTION_LAYERS, *MLP_LAYERS}
        if unknown:
            known = ",".join((*ATTENTION_LAYERS, *MLP_LAYERS))
            raise ConfigError(f"model.biases names {min(unknown)}, which no block has; use some of [{known}].")

    def _check_positions(self) -> None:
        scaled = self.rope_scaling is not RopeScaling.none
        require_used(self, "rope_factor", scaled, "model.rope_scaling=linear, yarn or llama3")
        if scaled and not 1 < self.rope_factor <= 1000:
            raise ConfigError(
                f"model.rope_factor={self.rope_factor:g} scales no positions; with model.rope_scaling="
                f"{self.rope_scaling.name} give a factor above 1, such as model.rope_factor=4."
            )

    @property
    def positions(self) -> int:
        """Positions that the model has as it trains."""
        return int(self.max_position_embeddings * self.rope_factor)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """The adapter."""

    method: AdapterMethod = AdapterMethod.lora
    """LoRA (2106.09685), rsLoRA (2312.03732), DoRA (2402.09353) or PiSSA (2404.02948); none trains embeddings alone."""
    rank: int = 16
    """Rank of the adapter's matrices."""
    alpha: float = 32.0
    """The adapter's weight is alpha/rank (rsLoRA: alpha/√rank)."""
    dropout: float = 0.0
    """Share of an adapted layer's inputs that a training step drops."""
    target_modules: list[str] = field(default_factory=lambda: ["all"])
    """`[all]` is every linear layer of the blocks; otherwise names such as `[q_proj, v_proj]`."""
    pissa_iterations: int = 16
    """Subspace iterations of PiSSA's fast SVD; 0 computes the exact one."""
    b_learning_rate_ratio: float = 1.0
    """LoRA+ (2402.12354): the learning rate of the B matrices is this many times stage.learning_rate; 1 is plain LoRA,
    the paper's is 16."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_positive(self, "rank", "alpha", "b_learning_rate_ratio")
        for key in ("rank", "alpha", "dropout", "target_modules", "b_learning_rate_ratio"):
            require_used(
                self, key, self.method is not AdapterMethod.none, "low-rank matrices, such as lora.method=lora"
            )
        require_range("lora.pissa_iterations", self.pissa_iterations, 0, 1000)
        require_used(self, "pissa_iterations", self.method is AdapterMethod.pissa, "lora.method=pissa")
        require_range("lora.dropout", self.dropout, 0.0, 0.99)
        if not self.target_modules:
            raise ConfigError("lora.target_modules is empty; use [all] or names such as [q_proj,v_proj].")
        if not all(self.target_modules):
            raise ConfigError("lora.target_modules holds an empty name; use [all] or names such as [q_proj,v_proj].")


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of text: its rows' shape, where to find it, how much of it to take."""

    kind: SourceKind = MISSING
    """The shape of its rows; `auto` tells each row's by its fields."""
    path: str = ""
    """File or folder; empty looks under `data.root` by the source's name, then at `dataset`."""
    dataset: str = ""
    """Hugging Face dataset, read by streaming, or modelscope://ORGANISATION/NAME; of kind=llama_factory an entry of
    the dataset_info.json at `path`."""
    subset: str = ""
    """The dataset's configuration, such as 20231101.zh; of a ModelScope dataset a folder of its repository."""
    language: str = ""
    """`zh`, `en` or `mixed`; empty lets each document's script decide."""
    sample: int | None = None
    """Documents or conversations to train on, chosen by the seed, the held-out share besides; null takes all."""
    sample_tokens: int | None = None
    """Take documents until this many tokens train."""
    weight: float = 1.0
    """Share of the taken documents to keep (below 1) or times to repeat them (above 1) in the mix."""
    replay: bool = False
    """Of this source as many tokens train as data.replay says, documents being left out or repeated for it."""
    stages: list[str] = field(default_factory=lambda: ["pretrain", "sft"])
    """Stages that use this source."""
    separator: str = ""
    """Plain text only: what stands between two documents of a file, `\\n` for a new line; empty is one document a
    file."""
    oasst_paths: OasstPaths = OasstPaths.best
    """oasst1 only: the conversation of top-ranked replies of a tree, all of them, or one at random."""
    langs: list[str] = field(default_factory=list)
    """oasst1 only: languages to keep; empty keeps all."""

    def __post_init__(self) -> None:
        check_fields(self, paths=("path",))
        require_used(self, "separator", self.kind is SourceKind.text, "kind=text")
        require_used(self, "oasst_paths", self.kind is SourceKind.oasst1, "kind=oasst1")
        require_used(self, "langs", self.kind is SourceKind.oasst1, "kind=oasst1")
        require_used(self, "subset", bool(self.dataset), "a dataset")
        require_used(self, "weight", not self.replay, "replay=false, since data.replay decides how much of it trains")
        if self.language not in ("", *LANGUAGES):
            raise ConfigError(f"a source's language={self.language} is unknown; use {' or '.join(LANGUAGES)}.")
        for key in ("sample", "sample_tokens"):
            if getattr(self, key) is not None:
                require_positive(self, key)
        require_positive(self, "weight")
        unknown = set(self.stages) - {"pretrain", "sft"}
        if unknown:
            raise ConfigError(f"a source's stages={self.stages} names {min(unknown)}; use pretrain and sft.")


@dataclass(kw_only=True, slots=True)
class CleanConfig:
    """Rules that each document passes before it is encoded; every one is counted and can be switched off."""

    normalize_unicode: bool = True
    """Plain forms of full-width letters and digits, odd spaces and line ends, composed characters (NFC); Chinese
    punctuation stays."""
    strip_control_characters: bool = True
    """Remove control, zero-width, direction and byte-order characters."""
    drop_repeated_lines: bool = True
    """Remove lines that a document repeats."""
    to_simplified: bool = False
    """Traditional to simplified Chinese (OpenCC)."""
    min_characters: int = 10
    """Drop documents with fewer; conversations are kept."""
    max_characters: int = 1_000_000
    """Drop documents and conversations with more."""
    min_language_share: float = 0.0
    """Smallest share of a source's own script among a document's letters; 0 keeps all."""
    mask_personal_data: bool = False
    """Replace e-mail addresses, telephone and identity numbers."""
    deduplicate: Deduplication = Deduplication.exact
    """Drop what is equal after normalisation (exact), nearly equal (near), or nothing (none)."""
    near_threshold: float = 0.8
    """Jaccard similarity of character 5-grams from which two documents count as near duplicates."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_used(self, "near_threshold", self.deduplicate is Deduplication.near, "data.clean.deduplicate=near")
        require_range("data.clean.min_characters", self.min_characters, 0, math.inf)
        require_positive(self, "max_characters")
        require_range("data.clean.min_language_share", self.min_language_share, 0.0, 1.0)
        require_range("data.clean.near_threshold", self.near_threshold, 0.1, 1.0)
        if self.min_characters > self.max_characters:
            raise ConfigError(
                f"data.clean.min_characters={self.min_characters} is above max_characters="
                f"{self.max_characters}; lower it."
            )


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """A mix of sources and how it becomes a token cache."""

    name: str = MISSING
    """The mix's name, as runs and trackers show it."""
    root: str = '${oc.env:CQLORA_DATA,""}'
    """Folder in which sources are found by name."""
    sources: dict[str, SourceConfig] = MISSING
    sample_evenly: int | None = None
    """Documents or conversations to train on in all, the same number from every source."""
    replay: float = 0.0
    """Share of all training tokens that sources with `replay=true` give, such as English that the base knows already,
    which slows down forgetting."""
    val_fraction: float = 0.02
    """Share set aside for evaluation by a hash of the document, where a source brings no split of its own."""
    test_fraction: float = 0.0
    """Share set aside and not looked at in training, as val_fraction."""
    max_rejected_fraction: float = 0.05
    """Share of a source's rows that may be unreadable before preparing ends with an error."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    cache_dir: str = "cache"
    """Folder of the token caches, each named after its content."""
    workers: int | None = None
    """Processes that encode; null uses every core."""

    def __post_init__(self) -> None:
        check_fields(self, paths=("root", "cache_dir"), filled=("name", "cache_dir"))
        require_range("data.val_fraction", self.val_fraction, 0.0, 0.5)
        require_range("data.test_fraction", self.test_fraction, 0.0, 0.5)
        require_range("data.max_rejected_fraction", self.max_rejected_fraction, 0.0, 1.0)
        require_range("data.replay", self.replay, 0.0, 0.95)
        for key in ("workers", "sample_evenly"):
            if getattr(self, key) is not None:
                require_positive(self, key)
        if not self.sources:
            raise ConfigError("data.sources is empty; name at least one source.")


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """What is trained, on which objective, for how long; the base of both stages."""

    name: str = MISSING
    """pretrain or sft."""
    sequence_length: int = II("model.sequence_length")
    """Tokens in a pack."""
    allow_beyond_positions: bool = False
    """Train at a sequence_length above the base's max_position_embeddings."""
    global_batch_size: int = II("hardware.global_batch_size")
    """Packs per optimizer step, over accumulation steps and workers."""
    max_steps: int | None = None
    """Optimizer steps; null trains for epochs."""
    epochs: float | None = 1.0
    """Passes over the packs; of no effect, and therefore refused, beside max_steps."""
    learning_rate: float = 1e-4
    """Peak of the learning rate."""
    embeddings_learning_rate: float | None = None
    """Learning rate of trained embedding rows; null is learning_rate."""
    schedule: Schedule = Schedule.cosine
    """What the learning rate does after warm-up."""
    warmup_steps: int = 5
    """Optimizer steps of linear warm-up from zero."""
    min_learning_rate_ratio: float = 0.1
    """Where a decaying schedule ends, as a share of learning_rate."""
    decay_fraction: float = 0.2
    """wsd only: share of the steps, the last ones, in which the learning rate decays."""
    optimizer: Optimizer = Optimizer.auto
    """AdamW by torch (auto, adamw), or by bitsandbytes with 8-bit or paged states."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """What AdamW adds to the root of the mean of squared gradients."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, a share of the learning rate."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm over all trained parameters."""
    neftune_alpha: float = 0.0
    """NEFTune (2310.05914): noise on the input embeddings in training, uniform up to neftune_alpha/√(L·hidden_size) for
    a document of L tokens; 0 is none, the paper's are 5 to 15."""
    embeddings: Embeddings = Embeddings.auto
    """What trains of the embeddings: only rows that an extension added (new_rows), LoRA on both (lora), both whole
    (full), nothing (frozen); auto is new_rows on an extended base, frozen on any other."""
    init_adapter: str = ""
    """Adapter folder to continue from; its rank, alpha, method, adapted layers and embeddings are fixed, its dropout
    is not; one of lora.method=none may get low-rank matrices."""
    eval_every_steps: int | None = None
    """null evaluates at the start and at the end only."""
    eval_tokens: int = 16_384
    """Held-out tokens per source at each evaluation; 0 takes all."""
    eval_characters: int | None = None
    """In place of eval_tokens, held-out characters per source in whole documents, the same ones for every vocabulary;
    0 takes all."""
    eval_probe: bool = False
    """At each evaluation also measure how much examples in context help, by translations to and from Chinese."""
    eval_generations: int = 0
    """At each evaluation also let the model reply to so many bundled prompts of each language, always by the likeliest
    token; 0 lets it reply to none. A reply of N tokens costs N passes over prompt and reply."""
    eval_generation_tokens: int = 32
    """Longest of these replies, in tokens."""
    max_forgetting: float | None = 0.05
    """Rise of English held-out loss, or of the probe's, over that of the run's start, as a share of it, from which an
    evaluation is marked in the record and told; null tells nothing."""
    checkpoint_every_steps: int = 50
    """Optimizer steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints to keep."""
    find_learning_rate: bool = False
    """Train nothing: sweep the learning rate over some steps (1506.01186), show the curve and what to choose."""
    resume: str = "auto"
    """`auto` goes on from the newest verified checkpoint of the run's folder, `never` starts over,
    anything else is a checkpoint folder."""
    max_bad_steps: int = 3
    """Non-finite steps in a row after which the run stops."""

    def __post_init__(self) -> None:
        check_fields(self, paths=("init_adapter", "resume"), filled=("name", "resume"))
        require_positive(self, "global_batch_size", "learning_rate", "max_bad_steps")
        require_range("stage.sequence_length", self.sequence_length, 2, math.inf)
        named = {"PretrainConfig": "pretrain", "SftConfig": "sft"}.get(type(self).__name__, self.name)
        if self.name != named:
            raise ConfigError(f"stage.name={self.name} is the name of no stage; leave it at {named}.")
        require_positive(self, "checkpoint_every_steps", "keep_last", "adam_epsilon", "max_grad_norm")
        for key in ("max_steps", "epochs", "eval_every_steps", "embeddings_learning_rate"):
            if getattr(self, key) is not None:
                require_positive(self, key)
        for key in (
            "warmup_steps",
            "weight_decay",
            "eval_tokens",
            "eval_characters",
            "max_forgetting",
            "neftune_alpha",
        ):
            if getattr(self, key) is not None:
                require_range(f"stage.{key}", getattr(self, key), 0, math.inf)
        require_range("stage.eval_generations", self.eval_generations, 0, MOST_PROMPTS)
        require_range("stage.eval_generation_tokens", self.eval_generation_tokens, 1, self.sequence_length)
        require_used(self, "eval_generation_tokens", self.eval_generations > 0, "stage.eval_generations above 0")
        require_used(self, "eval_tokens", self.eval_characters is None, "stage.eval_characters=null")
        for key in ("adam_beta1", "adam_beta2", "min_learning_rate_ratio"):
            require_range(f"stage.{key}", getattr(self, key), 0.0, 1.0)
        require_used(self, "epochs", self.max_steps is None or self.epochs is None, "stage.max_steps=null")
        decays = self.schedule is not Schedule.constant
        require_used(self, "min_learning_rate_ratio", decays, "stage.schedule=cosine, linear or wsd")
        require_positive(self, "decay_fraction")
        require_range("stage.decay_fraction", self.decay_fraction, 0.0, 1.0)
        require_used(self, "decay_fraction", self.schedule is Schedule.wsd, "stage.schedule=wsd")
        self.check_embeddings_rate()
        if self.max_steps is None and self.epochs is None:
            raise ConfigError("stage.max_steps and stage.epochs are both null; set one, e.g. stage.epochs=1.")

    def check_embeddings_rate(self) -> None:
        """Raise ConfigError for a learning rate of rows that do not train."""
        trained = self.embeddings is not Embeddings.frozen
        require_used(self, "embeddings_learning_rate", trained, "trained embeddings, such as stage.embeddings=new_rows")


@dataclass(kw_only=True, slots=True)
class PretrainConfig(StageConfig):
    """Continued pretraining: every token of every document is a label."""


@dataclass(kw_only=True, slots=True)
class SftConfig(StageConfig):
    """Instruction tuning: only the assistant's turns are labels."""

    system_prompt: str = ""
    """System message put before conversations that bring none."""
    template: Template = Template.auto
    """How a conversation is written, in training and whenever the model is asked: the base's own chat template (base)
    or that of a family; auto is the base's own where the label mask can be proven in it, else chatml."""
    thinking: Thinking = Thinking.train
    """Thoughts that a reply begins with, `<think>…</think>`: trained like the words after them (train), read and not
    trained (mask), or taken out (drop); earlier ones the template may leave out."""


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """The machine: workers, their memory and speed, and how a run is laid out on them."""

    name: str = MISSING
    """The machine's name, as runs and trackers show it."""
    device: Device = Device.cuda
    """Where workers compute; auto is a GPU where there is one."""
    nodes: int = 1
    """Machines."""
    processes_per_node: int = 1
    """One worker per GPU; on a CPU, workers that share the cores."""
    strategy: Strategy = Strategy.single
    """One worker (single), a whole model each (ddp), a share each of one model a node (fsdp), or one worker's blocks
    over several GPUs (layers)."""
    precision: Precision = Precision.auto
    """Type that matrix products compute in; auto is bfloat16 where the device has units for it, on an older GPU
    float16 with loss scaling (compute capability 7, unless fsdp), else float32."""
    gradient_scaler: bool = False
    """Dynamic loss scaling, which float16 needs, and has where precision=auto comes to it."""
    activation_checkpointing: Checkpointing = Checkpointing.auto
    """Recompute activations in the backward pass (full) or keep them (none); auto keeps what fits."""
    kernels: Kernels = Kernels.auto
    """What computes a block's norms, rotations and gates: torch's operators one by one (plain), or a kernel each by
    Triton (triton), which needs a GPU; auto is triton where it runs."""
    cpu_offload: bool = False
    """fsdp only: keep the sharded weights in host memory between uses."""
    micro_batch_size: int = 1
    """Packs per worker in one forward pass."""
    global_batch_size: int = 32
    """What stage.global_batch_size is unless the stage says otherwise."""
    gpus_per_node: int = 0
    """`layers` only: GPUs that one worker spreads the model over; elsewhere each worker has one."""
    gpu_memory_gib: float = 0.0
    """Memory of one GPU; 0 is host memory."""
    host_memory_gib: float = 0.0
    """0 reads this machine's own."""
    allow_misfit: bool = False
    """Start a run that the plan says the machine cannot hold."""
    peak_tflops: float = 0.0
    """Dense bf16 matrix throughput of one GPU; 0 is measured."""
    memory_gb_per_s: float = 0.0
    """Memory bandwidth of one GPU; 0 is measured."""
    link_gb_per_s: float = 0.0
    """Bandwidth between two GPUs of a node, one direction."""
    network_gb_per_s: float = 0.0
    """Bandwidth between nodes, per node."""

    def __post_init__(self) -> None:
        check_fields(self, filled=("name",))
        for key in ("gpus_per_node", "gpu_memory_gib", "host_memory_gib", "peak_tflops", "memory_gb_per_s"):
            require_range(f"hardware.{key}", getattr(self, key), 0, math.inf)
        for key in ("link_gb_per_s", "network_gb_per_s"):
            require_range(f"hardware.{key}", getattr(self, key), 0, math.inf)
        require_used(self, "gpus_per_node", self.strategy is Strategy.layers, "hardware.strategy=layers")
        require_positive(self, "nodes", "processes_per_node", "micro_batch_size", "global_batch_size")
        if self.precision is Precision.float16 and not self.gradient_scaler:
            raise ConfigError(
                "hardware.precision=float16 underflows without loss scaling; add hardware.gradient_scaler=true "
                "or use hardware.precision=bfloat16."
            )
        if self.world_size > 1 and self.strategy in (Strategy.single, Strategy.layers):
            raise ConfigError(
                f"hardware.strategy={self.strategy.name} runs one worker, but nodes × processes_per_node = "
                f"{self.world_size}; use hardware.strategy=ddp or fsdp."
            )
        if self.world_size == 1 and self.strategy is Strategy.fsdp:
            raise ConfigError(
                "hardware.strategy=fsdp shards over several workers and nodes × processes_per_node = 1; use "
                "hardware.strategy=single, or more workers with hardware.processes_per_node=N."
            )

    @property
    def world_size(self) -> int:
        """Workers over all nodes."""
        return self.nodes * self.processes_per_node

    @property
    def shard_workers(self) -> int:
        """Workers that hold one model together under fsdp: those of a node, or all where a node has a single one."""
        return self.processes_per_node if self.processes_per_node > 1 else self.world_size


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    stage: StageConfig = MISSING
    hardware: HardwareConfig = MISSING
    lora: LoraConfig = field(default_factory=LoraConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    seed: int = 1
    """Of sampling, order, initial matrices and dropout."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_range("seed", self.seed, 0, 2**31 - 1)
        if not self.model.path.strip():
            raise ConfigError("model.path is empty; give the folder of the base, or leave it out for the group's own.")
        self._check_sequence_length()
        self._check_global_batch()
        self._check_sources()
        self._check_objectives()
        self._check_adapter()
        if self.sweep.pruner is not Pruner.none and self.stage.eval_every_steps is None:
            raise ConfigError("sweep.pruner=median goes by evaluations in training; add stage.eval_every_steps=STEPS.")

    def notes(self) -> list[str]:
        """What a user may not have meant and is no mistake, a sentence each."""
        steps, warmup = self.stage.max_steps, self.stage.warmup_steps
        if steps is None or warmup < steps:
            return []
        return [f"stage.warmup_steps={warmup} reaches the end of max_steps={steps}: the learning rate only rises."]

    @property
    def gradient_accumulation_steps(self) -> int:
        """Forward and backward passes of each worker per optimizer step."""
        return self.stage.global_batch_size // (self.hardware.micro_batch_size * self.hardware.world_size)

    def _check_sequence_length(self) -> None:
        length, positions = self.stage.sequence_length, self.model.positions
        if length > positions and not self.stage.allow_beyond_positions:
            raise ConfigError(
                f"stage.sequence_length={length} is beyond the {positions} positions of model={self.model.name}; "
                f"use stage.sequence_length={positions}, scale them with model.rope_scaling, or add "
                "stage.allow_beyond_positions=true."
            )

    def _check_global_batch(self) -> None:
        per_pass = self.hardware.micro_batch_size * self.hardware.world_size
        size = self.stage.global_batch_size
        if size % per_pass:
            raise ConfigError(
                f"stage.global_batch_size={size} is not divisible by micro_batch_size × workers = {per_pass}; "
                f"use stage.global_batch_size={math.ceil(size / per_pass) * per_pass}."
            )

    def _check_objectives(self) -> None:
        """Raise ConfigError for an objective that no run of this stage and data measures."""
        check_measured(self.sweep, self.data, self.stage)

    def _check_sources(self) -> None:
        if not any(self.stage.name in source.stages for source in self.data.sources.values()):
            raise ConfigError(
                f"data={self.data.name} has no source for stage={self.stage.name}; choose another data or add "
                f"{self.stage.name} to a source's stages."
            )
        self._check_replay()

    def _check_replay(self) -> None:
        used = [name for name, source in self.data.sources.items() if self.stage.name in source.stages]
        names = [name for name in used if self.data.sources[name].replay]
        if self.data.replay and not names:
            raise ConfigError(
                f"data.replay={self.data.replay} needs a source to replay; mark one, as in "
                f"data.sources.{used[-1]}.replay=true."
            )
        if names and not self.data.replay:
            raise ConfigError(
                f"data.sources.{names[0]}.replay=true has no effect without data.replay; leave it out, or give a share "
                "such as data.replay=0.2."
            )
        if names == used:
            raise ConfigError(
                f"data.replay={self.data.replay} is a share beside other text, and every source is replayed; leave one "
                "without replay=true."
            )

    def _check_adapter(self) -> None:
        if self.lora.method is AdapterMethod.pissa and self.stage.embeddings is Embeddings.lora:
            raise ConfigError(
                "lora.method=pissa rewrites the base's matrices and cannot share stage.embeddings=lora; "
                "use stage.embeddings=new_rows or lora.method=lora."
            )
        if self.lora.method is AdapterMethod.none and self.stage.embeddings is Embeddings.lora:
            raise ConfigError(
                "lora.method=none has no low-rank matrices for stage.embeddings=lora; use stage.embeddings=new_rows, "
                "or lora.method=lora."
            )
        if self.hardware.strategy is Strategy.fsdp:
            self._check_sharding()
        if self.hardware.cpu_offload and self.hardware.strategy is not Strategy.fsdp:
            raise ConfigError(
                f"hardware.cpu_offload=true needs hardware.strategy=fsdp, not {self.hardware.strategy.name}."
            )

    def _check_sharding(self) -> None:
        for refused, key, reason, instead in (
            (
                self.model.quantization is Quantization.int8,
                "model.quantization=int8",
                "keeps weights whole",
                "model.quantization=nf4",
            ),
            (
                self.lora.method in (AdapterMethod.dora, AdapterMethod.pissa),
                f"lora.method={self.lora.method.name}",
                "starts from whole matrices",
                "lora.method=lora",
            ),
            (
                self.hardware.precision is Precision.float16,
                "hardware.precision=float16",
                "scales losses on each worker",
                "hardware.precision=bfloat16",
            ),
        ):
            if refused:
                raise ConfigError(
                    f"{key} {reason} and cannot be sharded by hardware.strategy=fsdp; use {instead} or "
                    "hardware.strategy=ddp."
                )


def register_schemas() -> None:
    """Put the schemas where `configs/*.yaml` name them."""
    # Not above: processes that prepare data use the schemas alone, and would wait a tenth of a second for Hydra.
    from hydra.core.config_store import ConfigStore

    register_resolver()
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(group="schema/stage", name="pretrain", node=PretrainConfig)
    store.store(group="schema/stage", name="sft", node=SftConfig)
    for name, kind in (("grid", "GridSweeper"), ("optuna", "SearchSweeper")):
        sweeper = {"_target_": f"hydra_plugins.cqlora_sweepers.{kind}", "params": None}
        store.store(group="hydra/sweeper", name=name, node=sweeper)
