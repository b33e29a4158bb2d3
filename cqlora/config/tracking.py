"""The keys under `tracking`: where a run's metrics go, and under which names."""

from dataclasses import dataclass, field

from cqlora.config.checks import check_fields, require_used
from cqlora.config.choices import Tracker, TrackingMode
from cqlora.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where the metrics go beside metrics.jsonl, and under which names. Keys stay in the environment."""

    tracker: Tracker = Tracker.none
    """Where metrics go beside metrics.jsonl."""
    mode: TrackingMode = TrackingMode.auto
    """W&B only: send while training or not; auto is online when a key is in the environment."""
    project: str = "cqlora"
    """W&B, trackio and MLflow: the project, which MLflow calls an experiment."""
    entity: str | None = None
    """W&B only: user or team; null is the key's own."""
    name: str | None = None
    """null is stage, model and folder, and in a sweep what tells the job from the others."""
    group: str | None = None
    """null groups a sweep's jobs under the sweep's folder name."""
    job_type: str | None = None
    """null is the stage's name."""
    tags: list[str] = field(default_factory=list)
    """W&B only: tags beside model, data and hardware."""
    log_adapter: bool = False
    """W&B only: keep the finished adapter as an artifact of the run, with its fingerprints."""

    def __post_init__(self) -> None:
        check_fields(self)
        for key in ("mode", "entity", "group", "job_type", "tags", "log_adapter"):
            require_used(self, key, self.tracker is Tracker.wandb, "tracking=wandb")
        named = self.tracker in (Tracker.wandb, Tracker.trackio, Tracker.mlflow)
        require_used(self, "project", named, "tracking=wandb, trackio or mlflow")
        if named and not self.project:
            raise ConfigError("tracking.project is empty; give a project's name, such as tracking.project=cqlora.")
