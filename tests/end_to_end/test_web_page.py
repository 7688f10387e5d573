"""The page that runs a model in the browser (export.targets: [web]), as a person uses it."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image

from pipeline.export.targets import PAGE, VENDORED
from pipeline.golden import MOST_ABS
from tests import browser as parts
from tests.browser import Browser, browser
from tests.photos import golden_photos
from tests.processes import shardline, wait_until
from tests.web import web_server

if TYPE_CHECKING:
    from playwright.sync_api import Locator
    from playwright.sync_api import Page as Tab

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(bool(parts.missing_parts()), reason=f"a browser test needs {parts.missing_parts()}")


@pytest.fixture(scope="module")
def vendored() -> None:
    """What `make web` fetches, beside the page."""
    if all((PAGE / name).is_file() for name in VENDORED):
        return
    if shutil.which("npm") is None:
        pytest.skip("onnxruntime-web is not there, and no npm to fetch it with")
    subprocess.run(["make", "web"], cwd=REPOSITORY, check=True, capture_output=True, timeout=250)


@pytest.fixture(scope="module")
def exported(
    vendored: None, workspace: Path, chain: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A folder with the digits' run, and what `export` said when it was asked for both targets."""
    folder = tmp_path_factory.mktemp("exported")
    for name in ("data/digits", "runs/digits"):
        shutil.copytree(workspace / name, folder / name)
    done = shardline("export", "--export.targets=[web,triton]", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def export_dir(exported: tuple[Path, str]) -> Path:
    return exported[0] / "runs/digits/export"


@dataclass
class Page:
    """The page of the digits in a browser, and what it complains of."""

    browser: Browser
    url: str
    complaints: list[str]


@pytest.fixture(scope="module")
def served(export_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A browser, and a plain file server with the page."""
    with web_server(export_dir / "web") as port, browser(tmp_path_factory.mktemp("screenshots")) as started:
        complaints = list[str]()
        started.page.on("console", lambda message: complaints.append(message.text))
        yield Page(started, f"http://127.0.0.1:{port}/", complaints)


@pytest.fixture
def opened(served: Page) -> Iterator[Browser]:
    """The page, ready for photos; it may ask nobody else for anything, and complain of nothing."""
    served.browser.page.goto("about:blank")
    for kept in (served.browser.outside, served.browser.errors, served.complaints):
        kept.clear()  # what earlier tests provoked
    see(served.browser.open(served.url).locator("#ways"))
    yield served.browser
    assert served.browser.outside == []
    assert served.browser.errors == []
    assert served.complaints == []


def see(locator: "Locator") -> "Locator":
    """Wait until it can be seen."""
    from playwright.sync_api import expect

    expect(locator).to_be_visible()
    return locator


def choose(page: "Tab", *photos: Path) -> list["Locator"]:
    """Give photos to the page, and return a card for each, answered, in the order of the photos."""
    page.locator("#files").set_input_files(photos)
    return [answered(page, photo.name) for photo in photos]


def answered(page: "Tab", name: str) -> "Locator":
    """The card of a photo, once it has an answer or a complaint."""
    from playwright.sync_api import expect

    card = page.locator(".answer").filter(has_text=name)
    expect(card.locator(".label")).not_to_have_text("Looking")
    return card


# ---- making it ----


def test_the_targets_alone_are_made_anew_when_only_they_changed(exported: tuple[Path, str], workspace: Path) -> None:
    folder, said = exported
    assert said.startswith("targets made")
    assert "python3 -m http.server --directory runs/digits/export/web" in said
    models = [folder / "runs/digits/export" / path for path in ("model.onnx", "web/model.onnx", "triton/digits/1/model.onnx")]
    earlier = (workspace / "runs/digits/export/model.onnx").read_bytes()
    assert all(path.read_bytes() == earlier for path in models)
    again = shardline("export", "--export.targets=[triton,web]", cwd=folder)
    assert again.stdout.startswith("export: nothing to do")
    (folder / "runs/digits/export/web/app.js").write_text("// cut short")
    mended = shardline("export", "--export.targets=[triton,web]", cwd=folder)
    assert mended.stdout.startswith("targets made")
    assert (folder / "runs/digits/export/web/app.js").read_bytes() == (PAGE / "app.js").read_bytes()


def test_a_target_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    done = shardline("export", "--export.targets=[wob]", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "`export.targets`: Expected a one of ['triton', 'web']. Got value: wob." in done.stderr


# ---- the same answers ----


def test_the_same_tensor_has_the_same_probabilities_as_in_onnxruntime(opened: Browser, export_dir: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)  # (N, 3, H, W)
    session = onnxruntime.InferenceSession(str(export_dir / "model.onnx"), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(["probabilities"], {"image": images})  # (N, K)
    script = "async (values) => [...await shardline.ask(Uint8Array.from(values), values.length / 768)]"
    found = np.array(opened.page.evaluate(script, images.ravel().tolist())).reshape(wanted.shape)
    # Float32 sums in another order, as on any other machine.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=MOST_ABS["fp32"])


def test_photos_of_awkward_kinds_have_the_answers_of_predict(opened: Browser, export_dir: Path, tmp_path: Path) -> None:
    photos = golden_photos(export_dir / "golden.npz", tmp_path)
    said = shardline("predict", str(export_dir / "model.onnx"), *map(str, photos), "--json", cwd=tmp_path)
    wanted: list[dict[str, Any]] = json.loads(said.stdout)
    for answer, card in zip(wanted, choose(opened.page, *photos), strict=True):
        bars = card.locator(".bars li").all_inner_texts()
        assert card.locator(".label").inner_text() == answer["label"], answer["image"]
        label, number = bars[0].split("\n")
        # One decimal of a percentage, and a level of 255 in the alpha of one photo.
        assert label == answer["label"]
        assert float(number.removesuffix(" %")) == pytest.approx(100 * answer["probability"], abs=0.2)
        assert len(bars) == 5
    opened.page.screenshot(path=opened.screenshots / "page.png", full_page=True)


def test_the_page_says_what_the_model_is(opened: Browser, export_dir: Path) -> None:
    metadata = {entry.key: entry.value for entry in onnx.load(export_dir / "model.onnx").metadata_props}
    facts = opened.page.locator("#facts").inner_text()
    assert opened.page.title() == "digits"
    for fact in ("10: 0, 1, 2", "16 x 16 pixels", metadata["shardline.data_digest"][:12], metadata["shardline.job_id"]):
        assert fact in facts
    if "shardline.metrics" in metadata:
        accuracy = json.loads(metadata["shardline.metrics"])["accuracy"]
        assert f"{100 * accuracy:.1f} %" in facts


def test_every_label_of_a_half_or_more_is_an_answer_where_an_image_has_several(
    opened: Browser, export_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(export_dir / "web", tmp_path / "colours")
    onnx.save(colour_model(), folder / "model.onnx")
    Image.new("RGB", (40, 30), (250, 240, 5)).save(tmp_path / "yellow.png")
    Image.new("RGB", (40, 30), (5, 5, 5)).save(tmp_path / "black.png")
    with web_server(folder) as port:
        page = opened.open(f"http://127.0.0.1:{port}/")
        see(page.locator("#ways"))
        yellow, black = choose(page, tmp_path / "yellow.png", tmp_path / "black.png")
        assert yellow.locator(".label").inner_text() == "red, green"
        assert yellow.locator(".bars .chosen").count() == 2
        assert black.locator(".label").inner_text() == "none of the labels"
        facts = page.locator("#facts").inner_text()
        for fact in ("every label that fits", "12.3 % on 4,567 images of test", "int8", "CC-BY-4.0"):
            assert fact in facts


def colour_model() -> onnx.ModelProto:
    """A model with several labels an image: which of red, green and blue are bright."""
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        helper.make_node("Sub", ["means", "half"], ["shifted"]),
        helper.make_node("Mul", ["shifted", "steepness"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["probabilities"]),
    ]
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
        helper.make_tensor("half", TensorProto.FLOAT, [], [127.5]),
        helper.make_tensor("steepness", TensorProto.FLOAT, [], [0.05]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 3, 8, 8])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("logits", "probabilities")]
    graph = helper.make_graph(nodes, "colours", [image], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    spec = {"resize": 10, "crop": [8, 8], "interpolation": "bicubic", "antialias": True, "resize_mode": "torchvision"}
    metadata = {
        "format_version": "1",
        "class_names": json.dumps(["red", "green", "blue"]),
        "task": "multi",
        "preprocess": json.dumps({**spec, "background": [255, 255, 255]}),
        "metrics": json.dumps({"split": "test", "num_samples": 4567, "accuracy": 0.1234}),
        "precision": "int8",
        "license": "CC-BY-4.0",
    }
    helper.set_model_props(model, {f"shardline.{key}": value for key, value in metadata.items()})
    return model


# ---- using it ----


def test_a_damaged_file_is_a_message_and_the_next_photo_an_answer(opened: Browser, export_dir: Path, tmp_path: Path) -> None:
    whole = next(path for path in golden_photos(export_dir / "golden.npz", tmp_path) if path.stem == "jpeg")
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(whole.read_bytes()[:-40])
    complaint, answer = choose(opened.page, damaged, whole)
    assert complaint.locator(".label").inner_text().startswith("This is not a whole image")
    assert complaint.locator(".bars li").count() == 0
    assert answer.locator(".bars li").count() == 5


def test_photos_are_shown_and_the_page_lets_go_of_their_files(opened: Browser, export_dir: Path, tmp_path: Path) -> None:
    opened.page.evaluate("""() => {
      const revoke = URL.revokeObjectURL.bind(URL);
      window.revoked = [];
      URL.revokeObjectURL = (url) => { window.revoked.push(url); revoke(url); };
    }""")
    (tmp_path / "text.jpg").write_text("not an image")
    cards = choose(opened.page, *golden_photos(export_dir / "golden.npz", tmp_path), tmp_path / "text.jpg")
    photos = [card.locator(".photo") for card in cards]
    urls = sorted(str(photo.get_attribute("src")) for photo in photos)
    wait_until(lambda: sorted(opened.page.evaluate("window.revoked")) == urls, "every photo to be loaded or refused")
    assert [photo.evaluate("(photo) => photo.naturalWidth > 0") for photo in photos] == [True] * (len(photos) - 1) + [False]


def test_photos_may_be_dropped_and_pasted(opened: Browser, export_dir: Path, tmp_path: Path) -> None:
    photo = golden_photos(export_dir / "golden.npz", tmp_path)[0]
    script = """([event, name, bytes]) => {
      const data = new DataTransfer();
      data.items.add(new File([Uint8Array.from(bytes)], name));
      const more = event === "paste" ? { clipboardData: data } : { dataTransfer: data };
      const Kind = event === "paste" ? ClipboardEvent : DragEvent;
      document.body.dispatchEvent(new Kind(event, { bubbles: true, cancelable: true, ...more }));
    }"""
    for event in ("drop", "paste"):
        opened.page.evaluate(script, [event, f"{event}ped.png", list(photo.read_bytes())])
        assert answered(opened.page, f"{event}ped.png").locator(".bars li").count() == 5


def test_the_keyboard_reaches_the_photos_and_shows_where_it_is(opened: Browser) -> None:
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.id") == "files"
    button = opened.page.locator(".button").first
    assert button.evaluate("(element) => getComputedStyle(element).outlineStyle") == "solid"


def test_the_same_photo_may_be_chosen_twice(opened: Browser, export_dir: Path, tmp_path: Path) -> None:
    photo = golden_photos(export_dir / "golden.npz", tmp_path)[0]
    choose(opened.page, photo)
    opened.page.locator("#files").set_input_files(photo)
    see(opened.page.locator(".answer").nth(1))


def test_a_photo_of_24_megapixels_does_not_freeze_the_page(opened: Browser, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(rows).resize((6000, 4000)).save(tmp_path / "large.jpg", quality=90)
    content = (tmp_path / "large.jpg").read_bytes()
    script = """async () => {
      let longest = 0;
      let last = performance.now();
      const timer = setInterval(() => { longest = Math.max(longest, performance.now() - last); last = performance.now(); }, 5);
      const photo = await (await fetch("large.jpg")).blob();
      const started = performance.now();
      const { size } = await shardline.classify(photo);
      clearInterval(timer);
      return { longest, size, taken: performance.now() - started };
    }"""
    opened.page.route("**/large.jpg", lambda route: route.fulfill(body=content))
    found = opened.page.evaluate(script)
    assert found["size"] == [6000, 4000]
    # Measured: 28 ms, of the second that the worker takes; on the page's own thread it would stand still for all of it.
    assert found["longest"] < min(400, 0.6 * found["taken"]), found


def test_a_phone_has_a_camera_and_no_sideways_scrolling(opened: Browser, export_dir: Path, tmp_path: Path) -> None:
    started = opened.page.context.browser
    assert started is not None
    phone = started.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = phone.new_page()
    page.goto(opened.page.url)
    see(page.get_by_text("Take a photo"))
    assert page.locator("#camera").get_attribute("capture") == "environment"
    choose(page, *golden_photos(export_dir / "golden.npz", tmp_path)[:3])
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.screenshot(path=opened.screenshots / "page-phone.png")
    phone.close()


# ---- where it cannot work ----


def test_opened_as_a_file_it_says_what_to_do(served: Page, export_dir: Path) -> None:
    page = served.browser.open((export_dir / "web/index.html").as_uri())
    see(page.get_by_text("This page has to be served."))
    see(page.get_by_text("python3 -m http.server 8000 --bind 127.0.0.1"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (None, r"model\.onnx is missing beside this page \(404\)\. Export the model again\."),
        (b"no model", r"model\.onnx is not an ONNX file"),
        (b"", r"model\.onnx is not a Shardline model"),
    ],
    ids=["missing", "foreign", "empty"],
)
def test_without_a_model_it_says_so(damage: bytes | None, reason: str, served: Page, export_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(export_dir / "web", tmp_path / "web")
    (folder / "model.onnx").unlink()
    if damage is not None:
        (folder / "model.onnx").write_bytes(damage)
    with web_server(folder) as port:
        notice = see(served.browser.open(f"http://127.0.0.1:{port}/").locator("#notice.problem"))
        assert re.search(f"^The model cannot be run here. {reason}", notice.inner_text())
