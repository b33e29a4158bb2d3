"""The page in a browser without a screen: its numbers, its controls, and what cannot be made to run."""

import json
import re

import httpx
import pytest

from cqlora.report.page import PAGE_FOLDER, conclude, describe, render, write_report
from cqlora.report.watch import build_app
from tests.browser import in_browser, open_browser
from tests.conftest import HANG_SECONDS, run_python, run_verb
from tests.report.folders import replies, write_run, write_sweep

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" 'and' 中文 </script>"


@pytest.fixture(scope="module")
def driver():
    with open_browser(1440, 900) as driver:
        yield driver


def open_page(driver, file):
    """Open a written page and wait until it is drawn; whatever the browser complains of is in its log."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get_log("browser")
    driver.get(file.as_uri())
    WebDriverWait(driver, HANG_SECONDS).until(lambda d: d.execute_script("return document.body.dataset.ready"))
    settle(driver)


def settle(driver):
    """Let what waits for the next two frames be drawn."""
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(() => arguments[0]()))")


def choose(driver, label, value):
    """Set the select whose label begins with `label`."""
    found = driver.execute_script(
        "const label = [...document.querySelectorAll('label')].find((one) => one.textContent.startsWith(arguments[0]));"
        "const select = label?.querySelector('select'); if (!select) return null;"
        "select.value = arguments[1]; select.dispatchEvent(new Event('change')); return select.value",
        label, value,
    )  # fmt: skip
    assert found == value
    settle(driver)


def rows_of(driver, section=0):
    """The first table of a section: its rows' texts by column."""
    return driver.execute_script(
        "const table = document.querySelectorAll('section')[arguments[0]].querySelector('table');"
        "return [...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.textContent))",
        section,
    )


def option_of(driver, label):
    """What ECharts was told to draw in the chart of a label."""
    return driver.execute_script(
        "const box = [...document.querySelectorAll('.chart')].find((one) => one.ariaLabel === arguments[0]);"
        "return JSON.parse(JSON.stringify(echarts.getInstanceByDom(box).getOption()))",
        label,
    )


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("run") / "first", ("lora.rank=32",))
    write_report([folder], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory):
    folder = write_sweep(tmp_path_factory.mktemp("sweep") / "sweep")
    write_report([folder], folder / "report.html")
    return folder / "report.html"


def test_a_page_is_one_file_that_names_no_other_place(run_page):
    page = run_page.read_text(encoding="utf-8")
    shell = page.split("<script")[0] + re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert "http" not in shell.replace("http-equiv", "") and "src=" not in shell and "href=" not in shell
    policy = re.search(r'content="([^"]*)"', page).group(1).replace("&#x27;", "'")
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert "connect-src 'none'" in policy


def test_the_librarys_licence_stands_beside_it():
    assert "Apache License" in (PAGE_FOLDER / "vendor" / "echarts.LICENSE.txt").read_text(encoding="utf-8")


@in_browser
def test_a_runs_page_shows_its_numbers_and_the_browser_has_nothing_to_complain_of(driver, run_page):
    open_page(driver, run_page)
    before_after = rows_of(driver, 0)
    assert [row[:5] for row in before_after] == [
        ["wiki_zh", "zh", "4", "3.5", "-0.5"],
        ["news", "zh", "2", "1.75", "-0.25"],
        ["wiki_en", "en", "1", "0.875", "-0.125"],
    ]
    drawn = option_of(driver, "Losses")["series"]
    assert [one["name"] for one in drawn] == ["training loss", "wiki_zh/zh", "wiki_en/en"]
    assert len(drawn[0]["data"]) == 60 and drawn[0]["data"][-1][0] == 60
    assert driver.get_log("browser") == []


@in_browser
def test_replies_in_training_stand_side_by_side(driver, tmp_path):
    folder = write_run(tmp_path / "run", steps=4)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as record:
        record.write("".join(json.dumps(row) + "\n" for step in (0, 4) for row in replies(step)))
    write_report([folder], folder / "report.html")
    open_page(driver, folder / "report.html")
    shown = driver.execute_script(
        "return [...document.querySelectorAll('details')].map((one) => [one.querySelector('summary').textContent,"
        "...[...one.querySelectorAll('.replies > div')].map((reply) => reply.textContent)])"
    )
    assert [row[0] for row in shown] == ["春天来了，", "Spring is here,"]
    assert shown[0][1].startswith("step 0\n<i>花开 0</i>\ncut · in the language asked 0.5")
    assert shown[0][2].startswith("step 4\n<i>花开 4</i>\nended") and driver.get_log("browser") == []


