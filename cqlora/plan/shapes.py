"""How many numbers a base and its adapter are made of, from the shape alone."""

from dataclasses import dataclass

from cqlora.config.choices import AdapterMethod
from cqlora.config.schema import LoraConfig, ModelConfig
from cqlora.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Matrix:
    """The matrix of one linear layer of a block."""

    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        """Numbers in it."""
        return self.inputs * self.outputs


def block_matrices(model: ModelConfig) -> dict[str, Matrix]:
    """The linear layers of one block, by the names that `lora.target_modules` takes."""
    hidden, wide, queries, keys = model.hidden_size, model.intermediate_size, query_size(model), key_size(model)
    return {
        "q_proj": Matrix(hidden, queries),
        "k_proj": Matrix(hidden, keys),
        "v_proj": Matrix(hidden, keys),
        "o_proj": Matrix(queries, hidden),
        "gate_proj": Matrix(hidden, wide),
        "up_proj": Matrix(hidden, wide),
        "down_proj": Matrix(wide, hidden),
    }


def query_size(model: ModelConfig) -> int:
    """Width of a token's queries: the hidden size in LLaMA, not in every kind of model."""
    return model.head_size * model.num_attention_heads


def key_size(model: ModelConfig) -> int:
    """Width of a token's keys, which grouped queries make smaller than that of the queries."""
    return model.head_size * model.num_key_value_heads


def block_parameters(model: ModelConfig) -> int:
    """Numbers in the linear layers of one block."""
    return sum(matrix.parameters for matrix in block_matrices(model).values())


def linear_parameters(model: ModelConfig) -> int:
    """Numbers in the linear layers of all blocks: what is quantised."""
    return model.num_hidden_layers * block_parameters(model)


def largest_matrix(model: ModelConfig) -> int:
    """Numbers in a block's largest linear layer: what is dequantised at once."""
    return max(matrix.parameters for matrix in block_matrices(model).values())


def embedding_matrices(model: ModelConfig) -> int:
    """1 where input and output share their matrix, else 2."""
    return 1 if model.tie_word_embeddings else 2


def embedding_parameters(model: ModelConfig) -> int:
    """Numbers in the input embedding and the output projection."""
    return embedding_matrices(model) * model.vocab_size * model.hidden_size


def vector_parameters(model: ModelConfig) -> int:
    """Numbers in biases and norms, which are not quantised: two norms a block, those of its heads, and the last."""
    matrices = block_matrices(model)
    biases = sum(matrices[name].outputs for name in model.biases)
    of_block = 2 * model.hidden_size + 2 * model.head_size * model.head_norms + biases
    return model.num_hidden_layers * of_block + model.hidden_size


def base_parameters(model: ModelConfig) -> int:
    """Numbers in the whole base."""
    return linear_parameters(model) + embedding_parameters(model) + vector_parameters(model)


def adapted_matrices(model: ModelConfig, lora: LoraConfig) -> dict[str, Matrix]:
    """The linear layers of one block that carry low-rank matrices.

    Raises:
        ConfigError: a name that no linear layer of a block has.
    """
    matrices, targets = block_matrices(model), lora.target_modules
    if lora.method is AdapterMethod.none:
        return {}
    if targets == ["all"]:
        return matrices
    for name in targets:
        if name not in matrices:
            raise ConfigError(
                f"lora.target_modules names {name}, which no block has; use [all] or some of [{','.join(matrices)}]."
            )
    return {name: matrices[name] for name in targets}


def adapter_parameters(model: ModelConfig, lora: LoraConfig) -> int:
    """Numbers in the low-rank matrices of all blocks, with DoRA's magnitudes."""
    adapted = adapted_matrices(model, lora).values()
    magnitudes = lora.method is AdapterMethod.dora
    of_block = sum(lora.rank * (matrix.inputs + matrix.outputs) + magnitudes * matrix.outputs for matrix in adapted)
    return model.num_hidden_layers * of_block
