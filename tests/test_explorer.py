"""The explorer: its numbers are the model's, it asks for nothing, and it answers clicks and keys in a real browser."""

import json
import re
import time
import zlib
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lape
from lape.look.explorer.pack import rows
from lape.look.explorer.page import explore
from lape.look.probe import attention

CHROMIUM = Path("/usr/bin/chromium")
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 4}
HOSTILE = '</script><script>document.title="taken"</script>&"<img src=x>'


def model_with(join: str, pe: str, name: str = "vit_tiny_patch16_224", **kwargs: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = lape.create_model(name, join, pe, **{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "<b>photo.png"
    noise = torch.randint(0, 256, (40, 52, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(path)
    return path


def contents(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found
    return json.loads(found[1])


def unpack(text: str, kind: type) -> np.ndarray:
    return np.frombuffer(zlib.decompress(b64decode(text)), kind)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("join", ["basic", "unshare", "LaPE"])
def test_maps_are_the_correlations(tmp_path: Path, join: str, view: int) -> None:
    model = model_with(join, "learnable", "deit_tiny_distilled_patch16_224", img_size=(16, 48))
    card = contents(explore(model, tmp_path / "e.html"))["models"][0]
    packed = card["maps"][view]
    found = unpack(packed["data"], np.int8).reshape(packed["layers"], -1) / 127
    expected = lape.correlation(model, view=("seen", "unbiased")[view]).numpy()  # type: ignore[arg-type]
    i, j = np.triu_indices(12)
    assert np.abs(found[-3:] - expected[:, i, j]).max() <= 1 / 254 + 1e-6
    assert packed["first"] == (0 if join == "unshare" else -1)
    assert card["grid"] == [2, 6]
    assert all(len(m["values"]) == 3 for m in card["measures"])


def test_biases_and_attention_are_the_models(tmp_path: Path, photo: Path) -> None:
    model = model_with("LaPE", "2D_RPE")
    card = contents(explore(model, tmp_path / "e.html", images=[photo]))["models"][0]
    packed = card["maps"][0]
    bias = lape.position_bias(model).detach().numpy()
    found = unpack(packed["data"], np.int8).reshape(bias.shape) * packed["limit"] / 127
    assert np.abs(found - bias).max() <= packed["limit"] / 254 + 1e-6
    weights = card["attention"][0]
    levels = unpack(weights["data"], np.uint8).reshape(3, 2, 17, 17) / 255
    peaks = unpack(weights["peaks"], np.float32).reshape(3, 2, 17, 1)
    from lape.look.explorer.card import photo as as_seen

    expected = attention(model, as_seen(model, photo, None).pixels)[:, 0].numpy()
    assert np.abs(levels * peaks - expected).max() < 1e-2 * expected.max()


def test_what_does_not_fit_is_kept_for_fewer_queries() -> None:
    maps = np.random.default_rng(0).random((2, 2, 36, 36)).astype(np.float32)
    whole, coarse = rows(maps, (6, 6), 10**9, signed=False), rows(maps, (6, 6), 3000, signed=False)
    assert whole["queries"] == [[0, 1, 2, 3, 4, 5]] * 2
    assert len(coarse["data"]) <= 3000
    kept = [r * 6 + c for r in coarse["queries"][0] for c in coarse["queries"][1]]
    levels = unpack(coarse["data"], np.uint8).reshape(2, 2, len(kept), 36) / 255
    peaks = unpack(coarse["peaks"], np.float32).reshape(2, 2, len(kept), 1)
    assert np.abs(levels * peaks - maps[:, :, kept]).max() < 1 / 255


@pytest.mark.parametrize(
    ("name", "size", "layers"), [("vit_large_patch16_224", 256, 24), ("deit_tiny_patch16_224", 384, 12)]
)
def test_large_models_stay_under_six_megabytes(tmp_path: Path, name: str, size: int, layers: int) -> None:
    model = lape.create_model(name, "LaPE", img_size=size, embed_dim=64, num_heads=4, depth=layers, num_classes=2)
    assert explore(model, tmp_path / "e.html").stat().st_size < 6_000_000


# --- safety -----------------------------------------------------------------------------------------------------------


def test_names_cannot_become_tags_and_nothing_is_loaded(tmp_path: Path, photo: Path) -> None:
    page = explore({HOSTILE: model_with("LaPE", "learnable")}, tmp_path / "e.html", images=[photo], title=HOSTILE)
    text = page.read_text()
    assert "<script>document.title" not in text
    assert "<b>photo" not in text
    assert text.count("</script>") == 2
    assert contents(page)["models"][0]["name"] == HOSTILE
    assert "default-src 'none'" in text
    assert not re.search(
        r"""(src|href)=["'](?!data:)|@import|url\(""",
        re.sub(r'<script type="application/json".*', "", text, flags=re.S),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": ["absent.png"]}, r"absent\.png"),
        ({"images": ["absent.png"] * 9}, "8 at most"),
        ({"images": ["absent.png"], "size": 64}, "leave one of them out"),
        ({"size": 33}, "no multiple of the patch"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(lape.LapeError, match=message) as caught:
        explore(model_with("LaPE", "learnable"), tmp_path / "e.html", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_wrong_models_and_folders_are_one_line(tmp_path: Path) -> None:
    model = model_with("LaPE", "learnable")
    for models, path, message in (
        (torch.nn.Linear(2, 2), "e.html", "not converted"),
        (model_with("basic", "none"), "e.html", "nothing to show"),
        ([], "e.html", "no model"),
        (tmp_path / "absent.pth", "e.html", "no such checkpoint"),
        (model, "absent/e.html", "no folder"),
    ):
        with pytest.raises(lape.LapeError, match=message):
            explore(models, tmp_path / path)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(lape.LapeError, match="not an image"):
        explore(model, tmp_path / "e.html", images=[tmp_path / "text.png"])
    assert not (tmp_path / "e.html").exists()


def test_checkpoints_and_folders_side_by_side(tmp_path: Path) -> None:
    model = model_with("LaPE", "learnable", img_size=64)
    lape.save(model, tmp_path / "saved")
    page = explore([tmp_path / "saved", model, model], tmp_path / "e.html")
    names = [card["name"] for card in contents(page)["models"]]
    assert names == ["saved", "VisionTransformer LaPE", "VisionTransformer LaPE (2)"]


@pytest.mark.slow
def test_the_command_draws_and_explores_several(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lape.cli import app as cli

    saved = [str(lape.save(model_with(join, "2D_sin", depth=1), tmp_path / join)) for join in ("basic", "LaPE")]
    page = tmp_path / "e.html"
    flags = ["--save-dir", str(tmp_path / "pictures"), "--html", str(page), "--image", str(photo), "--view", "unbiased"]
    assert cli.run(cli.app, ["visualize", *saved, *flags]) == 0
    assert str(page) in capsys.readouterr().out
    assert [card["join"] for card in contents(page)["models"]] == ["basic", "LaPE"]
    assert len(contents(page)["images"]) == 1
    assert (tmp_path / "pictures" / "comparison_centre.svg").exists()
    assert cli.run(cli.app, ["visualize", saved[0], "--html", str(tmp_path / "absent" / "e.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visit:
    """An open page, everything that it complained about, and everything that it asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any):
        self.page = browser.new_page(**options)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", timeout=20_000)

    def state(self, name: str) -> Any:
        return self.page.evaluate(f"lape.state.{name}")

    def values(self, card: int, layer: int) -> np.ndarray:
        return np.array(self.page.evaluate(f"Array.from(lape.shown(lape.cards[{card}], {layer}).values)"))

    def click_at(self, selector: str, row: int, column: int, grid: tuple[int, int]) -> None:
        box = self.page.locator(selector).bounding_box()
        self.page.mouse.click(
            box["x"] + (column + 0.5) * box["width"] / grid[1], box["y"] + (row + 0.5) * box["height"] / grid[0]
        )

    def end(self) -> None:
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert sum(url.startswith("file:") for url in self.requests) == 1
        self.page.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.nn.Module]]:
    folder = tmp_path_factory.mktemp("two")
    Image.effect_noise((64, 64), 60).convert("RGB").save(folder / "photo.png")
    models = [model_with("LaPE", "learnable"), model_with("basic", "2D_sin", depth=2)]
    page = explore({HOSTILE: models[0], "basic": models[1]}, folder / "two.html", images=[folder / "photo.png"])
    return page, models


@pytest.mark.browser
def test_clicks_and_keys_choose_patch_and_layer(browser: Any, two: tuple[Path, list[torch.nn.Module]]) -> None:
    path, models = two
    expected = [lape.correlation(model).numpy() for model in models]
    visit = Visit(browser, path)
    assert visit.page.title() == "What position became"
    visit.click_at("#picker", 2, 3, (4, 4))
    assert [visit.state("row"), visit.state("column")] == [2, 3]
    for card in range(2):
        for layer in range(2):
            assert np.abs(visit.values(card, layer) - expected[card][layer][11]).max() < 1 / 250
    visit.click_at("article:nth-of-type(2) .big canvas", 1, 0, (4, 4))
    assert [visit.state("row"), visit.state("column")] == [1, 0]
    for key, row, column in (("ArrowDown", 2, 0), ("ArrowRight", 2, 1), ("ArrowUp", 1, 1), ("ArrowLeft", 1, 0)):
        visit.page.keyboard.press(key)
        assert [visit.state("row"), visit.state("column")] == [row, column]
    visit.page.keyboard.press("ArrowLeft")
    assert visit.state("column") == 0
    for key, layer in (("]", 1), ("]", 2), ("]", 2), ("[", 1)):
        visit.page.keyboard.press(key)
        assert visit.state("layer") == layer
    visit.page.locator(".tile", has_text="table P").first.click()
    assert visit.state("layer") == -1
    assert visit.page.locator("#layer-name").inner_text() == "table P"
    visit.page.locator("#layer").fill("2")
    assert "this model has 2" in visit.page.locator(".readout").nth(1).inner_text()
    visit.page.get_by_role("button", name="corner").click()
    assert [visit.state("row"), visit.state("column")] == [0, 0]
    assert "row 0, column 0" in visit.page.locator("#picker").get_attribute("aria-label")
    visit.end()


@pytest.mark.browser
def test_pixels_have_the_colours_of_the_numbers(browser: Any, two: tuple[Path, list[torch.nn.Module]]) -> None:
    from matplotlib import colormaps

    path, models = two
    visit = Visit(browser, path)
    visit.click_at("#picker", 0, 0, (4, 4))
    shown = visit.page.evaluate(
        "(() => { const c = lape.cards[1].big, k = c.width / 4;"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "const at = (j) => 4 * (Math.floor((Math.floor(j / 4) + .5) * k) * c.width + Math.floor((j % 4 + .5) * k));"
        "return [5, 10, 15].map((j) => [...d.slice(at(j), at(j) + 4)]) })()"
    )
    values = lape.correlation(models[1])[0, 0, [5, 10, 15]].numpy()
    expected = np.array(colormaps["RdBu_r"]((values + 1) / 2)) * 255
    assert np.abs(np.array(shown) - expected).max() < 6
    visit.end()


@pytest.mark.browser
def test_attention_hover_measures_and_theme(browser: Any, two: tuple[Path, list[torch.nn.Module]]) -> None:
    path, _ = two
    visit = Visit(browser, path, color_scheme="dark")
    page = visit.page
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.locator("#theme").click()
    assert page.evaluate(background) != dark
    page.locator("[data-show=attention]").click()
    mean = visit.values(0, 0)
    page.locator("#head").select_option("1")
    one = visit.values(0, 0)
    page.locator("#head").select_option("0")
    assert np.allclose((visit.values(0, 0) + one) / 2, mean, atol=1e-6)
    assert not np.allclose(one, mean, atol=1e-4)
    assert (
        page.locator("#legend").get_attribute("aria-label")
        == "Colours: attention to each patch, 0 to the strongest in each map"
    )
    page.locator("[data-show=position]").click()
    page.locator(".big canvas").first.hover()
    assert re.search(r"patch \(1, 1\) and \(\d, \d\): -?\d\.\d\d", page.locator(".readout").first.inner_text())
    page.locator("#view").select_option("1")
    assert visit.state("view") == 1
    assert page.locator(".chart h3", has_text="locality radius").count() == 1
    page.locator(".chart svg").first.hover()
    assert "layer" in page.locator(".now").first.inner_text()
    page.locator("[data-photo='-1']").click()
    visit.end()


@pytest.mark.browser
def test_a_phone_window_and_a_resize(browser: Any, two: tuple[Path, list[torch.nn.Module]]) -> None:
    visit = Visit(browser, two[0], viewport={"width": 375, "height": 720}, has_touch=True, device_scale_factor=2)
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert visit.page.evaluate(overflow) <= 0
    box = visit.page.locator("#picker").bounding_box()
    visit.page.touchscreen.tap(box["x"] + 5, box["y"] + box["height"] - 5)
    assert [visit.state("row"), visit.state("column")] == [3, 0]
    assert visit.page.locator("#layer").bounding_box()["y"] < 720  # the slider is always at hand
    visit.page.set_viewport_size({"width": 1400, "height": 900})
    visit.page.wait_for_timeout(100)
    assert visit.page.evaluate(overflow) <= 0
    visit.end()


@pytest.mark.browser
def test_the_largest_react_at_once(browser: Any, tmp_path: Path) -> None:
    model = lape.create_model(
        "deit_tiny_patch16_224", "LaPE", img_size=384, embed_dim=64, num_heads=4, depth=12, num_classes=2
    )
    visit = Visit(browser, explore(model, tmp_path / "e.html"))
    seconds = []
    for column in (3, 9, 15, 20, 22):
        visit.click_at("#picker", 5, column, (24, 24))
        seconds.append(float(visit.page.evaluate("document.documentElement.dataset.drawn")) / 1000)
        assert visit.state("column") == column
        time.sleep(0.05)
    assert min(seconds) < 0.5  # the quickest of five, and far more than the tenth of a second of an idle machine
    visit.end()
