"""The chat page in a browser without a screen: what a person sees, does and cannot be made to run."""

import hashlib
import json
import re

import httpx
import pytest

from cqlora.serve.app import PAGE_FOLDER
from tests.browser import in_browser, open_browser
from tests.serve.fake import FakeEngine, fake_config, running

KEY = "correct-horse-battery-staple"


class TextEngine(FakeEngine):
    """Says `text`, three characters a step."""

    def __init__(self, text: str, **options) -> None:
        self.parts = [text[start : start + 3] for start in range(0, len(text), 3)]
        super().__init__(words=len(self.parts), **options)

    def open_batch(self, slots):
        batch = super().open_batch(slots)
        step = batch.step
        batch.step = lambda: [(reply, self.parts[reply.completion_tokens - 1]) for reply, _ in step()]
        return batch


@pytest.fixture(scope="module")
def driver():
    with open_browser(1100, 760) as driver:
        yield driver


class Page:
    """The page of one server."""

    def __init__(self, driver, run) -> None:
        self.driver, self.run = driver, run
        driver.get_log("browser")
        driver.get(run.url)
        driver.execute_script("localStorage.clear(); sessionStorage.clear()")
        driver.get(run.url)
        self.wait(lambda: self.text("#model") == "fake" or self.find("#key-dialog").is_displayed())

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """What the first of them shows; the page draws messages anew, so an element in hand may be gone."""
        return next(iter(self.all_texts(selector)), "")

    def all_texts(self, selector: str) -> list[str]:
        read = "return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText.trim())"
        return self.driver.execute_script(read, selector)

    def ask(self, text: str) -> None:
        self.find("#words").send_keys(text + "\ue007")

    def wait(self, true) -> None:
        self.run.wait_until(true)

    def wait_until_quiet(self) -> None:
        self.wait(lambda: self.find("#send").is_displayed())

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@in_browser
def test_a_reply_streams_onto_the_page_and_the_conversation_goes_on(driver):
    engine = FakeEngine(words=6, seconds_per_step=0.01)
    with running(engine, fake_config()) as run:
        page = Page(driver, run)
        engine.open.clear()
        page.ask("hello")
        page.wait(lambda: page.find("#stop").is_displayed())
        engine.open.set()
        page.wait_until_quiet()
        assert page.all_texts("article .body") == ["hello", "w0 w1 w2 w3 w4 w5"]
        assert "6 tokens" in page.text("#notice")
        page.find("#system").send_keys("be brief")
        page.ask("and then?")
        page.wait(lambda: len(engine.admitted) == 2)
        page.wait_until_quiet()
        assert engine.admitted[1] == "system:be brief|user:hello|assistant:w0 w1 w2 w3 w4 w5 |user:and then?"
        page.find("#new").click()
        assert page.all_texts("article") == [] and page.find("#greeting").is_displayed()
        assert page.complaints() == []


@in_browser
def test_stop_frees_the_slot_and_keeps_what_was_said(driver):
    with running(FakeEngine(words=10**6, seconds_per_step=0.005), fake_config()) as run:
        page = Page(driver, run)
        page.ask("go on")
        page.wait(lambda: "w3" in page.text("article.assistant"))
        page.find("#stop").click()
        page.wait_until_quiet()
        run.wait_until_idle()
        assert page.text("#notice") == "Stopped."
        assert "w3" in page.text("article.assistant")


@in_browser
@pytest.mark.parametrize("sign", ["isComposing: true", "keyCode: 229"])
def test_keys_for_an_input_method_neither_send_nor_stop(driver, sign):
    event = f"new KeyboardEvent('keydown', {{key: arguments[1], bubbles: true, {sign}}})"
    press = f"arguments[0].dispatchEvent({event})"
    engine = FakeEngine(words=6)
    with running(engine, fake_config()) as run:
        page = Page(driver, run)
        page.find("#words").send_keys("ni hao")
        driver.execute_script(press, page.find("#words"), "Enter")
        assert page.all_texts("article") == [] and page.find("#words").get_attribute("value") == "ni hao"
        engine.open.clear()
        page.ask("")
        page.wait(lambda: page.find("#stop").is_displayed())
        driver.execute_script(press, page.find("#words"), "Escape")
        engine.open.set()
        page.wait_until_quiet()
        assert page.all_texts("article .body") == ["ni hao", "w0 w1 w2 w3 w4 w5"]


