"""The explorer: its numbers are the model's, it asks for nothing, and it answers clicks and keys in a real browser."""

import json
import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ET
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
from lape.look.explorer.page import SCRIPTS, explore
from lape.look.measures import MEASURES, measure_all
from lape.look.probe import attention
from lape.look.similarity import cosine

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


def test_a_photograph_is_as_large_as_the_model_takes_it(photo: Path) -> None:
    """Whatever the transform in its file says, as of a model that was loaded at another size."""
    from lape.data.augment import EvalTransform
    from lape.look.explorer.card import photo as as_seen

    model = model_with("LaPE", "learnable", img_size=(32, 16))
    assert as_seen(model, photo, EvalTransform(48).to_dict()).pixels.shape == (1, 3, 32, 16)


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
    ("name", "size", "layers"),
    [
        ("vit_large_patch16_224", 256, 24),
        pytest.param("deit_tiny_patch16_224", 384, 12, marks=pytest.mark.slow),
    ],
)
def test_large_models_stay_under_six_megabytes(tmp_path: Path, name: str, size: int, layers: int) -> None:
    model = lape.create_model(name, "LaPE", img_size=size, embed_dim=64, num_heads=4, depth=layers, num_classes=2)
    assert explore(model, tmp_path / "e.html").stat().st_size < 6_000_000


# --- videos -----------------------------------------------------------------------------------------------------------


def video(name: str = "Vivit", **extra: Any) -> torch.nn.Module:
    """Of small videos; ViViT: 4 frames of 3 x 3 patches, 2 layers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"image_size": 24, "num_frames": 8} | extra
    config = getattr(transformers, f"{name}Config")(**sizes)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.fixture(scope="module")
def filmed() -> torch.nn.Module:
    model = lape.apply_(video(tubelet_size=[2, 8, 8]), "LaPE", pe="learnable")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def within(model: torch.nn.Module, frame: int, prefix: int) -> np.ndarray:
    """(L, 9, 9): by numpy from lape.positions, the frame's 9 patches cut out before anything is computed."""
    w = lape.positions(model).detach().double().numpy()[:, prefix + 9 * frame : prefix + 9 * (frame + 1)]
    length = np.linalg.norm(w, axis=-1)
    return np.einsum("lid,ljd->lij", w, w) / (length[:, :, None] * length[:, None, :])


def test_each_frame_of_a_video_is_that_of_the_positions(tmp_path: Path, filmed: torch.nn.Module) -> None:
    page = contents(explore(filmed, tmp_path / "e.html"))
    card = page["models"][0]
    assert (card["grid"], card["frames"]) == ([3, 3], 4)
    packed = card["maps"][0]
    assert packed["frames"] == [0, 1, 2, 3]
    i, j = np.triu_indices(9)
    for frame, text in enumerate(packed["data"].split(" ")):
        found = unpack(text, np.int8).reshape(packed["layers"], -1)[-2:] / 127
        assert np.abs(found - within(filmed, frame, 1)[:, i, j]).max() <= 1 / 254 + 1e-6
    measured = measure_all(lape.correlation(filmed), lape.positions(filmed)[:, 1:].detach(), (4, 3, 3))
    assert [m["label"] for m in card["measures"]] == [MEASURES[name].label for name in measured]
    assert card["measures"][0]["values"] == pytest.approx(next(iter(measured.values())).tolist(), rel=1e-4)


def test_a_video_that_does_not_fit_loses_frames(tmp_path: Path, filmed: torch.nn.Module) -> None:
    whole = contents(explore(filmed, tmp_path / "e.html"))["models"][0]
    coarse = contents(explore(filmed, tmp_path / "e.html", budget=1000))["models"][0]
    assert len(whole["maps"]) == 2
    assert [m["frames"] for m in coarse["maps"]] == [[0]]
    assert coarse["maps"][0]["data"] == whole["maps"][0]["data"].split(" ")[0]


