"""What a process imports before it forks commands (`tests.commands`) or runs (`tests.runs`), and has at hand."""

import gc

import transformers.models.llama.modeling_llama  # noqa: F401
from hydra.core.plugins import Plugins
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import cqlora.engine
import cqlora.merge
import cqlora.run
import cqlora.train.run
import cqlora.weights.convert
import cqlora.weights.extend
import cqlora.weights.merge  # noqa: F401

# Looks into every package for plugins.
Plugins.instance()
# Compiles nine hundred regular expressions when it is first asked.
get_checkpoint_conversion_mapping("llama")
# None of this is garbage, and looking through it for some takes a seventh of a process's time.
gc.freeze()