@in_browser
def test_text_is_never_read_as_html_and_code_stands_in_a_block(driver):
    text = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>\n```python\nprint('<i>hi</i>')\n```\nafter"
    with running(TextEngine(text), fake_config()) as run:
        page = Page(driver, run)
        page.ask("<script>document.title='owned'</script>")
        page.wait_until_quiet()
        assert page.all_texts("article.user .prose") == ["<script>document.title='owned'</script>"]
        prose = page.all_texts("article.assistant .markdown > p")
        assert prose == ["<img src=x onerror=\"document.title='owned'\"><b>bold</b>", "after"]
        assert page.text("figure code") == "print('<i>hi</i>')"
        assert page.text("figcaption span") == "python"
        assert not driver.find_elements("css selector", "article img, article b, article script, article i")
        assert driver.title == "fake · cqlora"


MARKDOWN = """# Rivers

**Bold**, *slanted*, `code` and a [link](https://example.com/a).

1. one
2. two
   - inner

| River | km |
|---|---:|
| 长江 | 6300 |

> quoted
- [x] done
"""


@in_browser
def test_a_reply_is_shown_as_markdown(driver):
    with running(TextEngine(MARKDOWN), fake_config()) as run:
        page = Page(driver, run)
        page.ask("**stays**")
        page.wait_until_quiet()
        assert page.all_texts("article.user .prose") == ["**stays**"]
        for selector, text in {
            "h1": "Rivers", "strong": "Bold", "em": "slanted", "p > code": "code", "ol > li:first-child": "one",
            "td[align=right]": "6300", "blockquote": "quoted", ".scroll th": "River", "ul > li:last-child": "☑ done",
        }.items():  # fmt: skip
            assert text in page.all_texts(f"article.assistant .markdown {selector}"), selector
        link = page.find("article.assistant a")
        assert link.get_attribute("href") == "https://example.com/a"
        assert link.get_attribute("target") == "_blank" and "noopener" in link.get_attribute("rel")
        assert page.complaints() == []