@pytest.mark.slow
def test_long_videos_stay_under_six_megabytes(tmp_path: Path) -> None:
    model = video("VideoMAE", num_hidden_layers=12, image_size=224, num_frames=16)
    lape.apply_(model, "LaPE", pe="learnable")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))  # nothing that compresses
    page = explore(model, tmp_path / "e.html")
    card = contents(page)["models"][0]
    assert (card["grid"], card["layers"], card["maps"][0]["frames"]) == ([14, 14], 12, list(range(8)))
    assert page.stat().st_size < 6_000_000


@pytest.mark.parametrize("name", ["Vivit", "Timesformer"])
def test_photographs_are_not_for_videos(tmp_path: Path, photo: Path, name: str) -> None:
    model = video(name, **({"patch_size": 8} if name == "Timesformer" else {"tubelet_size": [2, 8, 8]}))
    for message in (r"is for videos .* leave images .* and call lape\.apply_", r"leave images \(--image\) out$"):
        with pytest.raises(lape.LapeError, match=message) as caught:
            explore(model, tmp_path / "e.html", images=[photo])
        assert "\n" not in str(caught.value)
        if "call" in message:
            lape.apply_(model, "LaPE", pe="learnable")
    assert not (tmp_path / "e.html").exists()


# --- models that are not converted ------------------------------------------------------------------------------------


def tokens_of(blocks: Any, model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What enters the first block and leaves each, (layers + 1, N, D), by hooks of this test's own."""
    kept: list[torch.Tensor] = []
    hooks = [blocks[0].register_forward_pre_hook(lambda _m, args: kept.append(args[0]))]
    hooks += [
        b.register_forward_hook(lambda _m, _a, out: kept.append(out[0] if isinstance(out, tuple) else out))
        for b in blocks
    ]
    with torch.no_grad():
        model(pixels)
    for hook in hooks:
        hook.remove()
    return torch.cat(kept)


def foreign(name: str) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    if name == "torchvision":
        torchvision = pytest.importorskip("torchvision.models")
        model = torchvision.VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64)
        return model.eval(), model.encoder.layers
    if name == "transformers":
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
        config = transformers.Dinov2WithRegistersConfig(**sizes, image_size=32, patch_size=8, num_register_tokens=2)
        model = transformers.Dinov2WithRegistersModel(config).eval()
        blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        return model, blocks
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, **SMALL).eval()
    return model, model.blocks


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_tiny_patch16_224", ["class"]),
        ("vit_small_patch16_dinov3", ["class", "register 1", "register 2", "register 3", "register 4"]),
        ("vit_relpos_small_patch16_224", []),
        ("torchvision", ["class"]),
        ("transformers", ["class", "register 1", "register 2"]),
    ],
)
def test_a_model_that_is_not_converted_shows_attention_and_tokens(
    tmp_path: Path, photo: Path, name: str, prefix: list[str]
) -> None:
    from lape.look.explorer.card import photo as as_seen

    model, blocks = foreign(name)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    card = contents(explore(model, tmp_path / "e.html", images=[photo]))["models"][0]
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before  # nothing is left on it
    assert (card["grid"], card["layers"], card["heads"], card["prefix"]) == ([4, 4], 3, 2, prefix)
    assert "not converted" in card["facts"]
    assert card["maps"] == []
    assert "not converted" in card["notes"]["position"]
    pixels, count = as_seen(model, photo, None).pixels, 16 + len(prefix)
    expected = attention(model, pixels)[:, 0].numpy()
    levels = unpack(card["attention"][0]["data"], np.uint8).reshape(3, 2, count, count) / 255
    peaks = unpack(card["attention"][0]["peaks"], np.float32).reshape(3, 2, count, 1)
    assert np.abs(levels * peaks - expected).max() < 1e-2 * expected.max()
    alike = cosine(tokens_of(blocks, model, pixels)).numpy()
    i, j = np.triu_indices(count)
    packed = card["tokens"][0]
    found = unpack(packed["data"], np.int8).reshape(packed["layers"], -1) / 127
    assert (packed["first"], packed["layers"]) == (-1, 4)
    assert np.abs(found - alike[:, i, j]).max() <= 1 / 254 + 1e-6
    measures = {m["label"]: m["values"] for m in card["measures"]}
    patches = alike[1:, len(prefix) :, len(prefix) :]
    mean = (patches.sum((1, 2)) - 16) / (16 * 15)
    assert measures["tokens: mean similarity"] == pytest.approx(mean.tolist(), abs=1e-4)
    assert len(measures["mean attention distance, pixels"]) == 3


