"""What a service is configured with, from a file, `key=value` overrides or a Serve config file's args."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from serve.catalogue.config import DatabaseConfig
from serve.middleware import Patience
from serve.settings.engine import EngineConfig
from serve.settings.gradients import GradientsConfig
from serve.settings.jobs import JobsConfig
from serve.wire.files import FilesConfig
from serve.wire.offsite import OffsiteConfig
from serve.wire.webhooks import WebhookConfig

# What an engine is asked beside answers: its models, whether it is well, what it does.
_SPARE_REQUESTS = 32


class ServeConfig(EngineConfig):
    """A base model with its plug-ins, and, with a database, the whole service around them."""

    database: DatabaseConfig | None = None
    """Tenants, keys, files and jobs; null serves the models to whoever asks, and nothing else."""
    files: FilesConfig = FilesConfig()
    """Customers' files."""
    jobs: JobsConfig = JobsConfig()
    """Tuning jobs."""
    offsite: OffsiteConfig = OffsiteConfig()
    """Bundles that go out, adapters that come back."""
    webhooks: WebhookConfig = WebhookConfig()
    """Customers' addresses that are told of a job's end."""
    gradients: GradientsConfig | None = None
    """Gradient learning; null leaves it out. It needs a database."""
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    """Largest request body, in bytes, uploads aside."""
    patience: Patience = Patience()
    """How slowly a body may come."""
    apis: int = Field(default=1, ge=1)
    """Replicas of the HTTP side, which share the database and the store and keep nothing to themselves."""
    engines: int = Field(default=1, ge=1)
    """Replicas of the engine; each holds the whole base model. With `max_engines`, the fewest."""
    max_engines: int | None = Field(default=None, ge=1)
    """Most replicas, which come and go with the requests under way; null keeps their number."""
    scale_window_s: float = Field(default=20.0, gt=10)
    """Seconds over which the requests under way are averaged to tell how many engines they need; HTTP sides report
    them every ten."""
    scale_up_s: float = Field(default=10.0, ge=0)
    """Seconds that more engines must have been needed before they are started."""
    scale_down_s: float = Field(default=600.0, ge=0)
    """Seconds that fewer engines must have been needed before one goes."""
    drain_s: float = Field(default=300.0, ge=0)
    """Seconds that a replica has to finish its answers when it is replaced or not needed any more."""
    surge_percent: int = Field(default=25, ge=0, le=100)
    """Engines that may run beyond their number while all are replaced, in percent, rounded up to whole ones; 0 stops
    one before the next is started, which needs no more machines and leaves fewer engines, or none, meanwhile."""
    num_cpus: float = Field(default=1.0, ge=0)
    """CPU cores that Ray sets aside for each engine."""
    max_ongoing_requests: int = Field(default=512, ge=1)
    """Requests that one engine accepts at once, those that wait for their turn included; at least max_concurrent +
    max_waiting + 32, so that the engine says whose turn it is, and questions about it are not behind answers."""
    max_queued_requests: int = Field(default=256, ge=1)
    """Requests that wait for an engine to accept them; further ones are answered 429."""
    host: str = "127.0.0.1"
    """Address that `run` listens on; a Serve config file has its own `http_options` instead."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port that `run` listens on."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds that `run` waits until the model can answer."""

    @model_validator(mode="after")
    def _fewest_and_most(self) -> ServeConfig:
        if self.max_engines is not None and self.max_engines < self.engines:
            raise ValueError(f"max_engines is {self.max_engines}, below engines ({self.engines}); use at least that")
        return self

    @model_validator(mode="after")
    def _database_needs_a_store(self) -> ServeConfig:
        if self.database is not None and self.store is None:
            raise ValueError("database is set, but store is not, where files, bundles and adapters are; set store")
        if self.database is not None and str(self.store).startswith("s3://") and self.jobs.role_arn is None:
            raise ValueError(
                "store is on S3, but jobs.role_arn is not set, from which each job's credentials are made; set it"
            )
        return self

    @model_validator(mode="after")
    def _gradient_learning_needs_a_database(self) -> ServeConfig:
        if self.gradients is not None and self.database is None:
            raise ValueError("gradients is set, but database is not, where its sessions are; set database")
        return self

    @model_validator(mode="after")
    def _engine_decides_whose_turn_it_is(self) -> ServeConfig:
        least = self.max_concurrent + self.max_waiting + _SPARE_REQUESTS
        if self.max_ongoing_requests < least:
            raise ValueError(
                f"max_ongoing_requests is {self.max_ongoing_requests}, but with max_concurrent={self.max_concurrent} "
                f"and max_waiting={self.max_waiting} an engine has to accept {least}; set it to that or more"
            )
        return self

    @field_validator("host")
    @classmethod
    def _is_plain(cls, host: str) -> str:
        if not host or any(letter in host for letter in "/: "):
            raise ValueError("not a host name or IPv4 address; write 127.0.0.1, or 0.0.0.0 for every interface")
        return host