ATTACKS = [
    "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "[a](javascript:alert(1))", "[a](JaVascript:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>)", "![a](x' onerror='alert(1))", "![a](https://example.com/leak.png)",
    '<a href="javascript:alert(1)">a</a>', "<svg/onload=alert(1)>", "<iframe srcdoc='<script>alert(1)</script>'>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>", "<form action=//evil><button>go</button></form>",
    "`<img src=x onerror=alert(1)>`", "```html\n<img src=x onerror=alert(1)>\n```", "<style>body{display:none}</style>",
    "| <img src=x onerror=alert(1)> |\n|---|\n| <script>alert(1)</script> |", "[a]: javascript:alert(1)\n\n[a]",
    "<javascript:alert(1)>", "[x](vbscript:a)", "&lt;img src=x onerror=alert(1)&gt;", "[a](&#106;avascript:alert(1))",
    "<div style='position:fixed;inset:0'>", "<input autofocus onfocus=alert(1)>", "<base href=//evil>",
]  # fmt: skip


@in_browser
def test_no_reply_runs_loads_or_styles_anything(driver):
    """Every attack is rendered by itself, with scripts that count what they are called for."""
    with running(FakeEngine(), fake_config()) as run:
        page = Page(driver, run)
        found = driver.execute_async_script(
            """
            const [attacks, done] = arguments;
            window.alert = () => (window.owned = true);
            const { renderMarkdown } = await import("/page/render.js");
            const bad = "img, script, svg, iframe, math, style, form, input, base, [style], [onerror], [id], [name]";
            const wrong = [];
            for (const text of attacks) {
              const target = document.createElement("div");
              document.querySelector("#messages").append(target);
              renderMarkdown(text, target);
              const links = [...target.querySelectorAll("a")].map((link) => link.getAttribute("href"));
              const strange = links.some((href) => href !== null && !/^(https?|mailto):/.test(href));
              if (target.querySelector(bad) || strange) wrong.push(text + " -> " + target.innerHTML);
              if (!target.textContent.trim() && !text.startsWith("[a]:")) wrong.push(text + " shows nothing");
            }
            setTimeout(() => done([wrong, Boolean(window.owned)]), 100);
            """,
            ATTACKS,
        )
        assert found == [[], False]
        assert page.complaints() == [], "the policy had to stop nothing"


@in_browser
def test_what_is_too_long_to_be_parsed_is_shown_as_it_is(driver):
    table = "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 6000
    with running(FakeEngine(), fake_config()) as run:
        Page(driver, run)
        shown = driver.execute_async_script(
            """
            const [texts, done] = arguments;
            const { renderMarkdown } = await import("/page/render.js");
            done(texts.map((text) => {
              const target = document.createElement("div");
              renderMarkdown(text, target);
              return [target.querySelectorAll("tr").length, target.textContent.length];
            }));
            """,
            [table, table[:4000], "[" * 20_000, "*a " * 10_000, "> " * 5000 + "a"],
        )
        assert shown[0] == [0, len(table)] and shown[1][0] > 300
        assert all(characters for _, characters in shown)


class Turns:
    """Says what number the reply has: the page cannot show one answer for another."""

    def __new__(cls):
        engine = FakeEngine(words=1)
        engine.count = 0

        def encode(messages, encode=engine.encode_messages):
            engine.count += 1
            engine.word = f"answer {engine.count}"
            return encode(messages)

        engine.encode_messages = encode
        return engine


@in_browser
def test_an_answer_is_made_again_and_a_question_changed(driver):
    engine = Turns()
    with running(engine, fake_config()) as run:
        page = Page(driver, run)
        for text in ("first", "second"):
            page.ask(text)
            page.wait_until_quiet()
        assert page.all_texts("article .body") == ["first", "answer 1", "second", "answer 2"]
        (again,) = driver.find_elements("css selector", "button.regenerate")
        again.click()
        page.wait(lambda: page.all_texts("article .body")[-1] == "answer 3")
        page.wait_until_quiet()
        assert engine.admitted[-1] == "user:first|assistant:answer 1|user:second"
        driver.find_elements("css selector", "button.edit")[0].click()
        page.find("article textarea").send_keys(" changed\ue007")
        page.wait(lambda: page.all_texts("article .body") == ["first changed", "answer 4"])
        page.wait_until_quiet()
        assert engine.admitted[-1] == "user:first changed"
        page.find("button.edit").click()
        page.find("article textarea").send_keys("x\ue00c")
        assert page.all_texts("article .body") == ["first changed", "answer 4"]
        assert page.complaints() == []


@in_browser
def test_an_answer_that_cannot_be_made_again_stays(driver):
    engine = Turns()
    with running(engine, fake_config()) as run:
        page = Page(driver, run)
        page.ask("first")
        page.wait_until_quiet()
        engine.refuses = "first"
        page.find("button.regenerate").click()
        page.wait(lambda: "refused" in page.text("#notice"))
        assert page.all_texts("article .body") == ["first", "answer 1"]


@in_browser
def test_conversations_are_kept_opened_renamed_exported_and_deleted(driver):
    engine = Turns()
    with running(engine, fake_config()) as run:
        page = Page(driver, run)
        for text in ("first", "<b>second</b>"):
            page.find("#new").click()
            page.ask(text)
            page.wait_until_quiet()
        driver.refresh()
        page.wait(lambda: page.all_texts("#chat-list .open") == ["<b>second</b>", "first"])
        driver.find_elements("css selector", "#chat-list .open")[1].click()
        assert page.all_texts("article .body") == ["first", "answer 1"]
        page.ask("more")
        page.wait(lambda: page.all_texts("#chat-list .open") == ["first", "<b>second</b>"])
        page.wait_until_quiet()
        page.find("#chat-list button.rename").click()
        page.find("#chat-list input").send_keys("renamed\ue007")
        assert page.all_texts("#chat-list .open")[0] == "renamed"
        driver.execute_script(
            "window.blobs = []; const make = URL.createObjectURL;"
            "URL.createObjectURL = (b) => { b.text().then((text) => window.blobs.push(text)); return make(b); }"
        )
        page.find("#chat-list button.export").click()
        page.wait(lambda: driver.execute_script("return window.blobs.length"))
        turns = json.loads(driver.execute_script("return window.blobs[0]"))
        assert [turn["text"] for turn in turns] == ["first", "answer 1", "more", "answer 3"]
        page.find("#chat-list button.delete").click()
        driver.switch_to.alert.accept()
        page.wait(lambda: page.all_texts("#chat-list .open") == ["<b>second</b>"])
        assert page.all_texts("article") == []
        assert page.complaints() == []


@in_browser
def test_a_full_or_damaged_store_is_reported_and_harms_nothing(driver):
    with running(Turns(), fake_config()) as run:
        page = Page(driver, run)
        driver.execute_script(
            "for (const text of ['', '{', 'null', '{\"id\": 3}', '{\"id\": \"c5\", \"title\": 1}'])"
            "  localStorage.setItem(`cqlora-chat-c${text.length}`, text);"
            "localStorage.setItem('cqlora', '[[');"
        )
        driver.refresh()
        page.wait(lambda: page.text("#model") == "fake")
        assert page.all_texts("#chat-list .open") == []
        driver.execute_script(
            "for (let n = 5e6; n > 1; n /= 2) try { localStorage.setItem(`x${n}`, 'x'.repeat(n)) } catch {}"
        )
        page.ask("first")
        page.wait(lambda: "no room" in page.text("#notice"))
        assert page.all_texts("article .body") == ["first", "answer 1"]
        driver.execute_script("localStorage.clear()")


@in_browser
def test_the_sampling_controls_reach_the_server(driver):
    with running(FakeEngine(words=50), fake_config(max_tokens=100)) as run:
        page = Page(driver, run)
        asked = []
        batch = run.scheduler._batch
        admit = batch.admit
        batch.admit = lambda ids, sampling: asked.append(sampling) or admit(ids, sampling)
        page.wait(lambda: page.find("#max_tokens").get_attribute("max") == "100")
        assert page.find("#max_tokens").get_attribute("value") == "100"
        for name, value in (("max_tokens", "3"), ("top_k", "40"), ("seed", "7")):
            page.find(f"#{name}").clear()
            page.find(f"#{name}").send_keys(value)
        page.find("#temperature").send_keys("\ue010")
        page.ask("hello")
        page.wait_until_quiet()
        assert (asked[0].max_new_tokens, asked[0].top_k, asked[0].seed, asked[0].temperature) == (3, 40, 7, 2.0)
        assert page.text("#notice").startswith("Reached max tokens.")


@in_browser
def test_language_and_theme_change_and_are_kept(driver):
    with running(FakeEngine(), fake_config()) as run:
        page = Page(driver, run)
        assert page.text("#send") == "Send"
        page.find("#language").click()
        assert page.text("#send") == "发送" and page.find("html").get_attribute("lang") == "zh-CN"
        grounds = set()
        for _ in range(3):
            page.find("#theme").click()
            theme = page.find("html").get_attribute("data-theme")
            grounds.add((theme, page.find("body").value_of_css_property("background-color")))
        assert dict(grounds)["light"] != dict(grounds)["dark"] and "auto" in dict(grounds)
        driver.refresh()
        assert page.text("#send") == "发送"


@in_browser
def test_errors_are_shown_and_the_question_comes_back(driver):
    with running(FakeEngine(max_length=20), fake_config()) as run:
        page = Page(driver, run)
        page.ask("far too long for this model")
        page.wait(lambda: "32 tokens and the model holds 20" in page.text("#notice"))
        assert page.find("#words").get_attribute("value") == "far too long for this model"
        assert page.all_texts("article") == []


@in_browser
def test_a_server_with_a_key_asks_for_it(driver):
    with running(FakeEngine(), fake_config(), KEY) as run:
        page = Page(driver, run)
        page.wait(lambda: page.find("#key-dialog").is_displayed())
        page.find("#key").send_keys(KEY + "\ue007")
        page.wait(lambda: page.text("#model") == "fake")
        page.ask("hello")
        page.wait(lambda: "w4" in page.text("article.assistant"))


@in_browser
def test_a_phone_sees_everything_without_scrolling_sideways(driver):
    with running(TextEngine("word " * 40 + "x" * 300 + "\n```\n" + "y" * 300 + "\n```"), fake_config()) as run:
        width, height = driver.get_window_size().values()
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
        )
        try:
            page = Page(driver, run)
            page.ask("hello")
            page.wait_until_quiet()
            assert driver.execute_script("return document.documentElement.scrollWidth") == 360
            assert not page.find("#settings").is_displayed() and page.find("#send").is_displayed()
            page.find("#settings-toggle").click()
            assert page.find("#settings").is_displayed()
            page.find("#settings .close").click()
            assert not page.find("#settings").is_displayed()
            page.find("#chats-toggle").click()
            page.find("#words")
            assert page.find("#chats").is_displayed()
            page.find("body").send_keys("\ue00c")
            assert not page.find("#chats").is_displayed()
            assert driver.execute_script("return document.documentElement.scrollWidth") == 360
        finally:
            driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            driver.set_window_size(width, height)


