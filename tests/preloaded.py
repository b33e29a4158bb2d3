"""What a process imports before it forks commands (`tests.commands`) or runs (`tests.runs`), and has at hand."""

import hydra  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import cqlora.engine
import cqlora.merge
import cqlora.run
import cqlora.train.run
import cqlora.weights.convert
import cqlora.weights.extend
import cqlora.weights.merge  # noqa: F401

# Compiles nine hundred regular expressions when it is first asked.
get_checkpoint_conversion_mapping("llama")