@in_browser
def test_axes_and_measures_follow_their_controls(driver, run_page):
    open_page(driver, run_page)
    falls = [one["data"] for one in option_of(driver, "Held-out text")["series"]]
    assert falls == [[[0, 0], [60, pytest.approx(-12.5)]]] * 3
    choose(driver, "Axis", "tokens")
    choose(driver, "Measure", "bits_per_character")
    assert option_of(driver, "Losses")["series"][0]["data"][-1][0] == 60 * 1024
    assert option_of(driver, "Held-out text")["series"][0]["data"] == [[0, 4], [60 * 1024, 3.5]]
    choose(driver, "Axis", "elapsed")
    assert option_of(driver, "Losses")["series"][0]["data"][-1][0] == 30
    choose(driver, "Measure", "bits_per_byte")
    assert option_of(driver, "Held-out text")["series"][2]["data"] == [[0, 1], [30, 0.875]]


@in_browser
def test_only_what_was_chosen_is_shown_until_all_is_asked_for(driver, run_page):
    open_page(driver, run_page)
    settings = "[...document.querySelectorAll('section')].find((one) => one.textContent.startsWith('Configuration'))"
    shown = f"return [...{settings}.querySelectorAll('tbody tr')].map((row) => row.textContent)"
    assert driver.execute_script(shown) == ["lora.rank3216"]
    driver.execute_script(f"{settings}.querySelector('input[type=checkbox]').click()")
    assert len(driver.execute_script(shown)) > 80


