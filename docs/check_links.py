"""`python docs/check_links.py SITE`: every link in it leads somewhere, and nothing is loaded from elsewhere."""

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The addresses in a page: where one may go, what is loaded, and the places within that links name."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """As HTMLParser's."""
        given = {name: value for name, value in attrs if value}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if "href" in given:
            (self.loaded if tag == "link" else self.links).append(given["href"])
        if "src" in given:
            self.loaded.append(given["src"])


def find_faults(site: Path) -> Iterator[str]:
    """A sentence for each address that is wrong."""
    pages = {file.resolve(): Page(file) for file in sorted(site.rglob("*.html"))}
    for file, page in pages.items():
        for address in page.loaded:
            if urlsplit(address).netloc:
                yield f"{file.relative_to(site.resolve())} loads {address} from elsewhere"
        for address in (*page.links, *page.loaded):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            place = unquote(parts.fragment)
            if not target.exists() or (place and target in pages and place not in pages[target].places):
                yield f"{file.relative_to(site.resolve())} links to {address}, which is not there"


def main() -> None:
    """Print what is wrong and fail, or say how many pages are right."""
    site = Path(sys.argv[1])
    faults = list(find_faults(site))
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(list(site.rglob('*.html')))} pages, every link leads somewhere")


if __name__ == "__main__":
    main()
