"""The playground in a real headless Chromium; skipped where there is none."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from browser import NO_CHROMIUM, chromium, chromium_path
from conftest import NUM_ITEMS, save_tiny
from raw_http import serving

from seqray.bundle import Bundle
from seqray.recommender import Recommender
from seqray.serve_config import ServeConfig
from serve.application import build_application
from serve.keys import KeyFile
from serve.middleware import ProblemMiddleware
from serve.served_model import ServedModel
from serve.service import Service

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium_path() is None, reason=NO_CHROMIUM),
]
HOSTILE = '<img src=x onerror="window.hacked=1">'
REFUSED = "Failed to load resource: the server responded with a status of 4"
CONTRAST = """() => {
  const channels = (text) => text.match(/[0-9.]+/g).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([red, green, blue]) => 0.2126 * linear(red / 255) + 0.7152 * linear(green / 255)
    + 0.0722 * linear(blue / 255);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const found = channels(getComputedStyle(node).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const texts = [...document.querySelectorAll("h1, h2, p, label, .title, .below, .rank, .score, .source, .moved")];
  return texts.filter((node) => node.offsetParent && node.textContent.trim()).map((node) => {
    const [one, two] = [light(channels(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => b - a);
    return [(one + 0.05) / (two + 0.05), node.className || node.tagName];
  }).sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, module_port: int) -> Iterator[str]:
    titles = [HOSTILE, *[f"Título {number}" for number in range(2, NUM_ITEMS + 1)]]
    ids = [f"i{number}" for number in range(1, NUM_ITEMS + 1)]
    columns = {"item_id": ids, "train_events": list(range(NUM_ITEMS, 0, -1)), "title": titles}
    prices = [float(number) for number in range(1, NUM_ITEMS + 1)]
    bundle = save_tiny(tmp_path_factory.mktemp("page") / "odd", items=pa.table({**columns, "price": prices}))
    service = Service("shop", ServedModel(Recommender(bundle), "shop", "champion", 4))
    service.warm_up()
    with serving(ProblemMiddleware(build_application(service, playground=True)), module_port):
        yield f"http://127.0.0.1:{module_port}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The open page; nothing that it does may be blocked, fail or go to another host."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(20_000)
    complaints: list[str] = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith(url) else None)
    page.goto(url)
    page.locator("#results button").first.wait_for()
    page.locator("#recommended > li").first.wait_for()
    yield page
    context.close()
    assert [text for text in complaints if not text.startswith(REFUSED)] == []


def history(page: Any) -> list[str]:
    return page.locator("#history .title").all_text_contents()


def add(page: Any, title: str) -> None:
    """Searches for a title and clicks it."""
    page.fill("#search", title)
    page.wait_for_function("text => document.querySelector('#results .title')?.textContent === text", arg=title)
    page.locator("#results button").first.click()


def recommended(page: Any) -> list[str]:
    """Titles of the answer to the history that is shown."""
    page.locator('#recommended[aria-busy="false"]').wait_for()
    return page.locator("#recommended .title").all_text_contents()


def test_it_starts_with_what_is_popular(page: Any) -> None:
    assert page.locator("#results .title").all_text_contents()[:2] == [HOSTILE, "Título 2"]
    assert set(page.locator("#recommended .source").all_text_contents()) == {"popular"}
    assert page.locator("#model").text_content() == "shop  ·  version tiny-1  ·  champion"
    assert "10 items in " in page.locator("#status").text_content()


def test_recommendations_follow_the_history(page: Any) -> None:
    add(page, "Título 5")
    first = recommended(page)
    assert set(page.locator("#recommended .source").all_text_contents()) == {"model"}
    add(page, "Título 9")
    assert history(page) == ["Título 5", "Título 9"]
    second = recommended(page)
    assert second != first
    assert len(page.locator("#recommended .score").all_text_contents()) == 10
    page.get_by_label("Move Título 9 up").click()
    assert history(page) == ["Título 9", "Título 5"]
    assert recommended(page) != second
    page.get_by_label("Remove Título 9").click()
    assert history(page) == ["Título 5"]
    assert recommended(page) == first
    page.get_by_text("Clear history").click()
    assert history(page) == []
    recommended(page)
    assert set(page.locator("#recommended .source").all_text_contents()) == {"popular"}


def test_a_title_is_never_markup(page: Any) -> None:
    add(page, HOSTILE)
    add(page, "Título 3")
    page.get_by_label(f"Items similar to {recommended(page)[0]}").click()
    page.locator("#similar-items > li").nth(9).wait_for()
    assert history(page)[0] == HOSTILE
    assert page.locator("main img, dialog img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_the_options_are_sent_and_mistakes_stand_beside_their_field(page: Any) -> None:
    add(page, "Título 5")
    page.fill("#k", "501")
    page.get_by_text("less than or equal to 500").wait_for()
    assert page.locator("#k").get_attribute("aria-invalid") is not None
    page.fill("#k", "29")
    page.locator("#k-error").wait_for(state="hidden")
    page.select_option("#exclude-seen", "false")
    page.locator("#recommended > li").nth(28).wait_for()
    assert "Título 5" in recommended(page)


def test_a_filter_filters_and_its_mistakes_are_told_where_they_are(page: Any) -> None:
    add(page, "Título 5")
    page.fill("#filter", '{"field": ')
    page.get_by_text("Not JSON").wait_for()
    page.fill("#filter", '{"all": [{"field": "price", "lte": 3}, {"field": "colour", "eq": "red"}]}')
    page.get_by_text("/filter/all/1/field: no such field of the items; fields: ").wait_for()
    page.fill("#filter", '{"field": "price", "lte": 3}')
    page.locator("#filter-error").wait_for(state="hidden")
    assert sorted(recommended(page)) == [HOSTILE, "Título 2", "Título 3"]
    page.fill("#filter", '{"field": "price", "lte": 0}')
    page.get_by_text("No item is left").wait_for()
    page.get_by_text("filter: no item that may be returned meets it").wait_for()


def test_the_explanation_follows_the_history(page: Any) -> None:
    add(page, "Título 5")
    recommended(page)
    assert set(page.locator(".because").all_text_contents()) == {"Título 5 the only event"}
    add(page, "Título 9")
    add(page, HOSTILE)
    recommended(page)
    chips = page.locator(".chip").all_text_contents()
    assert {chip.rpartition(" +")[0] for chip in chips} == {"Título 5", "Título 9", HOSTILE}
    page.locator(".ranked").first.hover()
    lit = page.locator("#history > li").evaluate_all("rows => rows.map((row) => row.style.getPropertyValue('--lit'))")
    assert max(map(float, lit)) == 1


def test_similar_items_can_be_added(page: Any) -> None:
    page.get_by_label("Items similar to Título 2").click()
    assert page.locator("#similar-title").text_content() == "Similar to Título 2"
    titles = page.locator("#similar-items .title")
    titles.nth(9).wait_for()
    first = titles.first.text_content()
    assert "Título 2" not in titles.all_text_contents()
    page.locator("#similar-items").get_by_label(f"Add {first} to the history").click()
    page.keyboard.press("Escape")
    assert history(page) == [first]
    assert page.locator("#similar").is_hidden()


def test_the_keyboard_is_enough(page: Any) -> None:
    page.keyboard.press("/")
    page.keyboard.type("TITULO 1")
    page.wait_for_function("() => document.querySelector('#found').textContent.endsWith('found')")
    with page.expect_response("**/v1/recommend"):
        page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert history(page) == ["Título 10", "Título 11"]
    page.get_by_label("Move Título 11 up").focus()
    page.keyboard.press("Enter")
    assert history(page) == ["Título 11", "Título 10"]
    assert page.evaluate("document.activeElement.dataset.focus") == "down-0"
    page.get_by_label("Remove Título 11").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert history(page) == []
    assert page.evaluate("document.activeElement.id") == "history-title"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_phone(page: Any, scheme: str) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme=scheme)
    add(page, "Título 5")
    recommended(page)
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    ratio, where = page.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 19, 24)"
    assert dark == (scheme == "dark")


def test_large_whole_numbers_keep_their_digits(page: Any) -> None:
    text = '{"a":1152921504606846977,"b":[-9007199254740993,1.5e300,7]}'
    script = """async (text) => {
      const {read, idText} = await import(new URL("playground/api.js", document.baseURI));
      return [JSON.stringify(read(text)), idText(read(text).a)];
    }"""
    assert page.evaluate(script, text) == [text.replace("1.5e300", "1.5e+300"), "1152921504606846977"]


def test_a_key_is_asked_for_and_kept_in_memory_alone(
    browser: Any, tiny_bundle: Bundle, free_port: int, tmp_path: Any
) -> None:
    file = KeyFile(str(tmp_path / "keys.json"))
    secret = file.add("page")
    service = Service("shop", ServedModel(Recommender(tiny_bundle), "shop", "champion", 4))
    service.warm_up()
    settings = ServeConfig(keys={"required": "always", "file": file.location})
    with serving(build_application(service, True, settings), free_port):
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{free_port}")
        page.get_by_text("This path asks for a key").wait_for()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.get_by_text("unknown, revoked or expired").wait_for()
        page.fill("#key", secret)
        page.get_by_role("button", name="Use key").click()
        page.locator("#results button").first.wait_for()
        page.locator("#recommended > li").first.wait_for()
        page.locator("#key-form").wait_for(state="hidden")
        assert page.locator("#banner").is_hidden()
        assert page.locator("#key").input_value() == ""
        assert (
            page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])") == '[{},{},""]'
        )
        assert page.evaluate("location.href") == f"http://127.0.0.1:{free_port}/"
        page.close()