@in_browser
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", ["run_page", "sweep_page"])
def test_no_page_is_wider_than_the_screen_in_either_theme_and_language(driver, request, page, width, theme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        open_page(driver, request.getfixturevalue(page))
        choose(driver, "Theme", theme)
        assert driver.execute_script("return document.documentElement.dataset.theme") == theme
        for language in ("zh-CN", "en"):
            driver.execute_script("document.getElementById('language').click()")
            settle(driver)
            assert driver.execute_script("return document.documentElement.lang") == language
            assert (
                driver.execute_script(
                    "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
                )
                == 0
            )
            if width == 1440:
                # What a run has bought is seen without scrolling its table aside.
                fits = "const [table] = document.querySelectorAll('table.measures');"
                fits += "return !table || table.scrollWidth <= table.parentElement.clientWidth"
                assert driver.execute_script(fits)
        assert driver.get_log("browser") == []
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@in_browser
def test_a_sweeps_table_sorts_by_keyboard_and_what_is_missing_comes_last(driver, sweep_page):
    from selenium.webdriver.common.keys import Keys

    open_page(driver, sweep_page)
    assert [row[1] for row in rows_of(driver)] == ["finished"] * 3 + ["failed"] + ["finished"] * 7 + ["running"]
    find = "return [...document.querySelectorAll('th button')].find((one) => one.textContent.startsWith('lora.rank'))"
    driver.execute_script(f"{find.removeprefix('return ')}.focus()")
    driver.switch_to.active_element.send_keys(Keys.ENTER)
    ranks = [row[2] for row in rows_of(driver)]
    assert ranks == sorted(ranks, key=int)
    driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert [row[2] for row in rows_of(driver)] == sorted(ranks, key=int, reverse=True)
    driver.execute_script(
        "[...document.querySelectorAll('th button')].find((b) => b.textContent === 'train/loss').click()"
    )
    assert rows_of(driver)[-1][1] == "running"


@in_browser
def test_runs_are_told_by_what_differs_and_every_name_is_whole(driver, tmp_path):
    folder = write_sweep(tmp_path / "sweep", runs=4, steps=4)
    trials = folder / "trials.jsonl"
    trials.write_text(trials.read_text().replace('"overrides": {', '"overrides": {"stage.max_steps": 4, '))
    write_report([folder], folder / "report.html")
    open_page(driver, folder / "report.html")
    assert option_of(driver, "Curves")["series"][0]["name"] == "0 rank=4 learning_rate=0.0001"
    axes = [axis["name"].replace("\n", "") for axis in option_of(driver, "Parallel coordinates")["parallelAxis"]]
    heads = driver.execute_script(
        "return [...document.querySelectorAll('th button')].map((one) => one.textContent.split(' ')[0])"
    )
    assert axes[0] == "lora.rank" and "eval/zh/bits_per_character/gain" in axes and set(axes[1:]) < set(heads)


@in_browser
def test_filters_leave_the_same_runs_in_table_curves_and_scatter(driver, sweep_page):
    open_page(driver, sweep_page)
    driver.execute_script(
        "const box = document.querySelector('input[type=search]'); box.value = 'lora.rank=8 ';"
        "box.dispatchEvent(new Event('input'))"
    )
    assert {row[2] for row in rows_of(driver)} == {"8"}
    begun = [row[0] for row in rows_of(driver) if row[1] != "running"]
    assert [one["name"].split()[0] for one in option_of(driver, "Curves")["series"]] == begun
    choose(driver, "State", "failed")
    assert rows_of(driver) == []


@in_browser
def test_brushing_an_axis_leaves_its_runs_in_the_table(driver, sweep_page):
    from selenium.webdriver.common.action_chains import ActionChains

    open_page(driver, sweep_page)
    box = driver.find_element("css selector", ".chart[aria-label='Parallel coordinates']")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    # The first axis, lora.rank from 4 below to 16 above, lies as far from the chart's edges as sweep.js puts it.
    x, bottom = 40 - box.size["width"] // 2, box.size["height"] // 2 - 26
    drag = ActionChains(driver).move_to_element_with_offset(box, x, bottom - 40).click_and_hold()
    drag.move_by_offset(0, 25).move_by_offset(0, 25).release().perform()
    settle(driver)
    assert {row[2] for row in rows_of(driver)} == {"4"}
    assert len(option_of(driver, "Curves")["series"]) == len(rows_of(driver))
    ActionChains(driver).move_to_element_with_offset(box, x, bottom - 150).click().perform()
    settle(driver)
    assert len(rows_of(driver)) == 12


@in_browser
def test_importances_stand_with_their_runs_and_a_failure_with_its_reason(driver, sweep_page):
    open_page(driver, sweep_page)
    text = driver.execute_script("return document.body.innerText")
    assert "over 11 runs" in text and "the loss was <b>not</b> finite; lower stage.learning_rate." in text


@in_browser
def test_names_are_text_whatever_they_say(driver, tmp_path):
    folder = write_sweep(tmp_path / "sweep <b>", runs=3, steps=4)
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()[3:6]]
    for trial in trials:
        trial["overrides"]["tracking.name"] = HOSTILE
        trial["error"], trial["state"] = HOSTILE, "failed"
    (folder / "trials.jsonl").write_text("".join(json.dumps(trial, ensure_ascii=False) + "\n" for trial in trials))
    write_report([folder], folder / "report.html")
    open_page(driver, folder / "report.html")
    assert HOSTILE in driver.execute_script("return document.body.innerText")
    assert driver.execute_script("return document.querySelectorAll('section img, section script').length") == 0
    assert driver.title == "sweep <b> · cqlora" and driver.get_log("browser") == []


@in_browser
def test_a_cell_that_a_spreadsheet_would_run_is_text_in_the_csv(driver, tmp_path):
    folder = tmp_path / "sweep"
    folder.mkdir()
    overrides = {"tracking.name": '=HYPERLINK("x")', "data.name": "a,b"}
    trial = {"number": 0, "folder": "0", "overrides": overrides, "state": "failed"}
    (folder / "trials.jsonl").write_text(json.dumps(trial) + "\n")
    write_report([folder], folder / "report.html")
    open_page(driver, folder / "report.html")
    csv = driver.execute_async_script(
        "const done = arguments[0]; const make = URL.createObjectURL;"
        "URL.createObjectURL = (blob) => { blob.text().then(done); return make(blob); };"
        "[...document.querySelectorAll('button')].find((one) => one.textContent === 'CSV').click()"
    )
    head, row, _ = csv.split("\r\n")
    assert head.lstrip("\ufeff").startswith("number,state,tracking.name,data.name")
    assert row.startswith('0,failed,"\'=HYPERLINK(""x"")","a,b"')


