"""A measured table in a page of text, between the comments that keep its place."""

from pathlib import Path

from cqlora.errors import DataError


def write_between_markers(page: Path, name: str, table: str) -> None:
    """Put a table between `<!-- name: begin -->` and `<!-- name: end -->`; the rest of the page stays.

    Raises:
        DataError: the page has no such place.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise DataError(f"{page} has no {begin} … {end}; put both where the table belongs.")
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