def test_what_cannot_be_watched_is_said_and_the_rest_is_shown(tmp_path: Path, photo: Path) -> None:
    import timm

    xcit = timm.create_model("xcit_nano_12_p8_224", img_size=32, embed_dim=32, depth=2, num_heads=2)
    card = contents(explore(xcit, tmp_path / "e.html", images=[photo]))["models"][0]
    assert "over channels" in card["notes"]["attention"]
    assert card["attention"] == []
    assert len(card["tokens"]) == 1
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    with pytest.raises(lape.LapeError, match="no one grid"):
        explore(swin, tmp_path / "swin.html", images=[photo])
    assert not (tmp_path / "swin.html").exists()


@pytest.mark.parametrize("name", ["ViT", "DINOv3ViT", "Siglip"])
def test_a_folder_of_transformers_that_is_not_converted(
    tmp_path: Path, photo: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from lape.cli import app as cli
    from lape.look.explorer.card import photo as as_seen

    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    kind = {"ViT": "ViTModel", "DINOv3ViT": "DINOv3ViTModel", "Siglip": "SiglipVisionModel"}[name]
    config = getattr(transformers, kind.replace("Model", "Config"))(**sizes, image_size=32, patch_size=8)
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(tmp_path / "saved")
    page = tmp_path / "e.html"
    assert cli.run(cli.app, ["visualize", str(tmp_path / "saved"), "--html", str(page), "--image", str(photo)]) == 0
    card = contents(page)["models"][0]
    expected = attention(model, as_seen(model, photo, None).pixels)[:, 0].numpy()
    levels = unpack(card["attention"][0]["data"], np.uint8).reshape(expected.shape) / 255
    peaks = unpack(card["attention"][0]["peaks"], np.float32).reshape(*expected.shape[:-1], 1)
    assert np.abs(levels * peaks - expected).max() < 1e-2 * expected.max()
    assert "left as it is" in card["facts"]
    capsys.readouterr()
    assert cli.run(cli.app, ["visualize", str(tmp_path / "saved"), "--html", str(page)]) == 2
    assert "without images" in capsys.readouterr().err
    weights = tmp_path / "saved" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    save_file(dict(list(state.items())[1:]), weights, metadata={"format": "pt"})
    with pytest.raises(lape.CheckpointError, match="do not fit a"):
        explore(tmp_path / "saved", page, images=[photo])


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
        (torch.nn.Linear(2, 2), "e.html", "not converted, .*without images"),
        (model_with("basic", "none"), "e.html", "nothing to show"),
        ([], "e.html", "no model"),
        (tmp_path / "absent.pth", "e.html", "no such checkpoint"),
        ("https://lape.invalid/x.pth", "e.html", "https://lape.invalid/x.pth cannot be downloaded"),
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
@pytest.mark.usefixtures("drafts")
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


def test_the_script_is_in_files_that_can_be_read(tmp_path: Path) -> None:
    folder = Path(lape.__file__).parent / "look" / "explorer"
    files = sorted(file.stem for file in folder.glob("*.js"))
    assert files == sorted(SCRIPTS)
    page = explore(model_with("LaPE", "learnable"), tmp_path / "e.html").read_text()
    for name in files:
        text = (folder / f"{name}.js").read_text()
        assert text.startswith("// ")
        assert text in page
        assert text.count("\n") < 250
        assert max(map(len, text.splitlines())) <= 120
    prettier = shutil.which("prettier")
    if prettier is None:
        pytest.skip("no prettier")
    settings = Path(__file__).parents[2] / ".prettierrc"
    command = [prettier, "--config", str(settings), "--check", *map(str, folder.glob("*.js"))]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


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

    def __init__(self, browser: Any, path: Path, address: str = "", **options: Any):
        self.page = browser.new_page(**options)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri() + address)
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
    assert "this model has 2" in visit.page.locator(".nothing").nth(1).inner_text()
    visit.page.get_by_role("button", name="corner").click()
    assert [visit.state("row"), visit.state("column")] == [0, 0]
    assert "row 0, column 0" in visit.page.locator("#picker").get_attribute("aria-label")
    visit.end()