def test_a_run_ends_by_saying_where_its_page_is_and_a_full_disk_ends_nothing(tmp_path, capsys, monkeypatch):
    folder = write_run(tmp_path / "run", steps=3)
    conclude(folder)
    assert capsys.readouterr().err == f"report: {folder / 'report.html'}\n"
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    conclude(folder)
    assert "note: no report was written" in capsys.readouterr().err


def test_the_verb_writes_a_page_and_refuses_what_is_none(tmp_path):
    first, second = (write_run(tmp_path / name, steps=3) for name in ("a", "b"))
    done = run_verb(tmp_path, "report", f"folder={first}")
    assert done.stdout == f"{first}/report.html has the report; open it in a browser.\n"
    run_verb(tmp_path, "report", f"folder=[{first},{second}]")
    assert (tmp_path / "comparison.html").is_file()
    done = run_verb(tmp_path, "report", f"folder={tmp_path}/none", expect=2)
    assert done.stderr == (
        f"error: folder={tmp_path}/none does not exist; give outputs/… of a run or multirun/… of a sweep.\n"
    )
    done = run_verb(tmp_path, "report", f"folder={first}/run.yaml", expect=2)
    assert f"folder={first}/run.yaml is a file" in done.stderr
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine")
    done = run_verb(tmp_path, "report", f"folder={first}", f"output={mine}", expect=2)
    assert f"output={mine} is there and was not written by `cqlora report`" in done.stderr
    assert mine.read_text() == "<p>mine"
    run_verb(tmp_path, "report", f"folder={first}", f"output={tmp_path}/comparison.html")
    done = run_verb(tmp_path, "report", f"folder={first}", "port=9", expect=2)
    assert "port=9 has no effect without watch=true" in done.stderr


def test_a_watched_page_is_served_to_this_machine_alone_and_follows_its_run(tmp_path):
    folder = write_run(tmp_path / "run", steps=3, ended=False)
    transport = httpx.ASGITransport(app=build_app([folder]))

    async def ask(path, host="127.0.0.1"):
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8010") as client:
            return await client.get(path, headers={"host": host})

    import asyncio

    page = asyncio.run(ask("/"))
    assert page.status_code == 200 and "connect-src &#x27;self&#x27;" in page.text
    assert asyncio.run(ask("/", host="attacker.example")).status_code == 421
    assert asyncio.run(ask("/data", host="attacker.example")).status_code == 421
    assert asyncio.run(ask("/data")).json()["run"]["curves"]["points"] == 3
    write_run(tmp_path / "more", steps=5).joinpath("metrics.jsonl").replace(folder / "metrics.jsonl")
    assert asyncio.run(ask("/data")).json()["run"]["curves"]["points"] == 5
    assert asyncio.run(ask("/../run.yaml")).status_code == 404
    with (folder / "metrics.jsonl").open("a") as record:
        record.write(json.dumps({"kind": "event", "step": 5, "event": "\ud83d"}) + "\n")
    assert asyncio.run(ask("/")).status_code == asyncio.run(ask("/data")).status_code == 200
    folder.rename(tmp_path / "<b>moved")
    gone = asyncio.run(ask("/"))
    assert gone.status_code == 503 and f"folder={folder} does not exist" in gone.text
    assert "does not exist" in asyncio.run(ask("/data")).json()["error"]


def test_watching_ends_with_one_sentence_where_nothing_can_be_listened_on(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    code = (
        "import socket, sys, runpy\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
        f"sys.argv = ['report', 'folder={folder}', 'watch=true', f'port={{s.getsockname()[1]}}']\n"
        "runpy.run_module('cqlora.report', run_name='__main__')"
    )
    assert "cannot be listened on" in run_python(tmp_path, "-c", code, expect=2).stderr


def test_a_page_of_two_hundred_runs_stays_small(tmp_path):
    """Under 6 MB for a hundred runs: what each adds is counted on twelve."""
    folder = write_sweep(tmp_path / "sweep", runs=13, steps=2000)
    whole = len(render(describe([folder])))
    library = len((PAGE_FOLDER / "vendor" / "echarts.js").read_text(encoding="utf-8"))
    assert (whole - library) / 12 * 100 + library < 6_000_000
