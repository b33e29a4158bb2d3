"""`python -m cqlora.serve`: an OpenAI-compatible HTTP API and a chat page for a model of yours."""

from hydra.core.config_store import ConfigStore

from cqlora.cli import run_program
from cqlora.errors import ConfigError
from cqlora.serve.config import ServeConfig
from cqlora.serve.listener import bind, read_key


def serve(config: ServeConfig) -> None:
    """Load the model and answer requests until SIGTERM or SIGINT."""
    key = read_key(config.host)
    config.check_folders()
    with bind(config.host, config.port) as listener:
        try:
            from cqlora.serve.server import run_server
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"`cqlora serve` needs {error.name}, which is not installed; type pip install 'cqlora[serve]'."
            ) from error
        run_server(config, key, listener)


def main() -> None:
    """The verb `serve`."""
    ConfigStore.instance().store(name="serve_schema", node=ServeConfig)
    run_program("serve", ServeConfig, serve)


if __name__ == "__main__":
    main()
