"""What a model knows and what training did to it: held-out text, an in-context probe, multiple choice, generations."""

from cqlora.evaluation.config import EvaluateConfig
from cqlora.evaluation.models import ModelChoice
from cqlora.evaluation.record import evaluate_models, write_record

__all__ = ["EvaluateConfig", "ModelChoice", "evaluate_models", "write_record"]