@pytest.mark.browser
def test_a_slider_goes_through_the_frames(
    browser: Any, two: tuple[Path, list[torch.nn.Module]], filmed: torch.nn.Module, tmp_path: Path
) -> None:
    visit = Visit(browser, two[0])
    assert not visit.page.locator("#frame").is_visible()
    visit.end()
    path = explore({"film": filmed, "image": two[1][0]}, tmp_path / "e.html")
    visit = Visit(browser, path)
    slider, canvas = visit.page.get_by_label("Frame t"), visit.page.locator(".big canvas").first
    seen = {}

    def look(frame: int) -> None:
        assert visit.state("frame") == frame
        assert visit.page.locator("#frame-name").inner_text() == str(frame)
        assert f"frame {frame}: patch (1, 1)" in visit.page.locator(".readout").first.inner_text()
        for layer in range(2):
            assert np.abs(visit.values(0, layer) - within(filmed, frame, 1)[layer, 4]).max() < 1 / 250
        seen[frame] = canvas.evaluate("canvas => canvas.toDataURL()")

    look(1)
    box = slider.bounding_box()
    visit.page.mouse.click(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    look(3)
    visit.page.wait_for_url(lambda url: url.endswith("#frame=3"))
    for key, frame in (("ArrowLeft", 2), ("Home", 0)):
        visit.page.keyboard.press(key)
        look(frame)
    assert len(set(seen.values())) == 4
    assert [visit.state("row"), visit.state("column")] == [1, 1]
    assert "frame" not in visit.page.locator(".readout").nth(1).inner_text()
    visit.end()
    visit = Visit(browser, path, "#frame=2")
    assert visit.page.get_by_label("Frame t").input_value() == "2"
    visit.end()
    path = explore(filmed, tmp_path / "e.html", budget=1000)
    visit = Visit(browser, path, "#frame=2")
    assert "frame 0, the nearest that was kept: patch" in visit.page.locator(".readout").inner_text()
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
    assert re.search(r"patch \(1, 1\) and patch \(\d, \d\): −?\d\.\d\d", page.locator(".readout").first.inner_text())
    page.locator("#view").select_option("1")
    assert visit.state("view") == 1
    assert page.locator(".chart h3", has_text=re.compile("^locality radius$")).count() == 1
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


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of one, two and three models, with photographs and a report above."""
    folder = tmp_path_factory.mktemp("pages")
    Image.effect_noise((64, 64), 60).convert("RGB").save(folder / "photo.png")
    joins = {"LaPE": "LaPE", "basic, the longest name of a run that one would give": "basic", "unshare": "unshare"}
    models = {name: model_with(join, "learnable", depth=6) for name, join in joins.items()}
    table = "<div class='scroll' tabindex='0'><table><tr><th>a</th></tr></table></div>"
    report = f"<div class='report'><h2>Report</h2>{table}</div>"
    return [
        explore(
            dict(list(models.items())[:count]),
            folder / f"{count}.html",
            images=[folder / "photo.png"] * 2,
            intro=report if count == 3 else "",
        )
        for count in (1, 2, 3)
    ]


BOXES = """() => [...document.querySelectorAll(
  '#panel, #models, #meaning, .card, .chart, #top, .report')].map((node) => {
    const box = node.getBoundingClientRect();
    const name = node.id || `${node.className} ${node.getAttribute('aria-label') || ''}`;
    return [name, box.left, box.top, box.right, box.bottom];
  }).filter((box) => box[3] > box[1])"""
INSIDE = BOXES.replace(
    "#panel, #models, #meaning, .card, .chart, #top, .report",
    "#picker, .where, #photos, .segments, #controls > label:not([hidden]), #layer-row, #legend, .hint",
)
CUT = """() => [...document.querySelectorAll('#explorer :is(button, h2, h3, p, span, label), #top *')].filter((node) =>
  node.clientWidth && !node.classList.contains('unseen') && node.scrollWidth > node.clientWidth + 1)
  .map((node) => node.outerHTML.slice(0, 80))"""


def overlaps(boxes: list[Any]) -> list[tuple[str, str]]:
    return [
        (a[0], b[0])
        for k, a in enumerate(boxes)
        for b in boxes[k + 1 :]
        if min(a[3], b[3]) - max(a[1], b[1]) > 1 and min(a[4], b[4]) - max(a[2], b[2]) > 1
    ]


@pytest.mark.browser
@pytest.mark.parametrize("width", [1000, 1280, 1920])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_nothing_overlaps_and_models_stand_side_by_side(
    browser: Any, pages: list[Path], count: int, width: int
) -> None:
    visit = Visit(browser, pages[count - 1], viewport={"width": width, "height": 900})
    page = visit.page
    for show in ("position", "tokens", "attention"):
        page.locator(f"[data-show={show}]").click()
        for share in (0, 0.3, 0.6, 1):
            page.evaluate(f"scrollTo(0, {share} * document.documentElement.scrollHeight)")
            assert overlaps(page.evaluate(BOXES)) == []
            assert overlaps(page.evaluate(INSIDE)) == []
        assert page.evaluate(CUT) == []
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        maps = [box for box in (page.locator(".big canvas").nth(k).bounding_box() for k in range(count)) if box]
        assert len(maps) == count
        assert len({round(box["y"]) for box in maps}) == 1  # one row, and maps at one height
        assert len({round(box["width"]) for box in maps}) == 1
        assert maps[0]["width"] > 150
    visit.end()


@pytest.mark.browser
def test_models_can_be_left_out_and_come_back(browser: Any, pages: list[Path]) -> None:
    visit = Visit(browser, pages[2])
    chips = visit.page.locator("#models button")
    chips.nth(1).click()
    assert visit.page.locator(".card:visible").count() == 2
    assert visit.page.locator(".now").first.locator("i").count() == 2
    chips.nth(0).click()
    chips.nth(2).click()  # the last one stays
    assert visit.state("models") == "2"
    chips.nth(0).click()
    assert visit.state("models") == "0.2"
    visit.end()


@pytest.mark.browser
def test_the_class_token_asks_and_all_tokens_with_all(browser: Any, two: tuple[Path, list[torch.nn.Module]]) -> None:
    from lape.look.explorer.card import photo as as_seen

    path, models = two
    weights = attention(models[0], as_seen(models[0], path.parent / "photo.png", None).pixels)[:, 0].numpy()
    visit = Visit(browser, path)
    page = visit.page
    page.locator("[data-show=attention]").click()
    page.get_by_role("button", name="class", exact=True).click()
    assert np.abs(visit.values(0, 2) - weights[2].mean(0)[0, 1:]).max() < 1e-2 * weights.max()
    page.locator("#head").select_option("1")
    assert np.abs(visit.values(0, 2) - weights[2, 1, 0, 1:]).max() < 1e-2 * weights.max()
    assert "class token with all, class: " in page.locator(".readout").first.inner_text()
    assert page.locator("#where").inner_text() == "class token"
    page.locator("[data-all='1']").click()
    assert np.abs(visit.values(0, 2).reshape(17, 17) - weights[2, 1]).max() < 1e-2 * weights.max()
    visit.click_at(".card:first-child .big canvas", 6, 3, (17, 17))  # the row of patch 5
    assert [visit.state("row"), visit.state("column"), visit.state("query")] == [1, 1, -1]
    visit.click_at(".card:first-child .big canvas", 0, 3, (17, 17))
    assert visit.state("query") == 0
    page.locator("[data-show=tokens]").click()
    whole = visit.values(0, -1).reshape(17, 17)
    assert np.abs(np.diag(whole) - 1).max() < 1e-6
    assert np.array_equal(whole, whole.T)
    assert page.locator(".tile:visible").first.inner_text() == "input"
    page.locator("[data-all='0']").click()
    assert np.allclose(visit.values(0, -1), whole[0, 1:])
    page.keyboard.press("ArrowRight")  # from the class token to a patch
    assert visit.state("query") == -1
    visit.end()


@pytest.mark.browser
def test_a_range_that_stretches(browser: Any, two: tuple[Path, list[torch.nn.Module]]) -> None:
    from matplotlib import colormaps

    path, models = two
    visit = Visit(browser, path, "#range=each&row=0&column=0")
    values = lape.correlation(models[1])[0, 0].numpy()
    others = values[1:]  # a patch with itself would take the end
    patches = [1 + int(others.argmin()), 1 + int(others.argmax())]
    colours = visit.page.evaluate(
        "(patches) => { const c = lape.cards[1].big, k = c.width / 4;"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "const at = (j) => 4 * (Math.floor((Math.floor(j / 4) + .5) * k) * c.width + Math.floor((j % 4 + .5) * k));"
        "return patches.map((j) => [...d.slice(at(j), at(j) + 4)]) }",
        patches,
    )
    assert np.abs(np.array(colours) - np.array(colormaps["viridis"]([0.0, 1.0])) * 255).max() < 6
    visit.page.locator("#range").select_option("all")
    low, high = visit.page.locator("#legend span").all_inner_texts()
    everything = [lape.correlation(m)[:, 0, 1:].numpy() for m in models]
    tables = [cosine(m.state_dict()["pos_embed"][0, 1:])[0, 1:].numpy() for m in models]
    assert float(low.replace("−", "-")) == pytest.approx(min(x.min() for x in (*everything, *tables)), abs=0.011)
    assert float(high) == pytest.approx(max(x.max() for x in (*everything, *tables)), abs=0.011)
    visit.page.locator("#range").select_option("fixed")
    assert visit.page.locator("#legend span").all_inner_texts() == ["−1", "0", "1"]
    visit.end()


@pytest.mark.browser
def test_pictures_are_saved(browser: Any, two: tuple[Path, list[torch.nn.Module]], tmp_path: Path) -> None:
    visit = Visit(browser, two[0], "#show=attention&layer=1", accept_downloads=True)
    labels = []
    for selector in (".card", ".chart"):
        for kind in ("PNG", "SVG"):
            button = visit.page.locator(f"{selector} .save button", has_text=kind).first
            labels.append(button.get_attribute("aria-label"))
            with visit.page.expect_download() as download:
                button.click()
            assert re.fullmatch(rf"[\w.]+\.{kind.lower()}", download.value.suggested_filename)
            file = tmp_path / f"picture.{kind.lower()}"
            download.value.save_as(file)
            if kind == "PNG":
                image = np.asarray(Image.open(file).convert("RGB"))
                assert min(image.shape[:2]) > 400
                assert len(np.unique(image[::9, ::9].reshape(-1, 3), axis=0)) > 20
                assert (image[0] == 255).all()  # on white
            else:
                root = ET.parse(file).getroot()
                words = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
                assert HOSTILE in words  # the name of the model, as text
                maps = list(root.iter("{http://www.w3.org/2000/svg}image"))
                assert len(maps) == (1 + 3 + 1 + 1 if selector == ".card" else 0)  # chosen, all, rollout, legend
    assert labels[0] == f"Save {HOSTILE} as PNG"
    visit.end()


@pytest.mark.browser
def test_a_view_can_be_sent(browser: Any, two: tuple[Path, list[torch.nn.Module]]) -> None:
    path, _ = two
    sent = "#show=attention&layer=2&row=3&column=0&query=0&all=1&view=1&head=1&range=each&models=1&theme=dark"
    visit = Visit(browser, path, sent)
    state = visit.page.evaluate("lape.state")
    told = {key: str(value) for key, value in state.items()}
    assert told == {**dict(pair.split("=") for pair in sent[1:].split("&")), "photo": "0", "frame": "0"}
    assert visit.page.locator(".card:visible").count() == 1
    visit.page.locator("[data-all='0']").click()
    visit.page.wait_for_url(lambda url: "all=" not in url)
    assert "theme=dark" in visit.page.url
    visit.page.evaluate("location.hash = '#layer=1&row=2'")
    visit.page.locator("[data-show=position][aria-pressed=true]").wait_for()
    assert [visit.state("row"), visit.state("layer")] == [2, 1]
    visit.end()
    for nonsense in (
        "#layer=99&row=-1&show=toString&head=x&models=7&range=&theme=red&query=5&all=2&frame=1",
        "#%%%",
        "#models=",
    ):
        visit = Visit(browser, path, nonsense)
        start = {"show": "position", "layer": 0, "row": 1, "column": 1, "query": -1, "all": 0, "view": 0, "head": -1}
        start |= {"photo": 0, "frame": 0, "range": "fixed", "models": "0.1", "theme": ""}
        assert visit.page.evaluate("lape.state") == start
        visit.end()


@pytest.mark.browser
def test_the_theme_is_remembered(browser: Any, two: tuple[Path, list[torch.nn.Module]]) -> None:
    context = browser.new_context(color_scheme="light")
    page = context.new_page()
    for expected in ("", "dark"):
        page.goto("about:blank")
        page.goto(two[0].as_uri())
        page.wait_for_selector("html[data-ready]")
        assert page.evaluate("document.documentElement.dataset.theme || ''") == expected
        if not expected:
            page.locator("#theme").click()
    context.close()


@pytest.mark.browser
def test_each_chart_says_what_is_better(browser: Any, two: tuple[Path, list[torch.nn.Module]]) -> None:
    visit = Visit(browser, two[0])
    for show in ("position", "tokens", "attention"):
        visit.page.locator(f"[data-show={show}]").click()
        assert re.search("Better: .*Worse: ", visit.page.locator("#meaning").inner_text())
    charts = visit.page.locator(".chart")
    assert charts.count() == 13
    for text in charts.locator("p").all_inner_texts():
        assert text.count(". ") >= 1  # what values say, and what they mean
        assert len(text) > 60
    visit.end()


LIGHT, DARK = {"color_scheme": "light"}, {"color_scheme": "dark"}


def luminance(colour: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: list[float], b: list[float]) -> float:
    low, high = sorted(map(luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_letters_and_lines_stand_out(browser: Any, two: tuple[Path, list[torch.nn.Module]], scheme: Any) -> None:
    """4.5 for letters, 3 for lines (WCAG 2.2 AA); lines are the colours of every join, through the page's filter."""
    from lape.look.colours import COLOURS
    from lape.look.figures import SERIES

    visit = Visit(browser, two[0], **scheme)
    read = (
        "(names) => names.map((name) => { const node = document.createElement('i'); node.style.color ="
        "`var(--${name})`; document.body.append(node); const colour = getComputedStyle(node).color; node.remove();"
        "return colour.match(/[\\d.]+/g).map(Number) })"
    )
    page, raised, ink, quiet = visit.page.evaluate(read, ["page", "raised", "ink", "quiet"])
    assert min(contrast(letters, ground) for letters in (ink, quiet) for ground in (page, raised)) >= 4.5
    assert contrast(ink, page) >= 4.5  # of pressed buttons, the other way round
    fill = "getComputedStyle(document.querySelector('.chart text')).fill.match(/[\\d.]+/g).map(Number)"
    assert visit.page.evaluate(fill) == quiet
    style = "getComputedStyle(document.querySelector('.chart .line')).filter"
    lift = float(re.fullmatch(r"brightness\(([\d.]+)\)", visit.page.evaluate(style))[1])  # type: ignore[index]
    for colour in (*COLOURS.values(), *SERIES):
        seen = [min(255, lift * int(colour[k : k + 2], 16)) for k in (1, 3, 5)]
        assert contrast(seen, page) >= 3, colour
    visit.end()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_axe_finds_nothing(browser: Any, pages: list[Path], scheme: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    context = browser.new_context(bypass_csp=True, **scheme)
    for address in ("", "#show=attention&query=0&models=0", "#show=tokens&all=1&range=all"):
        page = context.new_page()
        page.goto(pages[2].as_uri() + address)
        page.wait_for_selector("html[data-ready]")
        response = axe.Axe().run(page).response
        assert [(v["id"], v["impact"], v["nodes"][0]["target"]) for v in response["violations"]] == []
        assert len(response["passes"]) > 15
        page.close()
    context.close()
