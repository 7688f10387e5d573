"""What a person sees of a run: the links of `shardline ui`, opened in a real browser."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import browser as parts
from tests.browser import Browser, browser
from tests.processes import children_of, shardline, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Locator

pytestmark = pytest.mark.skipif(bool(parts.missing_parts()), reason=f"a browser test needs {parts.missing_parts()}")

KIND = "?workflowType=machine_learning"


@pytest.fixture(scope="module")
def links(workspace: Path, chain: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What `shardline ui` prints of the digits' run; ^C at the end, after which nothing of it is left."""
    assert shardline("sync", "runs/digits", cwd=workspace).returncode == 0
    said = tmp_path_factory.mktemp("ui") / "said"
    with said.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", "pipeline", "ui", "--port=0"], cwd=workspace, stdout=output)
    try:
        wait_until(lambda: "^C ends it" in said.read_text() or process.poll() is not None, "the links of `shardline ui`")
        assert process.poll() is None
        yield dict(re.findall(r"^  (\w+) +(http://\S+)$", said.read_text(), flags=re.MULTILINE))
        groups = children_of(process.pid)
        assert groups
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert not [group for group in groups if _is_alive(group)]
    finally:
        process.kill()


def _is_alive(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


@pytest.fixture(scope="module")
def opened(links: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser; no page may ask for anything outside this machine, or fail."""
    with browser(tmp_path_factory.mktemp("screenshots")) as started:
        yield started
        assert started.outside == []
        assert started.errors == []


def see(locator: "Locator") -> "Locator":
    """Wait until it can be seen."""
    from playwright.sync_api import expect

    expect(locator.first).to_be_visible()
    return locator.first


def see_picture(locator: "Locator") -> str:
    """Wait until a picture is loaded; return its address."""
    from playwright.sync_api import expect

    expect(locator.first).to_be_visible()
    expect(locator.first).not_to_have_js_property("naturalWidth", 0)
    return str(locator.first.get_attribute("src"))


def test_the_links_are_ours(links: dict[str, str]) -> None:
    assert set(links) == {"training", "comparison", "model"}


def test_curves_of_training_and_validation_are_drawn(opened: Browser, links: dict[str, str]) -> None:
    page = opened.open(links["training"])
    see(page.get_by_placeholder("Search metric charts")).fill("train/loss$|val/accuracy$")
    for legend in ("train/loss", "val/accuracy"):
        see(page.get_by_text(re.compile(rf"\({legend}\)$")))
    see(page.locator(".js-plotly-plot .scatterlayer path"))
    opened.keep("curves")


def test_pictures_are_shown_before_the_first_step_and_later(opened: Browser, links: dict[str, str]) -> None:
    page = opened.open(links["training"])
    see(page.get_by_placeholder("Search metric charts")).fill("val/samples")
    see(page.get_by_role("heading", name="val/samples")).scroll_into_view_if_needed()
    first = see_picture(page.locator("img[src*='val~samples%2Bstep%2B0%2B']"))
    # Each tile has a slider; that of `val/samples` is the last by name.
    page.get_by_role("slider").last.focus()
    page.keyboard.press("ArrowRight")
    later = see_picture(page.locator("img[src*='val~samples']:not([src*='step%2B0%2B'])"))
    assert later != first
    opened.keep("pictures")


def test_runs_are_compared_by_their_charts(opened: Browser, links: dict[str, str]) -> None:
    page = opened.open(links["comparison"])
    see(page.get_by_placeholder("Search metric charts")).fill("val/accuracy$")
    see(page.locator(".js-plotly-plot"))
    see(page.get_by_role("link", name="digits"))
    opened.keep("comparison")


def test_the_worst_mistakes_are_a_table_with_pictures(opened: Browser, links: dict[str, str]) -> None:
    page = opened.open(links["training"].replace(f"/model-metrics{KIND}", f"/artifacts/tables/misclassified.json{KIND}"))
    for column in ("image", "true", "predicted", "confidence"):
        see(page.get_by_role("columnheader", name=column))
    see_picture(page.locator("[role=row] img, tr img"))
    opened.keep("mistakes")


def test_the_data_sets_say_how_many_samples_of_which_class(opened: Browser, links: dict[str, str]) -> None:
    page = opened.open(links["training"].replace("/model-metrics", ""))
    see(page.get_by_text("digits/train")).click()
    drawer = see(page.get_by_role("dialog"))
    for text in ("num samples:", "1069", "class counts:", '"9":108', "image", "binary"):
        see(drawer.get_by_text(text))
    opened.keep("data")


def test_the_model_page_leads_to_a_version_with_alias_and_signature(opened: Browser, links: dict[str, str]) -> None:
    page = opened.open(links["model"])
    # The latest version need not be the candidate: an earlier file that was exported again is.
    candidate = page.get_by_role("row").filter(has_text="candidate")
    see(candidate)
    opened.keep("model")
    candidate.get_by_role("link", name=re.compile("^Version ")).click()
    see(page.get_by_text("Inputs (1)")).click()
    see(page.get_by_text("Tensor (dtype: uint8, shape: [-1,3,16,16])"))
    see(page.get_by_text("Outputs (2)")).click()
    see(page.get_by_text("Tensor (dtype: float32, shape: [-1,10])"))
    see(page.get_by_text("@ candidate"))
    opened.keep("version")