@in_browser
def test_every_control_has_a_name_for_those_who_cannot_see_it(driver):
    with running(FakeEngine(), fake_config()) as run:
        Page(driver, run)
        for element in driver.find_elements("css selector", "button, input, textarea, aside, section"):
            if element.is_displayed():
                assert element.accessible_name, element.get_attribute("outerHTML")


def test_the_page_needs_nothing_from_elsewhere_and_forbids_it():
    with running(FakeEngine(), fake_config()) as run:
        policy = httpx.get(run.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for file in [file for file in PAGE_FOLDER.iterdir() if file.is_file()]:
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|innerHTML|insertAdjacentHTML|document\.write|eval\(", text), file.name
        assert not re.search(r"\s(style|on\w+)=", text) or file.suffix == ".js", file.name


VENDORED = {
    "marked.js": "5371fea86fd0656b4fc7bea7c94c663109d82789b69433eeee78d42895aa44de",
    "purify.js": "1a06b721ad8b46d6174b21f22ea70290aaf3e5a81d65af3b7178113953f7c9b1",
}


def test_the_libraries_of_others_are_whole_and_have_their_licences_beside_them():
    for name, digest in VENDORED.items():
        file = PAGE_FOLDER / "vendor" / name
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digest, name
        version = re.search(r"v?(\d+\.\d+\.\d+)", file.read_text(encoding="utf-8"))[1]
        licence = file.with_suffix(".LICENSE.txt").read_text(encoding="utf-8")
        assert version in licence and re.search("MIT|Apache", licence)


def test_both_languages_have_every_label():
    text = (PAGE_FOLDER / "labels.js").read_text(encoding="utf-8")
    english, chinese = (re.findall(r"^    (\w+):", part, re.M) for part in re.split(r"^  zh: ", text, flags=re.M))
    assert english == chinese and len(english) > 20
    used = re.findall(r'data-(?:label|placeholder|aria)="(\w+)"', (PAGE_FOLDER / "index.html").read_text())
    assert set(used) <= set(english)
