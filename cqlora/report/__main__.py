"""`python -m cqlora.report`: one HTML page of a run, a sweep or several runs."""

from pathlib import Path

from hydra.core.config_store import ConfigStore

from cqlora.cli import run_program
from cqlora.errors import ConfigError
from cqlora.report.config import ReportConfig
from cqlora.report.page import REPORT_FILE, describe, refuse_foreign, write_report


def report(config: ReportConfig) -> None:
    """Write the page and say where it is, or serve it until Ctrl-C."""
    folders = [Path(folder) for folder in config.folder]
    if config.watch:
        # What cannot be shown is reported before anything listens.
        describe(folders)
        watch(folders, config.port)
        return
    several = len(folders) > 1
    file = Path(config.output) if config.output else Path("comparison.html") if several else folders[0] / REPORT_FILE
    if config.output:
        refuse_foreign(file)
    write_report(folders, file)
    print(f"{file} has the report; open it in a browser.")


def watch(folders: list[Path], port: int) -> None:
    """Serve the page on loopback."""
    from cqlora.serve.listener import bind

    with bind("127.0.0.1", port) as listener:
        try:
            from cqlora.report.watch import run_server
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"watch=true needs {error.name}, which is not installed; type pip install 'cqlora[serve]'."
            ) from error
        run_server(folders, listener)


def main() -> None:
    """The verb `report`."""
    ConfigStore.instance().store(name="report_schema", node=ReportConfig)
    run_program("report", ReportConfig, report)


if __name__ == "__main__":
    main()
