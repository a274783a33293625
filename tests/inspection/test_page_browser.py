"""The report in a real browser, opened from disk: everything works, nothing is fetched, nothing is complained about."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from pared.inspection.ledger import Row
from pared.inspection.page import page
from tests.inspection.browser import INSTALLED, start
from tests.inspection.pages import HOSTILE, full

LIMIT = 3_000_000  # bytes of the page of a model of 1,000 layers

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    if not INSTALLED:
        missing = "chromium and chromedriver are not installed: run `make browser`"
        if os.environ.get("CI"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    driver = start(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("report") / "report.html"
    hostile = Row(HOSTILE, (3, 3), "float32", 36, HOSTILE, original=("float32", 36))
    page.write(full(30, (hostile,)), found)
    return found


@pytest.fixture
def opened(browser: webdriver.Chrome, path: Path) -> Iterator[webdriver.Chrome]:
    """The page, freshly opened; afterwards nothing may have been fetched or complained about."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # type: ignore[no-untyped-call]  # selenium's
    prefer(browser, "light")
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]  # selenium's
    assert requests(browser) == {path.as_uri()}


def requests(browser: webdriver.Chrome) -> set[str]:
    """What pages asked for since the log was last read; the browser's own, which it begins with, do not count."""
    entries = browser.get_log("performance")  # type: ignore[no-untyped-call]  # selenium's
    messages = [json.loads(entry["message"])["message"] for entry in entries]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = {one["request"]["url"] for one in sent if not one["documentURL"].startswith("chrome://")}
    return {url for url in urls if not url.startswith("data:")}


