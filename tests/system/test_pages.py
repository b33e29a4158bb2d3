"""A table goes where a page keeps its place, and the rest of the page stays."""

import pytest

from cqlora.errors import DataError
from cqlora.system.pages import write_between_markers
from tests.conftest import ROOT

PLACES = [("docs/recipes.md", "recipes"), ("docs/recipes.zh-CN.md", "recipes"), ("README.md", "recipe"),
          ("README.zh-CN.md", "recipe")]  # fmt: skip


def test_a_page_keeps_all_but_the_table_and_one_without_a_place_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- t: begin -->\nold\n<!-- t: end -->\nafter\n")
    write_between_markers(page, "t", "new")
    write_between_markers(page, "t", "newer")
    assert page.read_text() == "before\n<!-- t: begin -->\nnewer\n<!-- t: end -->\nafter\n"
    with pytest.raises(DataError, match=r"has no <!-- other: begin -->"):
        write_between_markers(page, "other", "new")


@pytest.mark.parametrize("page, name", PLACES)
def test_pages_hold_the_places_of_their_tables(page, name):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count(f"<!-- {name}: begin -->") == text.count(f"<!-- {name}: end -->") == 1