def prefer(browser: webdriver.Chrome, theme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def head(browser: webdriver.Chrome, title: str) -> WebElement:
    return browser.find_element(By.XPATH, f"//table[@id='rows']/thead//th[normalize-space()='{title}']")


def column(browser: webdriver.Chrome, title: str) -> list[str]:
    """The cells of the rows that are shown."""
    script = """
        const heads = [...document.querySelectorAll("#rows thead th")];
        const at = heads.findIndex((head) => head.textContent === arguments[0]);
        return [...document.querySelectorAll("#rows tbody tr")].filter((row) => row.offsetParent !== null)
            .map((row) => row.cells[at].textContent);
    """
    found: list[str] = browser.execute_script(script, title)
    return found


def ground(browser: webdriver.Chrome) -> str:
    return str(browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color"))


def test_all_rows_are_shown_in_the_order_of_the_file(opened: webdriver.Chrome) -> None:
    assert column(opened, "tensor") == [row.name for row in full(30, (Row(HOSTILE, (3, 3), "f", 0),)).ledger.rows]
    assert opened.find_element(By.ID, "count").text.startswith("63 of 63 rows, ")


def test_a_click_on_a_head_sorts_and_another_one_turns_round(opened: webdriver.Chrome) -> None:
    before = column(opened, "tensor")
    for order in ("descending", "ascending"):
        head(opened, "bytes").find_element(By.TAG_NAME, "button").click()
        assert head(opened, "bytes").get_attribute("aria-sort") == order
        sizes = [int(cell.replace(",", "")) for cell in column(opened, "bytes")]
        assert sizes == sorted(sizes, reverse=order == "descending")
    head(opened, "tensor").find_element(By.TAG_NAME, "button").click()
    assert head(opened, "bytes").get_attribute("aria-sort") is None
    assert sorted(column(opened, "tensor")) == sorted(before)
    names = [name for name in column(opened, "tensor") if name.endswith(".weight")]
    assert names == [f"blocks.{i}.layers.{j}.projection.weight" for i in range(3) for j in range(10)]


@pytest.mark.parametrize(
    ("title", "key"),
    [
        ("shape", lambda cell: eval(cell.replace("x", "*")) if cell else 0),  # our own made-up shapes
        ("damage", lambda cell: float(cell or "-inf")),
        ("ms", lambda cell: float(cell or "-inf")),
        ("input", lambda cell: (lambda low, high: high - low)(*map(float, cell.split(" to "))) if cell else -1),
    ],
)
def test_every_kind_of_column_sorts_by_value(opened: webdriver.Chrome, title: str, key: Any) -> None:
    head(opened, title).find_element(By.TAG_NAME, "button").click()
    values = [key(cell) for cell in column(opened, title)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) > 1


def test_search_shows_what_matches_every_word(opened: webdriver.Chrome) -> None:
    search = opened.find_element(By.ID, "search")
    search.send_keys("blocks.1 WEIGHT")
    assert column(opened, "tensor") == [f"blocks.1.layers.{i}.projection.weight" for i in range(10)]
    assert opened.find_element(By.ID, "count").text.startswith("10 of 63 rows, ")
    search.clear()
    search.send_keys("^layers")
    assert column(opened, "tensor") == []


def test_left_in_float_is_a_filter_and_joins_the_search(opened: webdriver.Chrome) -> None:
    opened.find_element(By.ID, "left").click()
    assert set(column(opened, "format")) == {"float32", "float16"}
    opened.find_element(By.ID, "search").send_keys("weight")
    assert column(opened, "tensor") == [f"blocks.{i}.layers.9.projection.weight" for i in range(3)]
    opened.find_element(By.ID, "left").click()
    assert len(column(opened, "tensor")) == 30


def test_a_tile_shows_its_tensors(opened: webdriver.Chrome) -> None:
    tile = opened.find_element(By.CSS_SELECTOR, "[data-find='^blocks.1.layers.9.projection.'] path")
    ActionChains(opened).move_to_element(tile).click().perform()
    assert column(opened, "tensor") == [f"blocks.1.layers.9.projection.{part}" for part in ("weight", "bias")]


@pytest.mark.parametrize(("preferred", "other"), [("light", "Dark"), ("dark", "Light")])
def test_the_theme_is_the_readers_and_can_be_switched(opened: webdriver.Chrome, preferred: str, other: str) -> None:
    prefer(opened, preferred)
    button = opened.find_element(By.ID, "theme")
    grounds = [ground(opened)]
    assert button.text == f"{other} theme"
    for _ in range(2):
        button.click()
        grounds.append(ground(opened))
    assert grounds[0] == grounds[2] != grounds[1]
    assert ("rgba(245, 247, 249, 1)" in grounds[0]) == (preferred == "light")


def test_the_keyboard_is_enough(opened: webdriver.Chrome) -> None:
    keys = ActionChains(opened)
    keys.send_keys(Keys.TAB).perform()
    assert opened.switch_to.active_element.text == "To the table of tensors"
    keys.send_keys(Keys.ENTER).perform()
    names = []
    for _ in range(12):
        keys.send_keys(Keys.TAB).perform()
        active = opened.switch_to.active_element
        names.append(active.get_attribute("aria-label") or active.get_attribute("id") or active.text)
        if names[-1] == "bytes":
            break
    assert names[:3] == ["search", "left", "Tensors"]
    assert active.value_of_css_property("outline-style") == "solid", "the focus is seen"
    keys.send_keys(Keys.ENTER).perform()
    assert head(opened, "bytes").get_attribute("aria-sort") == "descending"


def test_a_hostile_name_is_only_text(opened: webdriver.Chrome) -> None:
    assert HOSTILE in column(opened, "tensor")
    assert opened.find_elements(By.TAG_NAME, "img") == []


def test_a_narrow_window_does_not_scroll_sideways(opened: webdriver.Chrome) -> None:
    metrics = {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    script = "return document.documentElement.scrollWidth"
    assert opened.execute_script(script) <= 375
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_print_is_light_and_has_no_controls(opened: webdriver.Chrome) -> None:
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    assert ground(opened) == "rgba(255, 255, 255, 1)"
    for selector in ("#theme", "nav", ".tools"):
        assert not opened.find_element(By.CSS_SELECTOR, selector).is_displayed()
    region = opened.find_element(By.CSS_SELECTOR, ".tall")
    assert region.value_of_css_property("overflow") == "visible", "the table is not cut"
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_a_thousand_layers_make_a_page_that_works(browser: webdriver.Chrome, tmp_path: Path) -> None:
    found = tmp_path / "report.html"
    page.write(full(1000), found)
    assert found.stat().st_size < LIMIT
    browser.get(found.as_uri())
    assert browser.find_element(By.ID, "count").text.startswith("2,002 of 2,002 rows, ")
    browser.find_element(By.ID, "search").send_keys("blocks.99. weight")
    assert len(column(browser, "tensor")) == 10
    head(browser, "damage").find_element(By.TAG_NAME, "button").click()
    assert head(browser, "damage").get_attribute("aria-sort") == "descending"
