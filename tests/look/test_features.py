"""What features keep of position: constructed tokens whose answer is known, and models of every library."""

import math

import pytest
import torch
from torch import Tensor, nn

import lape
from lape.look.features import LABELS, Features, debias_, probe, subspace_of

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
GRID, WIDTH = (4, 4), 12


def photos(count: int = 8, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(7))


class Stack(nn.Module):
    """Tokens that a function makes of the image's patches (B, n, 3 * 64), through two blocks that do nothing."""

    def __init__(self, make, prefix: int = 0):
        super().__init__()
        self.make, self.prefix = make, prefix
        self.scale = nn.Parameter(torch.ones(1))
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = self.make(nn.functional.unfold(images_BCHW, 8, stride=8).mT)
        x = torch.cat([x.new_full((len(x), self.prefix, x.shape[-1]), 9.0), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x


def table(seed: int = 0) -> Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(seed))


def where() -> Tensor:
    return torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))


def of(make, prefix: int = 0, **more) -> Features:
    return probe(Stack(make, prefix), photos(40), **more)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_tokens_that_are_their_place_and_nothing_else(prefix: int) -> None:
    coordinates = nn.functional.pad(where() - 1.5, (0, WIDTH - 2))
    found = of(lambda patches: coordinates.expand(len(patches), -1, -1), prefix, ridge=1e-9)
    assert found.grid == GRID
    for name, expected in {"row": 1.0, "column": 1.0, "share": 1.0, "rank": 2.0}.items():
        assert found.plain[name].tolist() == pytest.approx([expected] * 3, abs=1e-6), name
    assert found.subspaces[0].basis_Dk.shape == (WIDTH, 2)
    # a step moves x by 1 in one coordinate, whose variance is 5 / 4 in each of two: 1 - 1 / (2 * 5 / 2)
    assert found.plain["shift"].tolist() == pytest.approx([0.8] * 3, abs=1e-6)
    assert found.without["row"].tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert found.without["shift"].isnan().all()  # nothing is left that could vary


@pytest.mark.parametrize(("ridge", "expected"), [(6.0, 0.75), (18.0, 7 / 16)])
def test_a_ridge_pulls_the_probe_to_the_middle_of_the_grid(ridge: float, expected: float) -> None:
    """Two of 12 directions vary, by s each: the penalty is ridge s / 6 and the estimate 1 / (1 + ridge / 6) of it."""
    coordinates = nn.functional.pad(where() - 1.5, (0, WIDTH - 2))
    plain = of(lambda patches: coordinates.expand(len(patches), -1, -1), ridge=ridge).plain
    assert [*plain["row"].tolist(), *plain["column"].tolist()] == pytest.approx([expected] * 6, abs=1e-9)


@pytest.mark.parametrize(("patch", "image"), [((4, 16), (16, 32)), ((16, 4), (32, 16))])
def test_a_step_is_a_patch_along_each_side_of_one_that_is_no_square(
    patch: tuple[int, int], image: tuple[int, int]
) -> None:
    """Without a table, what enters the first block knows no place: moved by whole patches it stays the same."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "img_size": image, "patch_size": patch})
    nn.init.zeros_(model.pos_embed)
    features = probe(model, photos(8, *image))
    assert features.grid == (image[0] // patch[0], image[1] // patch[1])
    assert features.plain["shift"][0].item() == pytest.approx(1.0, abs=1e-6)


def test_tokens_of_content_alone_know_no_place() -> None:
    found = of(lambda patches: patches[..., :WIDTH])
    assert found.plain["shift"].tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert found.plain["share"].max() < 0.02
    assert found.plain["row"].abs().max() < 0.15
    assert found.plain["ssdc"].abs().max() < 0.1


@pytest.mark.parametrize("size", [0.5, 1.0, 3.0])
def test_share_is_that_of_the_sum_of_a_table_and_noise(size: int) -> None:
    p = table()
    found = probe(Stack(lambda patches: patches[..., :WIDTH] + size * p), photos(200))
    between = size**2 * (p - p.mean(0)).square().sum(-1).mean().item()
    assert found.plain["share"][0].item() == pytest.approx(between / (between + WIDTH), abs=0.03)


def test_share_is_the_variance_component_of_a_one_way_analysis_of_variance() -> None:
    """Places are the groups, of 4 images each. The component between them is (MSB - MSW) / 4, for n - 1 places."""
    p, images = table(), photos(8)
    tokens = (nn.functional.unfold(images[:4], 8, stride=8).mT[..., :WIDTH] + p).double()
    means = tokens.mean(0)
    msb = 4 * (means - means.mean(0)).square().sum() / (16 - 1)
    msw = (tokens - means).square().sum() / (16 * (4 - 1))
    between = (msb - msw) / 4 * 15 / 16
    plain = probe(Stack(lambda patches: patches[..., :WIDTH] + p), images).plain
    assert plain["share"].tolist() == pytest.approx([(between / (between + msw)).item()] * 3, abs=1e-6)


def test_ssdc_is_the_correlation_of_similarity_with_distance() -> None:
    p, d = table(), torch.cdist(where(), where())
    found = of(lambda patches: p.expand(len(patches), -1, -1))
    pairs = ~torch.eye(16, dtype=torch.bool)
    cosine = nn.functional.cosine_similarity(p[:, None], p[None], dim=-1)
    expected = torch.corrcoef(torch.stack([cosine[pairs], d[pairs]]))[0, 1].item()
    assert found.plain["ssdc"].tolist() == pytest.approx([expected] * 3, abs=1e-5)


def test_the_subspace_is_the_one_that_was_put_in() -> None:
    basis = torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(1)).double())[0]
    scores = torch.randn(16, 3, generator=torch.Generator().manual_seed(2)).double()
    found = subspace_of(scores @ basis.T + 5.0, within=0.0, images=10, energy=1.0)
    assert torch.allclose(found.basis_Dk @ found.basis_Dk.T, basis @ basis.T, atol=1e-9)
    assert found.share == pytest.approx(1.0)
    assert torch.allclose(found.without(scores @ basis.T + 5.0), found.mean_D.expand(16, -1))
    few = subspace_of(torch.diag(torch.tensor([10.0, 1, 1, 1])).double(), 0.0, 10, energy=0.9)
    assert few.basis_Dk.shape == (4, 1)


def test_taking_the_subspace_out_gives_the_content_back() -> None:
    """Content and table in directions of their own: projecting one out leaves the other, shift invariance and all.

    (All of the energy would take out what chance leaves in a mean of 20 images, too.)
    """
    p = torch.cat([torch.zeros(16, 6), 10 * table()[:, 6:]], dim=1)
    found = of(lambda patches: nn.functional.pad(patches[..., :6], (0, 6)) + p, energy=0.999)
    assert found.plain["share"].min() > 0.9
    assert found.plain["shift"].max() < 0.2
    assert found.without["shift"].min() > 0.9


def library_models() -> dict[str, nn.Module]:
    import timm

    made = {
        "timm": timm.create_model("vit_tiny_patch16_224", **SMALL),
        "converted": lape.create_model("vit_tiny_patch16_224", "LaPE", **SMALL),
        "registers": timm.create_model("vit_tiny_patch16_224", **SMALL, reg_tokens=4),
        "rotary": timm.create_model("vit_small_patch16_rope_224", **SMALL),  # left as it is: no table
        "post-norm": timm.create_model("vit_relpos_small_patch16_rpn_224", **SMALL),
    }
    return made


@pytest.mark.parametrize("name", ["timm", "converted", "registers", "rotary", "post-norm"])
def test_models_of_timm(name: str) -> None:
    found = probe(library_models()[name], photos())
    assert found.grid == GRID
    assert all(found.plain[measure].shape == (3,) and found.plain[measure].isfinite().all() for measure in LABELS)


def test_models_of_other_libraries() -> None:
    torchvision = pytest.importorskip("torchvision.models")
    transformers = pytest.importorskip("transformers")
    tv = torchvision.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=4)
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    hf = transformers.ViTModel(transformers.ViTConfig(**config, image_size=32, patch_size=8))
    for model in (tv, hf):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        assert probe(model, photos()).plain["row"].shape == (3,)
        logits = model(photos())
        logits = logits if isinstance(logits, Tensor) else logits.last_hidden_state
        with debias_(model, photos(), depth=1):
            changed = model(photos())
            assert not torch.equal(changed if isinstance(changed, Tensor) else changed.last_hidden_state, logits)


def test_detection_tokens_stay_behind_the_patches() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.YolosConfig(**sizes, image_size=[32, 32], patch_size=8, num_detection_tokens=3)
    model = transformers.YolosModel(config).eval()
    assert probe(model, photos()).grid == GRID
    with torch.no_grad():
        before = model(photos()).last_hidden_state
        with debias_(model, photos()):
            after = model(photos()).last_hidden_state
    same = (after == before).all(dim=-1).all(dim=0)
    assert same.tolist() == [True] + [False] * 16 + [True] * 3


def test_position_is_in_the_stream_of_basic_and_not_of_lape() -> None:
    torch.manual_seed(0)
    blank = torch.zeros(4, 3, 32, 32)
    rows = {join: probe(lape.create_model("vit_tiny_patch16_224", join, "2D_sin", **SMALL), blank, ridge=1e-9)
            for join in ("basic", "LaPE")}  # fmt: skip
    assert rows["basic"].plain["row"][0].item() == pytest.approx(1.0, abs=1e-3)
    assert rows["LaPE"].plain["row"][0].item() == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("depth", [0, 1, -1])
def test_debias_takes_out_what_a_probe_reads_and_can_be_undone(depth: int) -> None:
    torch.manual_seed(0)
    model = lape.create_model("vit_tiny_patch16_224", "basic", "2D_sin", **SMALL).eval()
    images = photos(32)
    before, plain = model.forward_features(images), probe(model, images)
    handle = debias_(model, images, depth=depth, energy=1.0)
    read = probe(model, images).plain["row"][depth]
    assert read < 0.3 < 0.6 < plain.plain["row"][depth]
    assert not torch.allclose(model.forward_features(images), before)
    handle.remove()
    assert torch.equal(model.forward_features(images), before)


def test_a_probe_leaves_the_model_as_it_was() -> None:
    model = lape.create_model("vit_tiny_patch16_224", "LaPE", **SMALL).train()
    probe(model, photos())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_wrong_use_is_one_line() -> None:
    model, lost = (lape.create_model("vit_tiny_patch16_224", "LaPE", **SMALL) for _ in range(2))
    with torch.no_grad():
        lost.blocks[1].mlp.fc1.bias[0] = math.nan
    for call, text in (
        (lambda: probe(model, photos(3)), "4 or more"),
        (lambda: probe(model, photos()[0]), "4 or more"),
        (lambda: probe(model, photos(), energy=0.0), "energy=0.0"),
        (lambda: probe(nn.Linear(3, 3), photos()), "cannot be probed"),
        (lambda: debias_(model, photos(), depth=3), "choose 0 to 2"),
        (lambda: debias_(model, photos(1)), "2 or more"),
        (lambda: debias_(model, photos(), energy=2.0), "energy=2.0"),
        (lambda: probe(model, photos() * math.nan), "the images are not finite"),
        (lambda: probe(lost, photos()), "the patch tokens at depth 2 are not finite"),
        (lambda: debias_(lost, photos()), "the patch tokens at depth 2 are not finite"),
    ):
        with pytest.raises(lape.LapeError, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_plain_values_hold_no_nan() -> None:
    found = of(lambda patches: torch.zeros(len(patches), 16, WIDTH)).to_dict()
    assert found["plain"]["shift"] == [None] * 3
    assert found["directions"] == [0, 0, 0]
    assert math.isfinite(found["plain"]["ssdc"][0])


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    model = lape.create_model("vit_tiny_patch16_224", "LaPE", **{**SMALL, "img_size": 16, "patch_size": 4}, in_chans=1)
    lape.save(model, tmp_path / "model")
    return tmp_path


def lines_of(capsys, *words: object) -> tuple[int, str, str]:
    from lape.cli.app import app, run

    code = run(app, ["probe", *map(str, words)])
    return code, *capsys.readouterr()


def test_the_command_writes_what_the_call_measures(folder, capsys) -> None:
    import json

    from PIL import Image

    from lape.data.images import load_image
    from lape.files.read import read_checkpoint
    from lape.files.restore import transform_of

    files = []
    for number in range(6):
        files.append(folder / f"{number}.png")
        noise = torch.randint(0, 256, (16, 16), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(files[-1])
    out = ["--json", folder / "f.json", "--plot", folder / "f.png"]
    code, text, _ = lines_of(capsys, folder / "model", "--images", *files, *out)
    assert (code, "6 images of files" in text) == (0, True)
    transform = transform_of(read_checkpoint(folder / "model"))
    images = torch.stack([transform.build()(load_image(f, 1)) for f in files])
    written = json.loads((folder / "f.json").read_text())["models"][str(folder / "model")]
    assert written == json.loads(json.dumps(probe(lape.load(folder / "model"), images).to_dict()))
    with Image.open(folder / "f.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--count", "3"], "4 images or more"),
        (["--plot", "here.gif"], ".png, .pdf or .svg"),
        (["--json", "no/such/folder/f.json"], "cannot be written"),
        (["--energy", "2"], "energy=2.0"),
    ],
)
def test_wrong_use_of_the_command_exits_with_two(folder, capsys, words: list[str], text: str) -> None:
    code, _, error = lines_of(capsys, folder / "model", *words)
    assert (code, error.count("\n")) == (2, 1)
    assert text in error


def test_a_name_of_timm_is_probed_on_the_digits(capsys) -> None:
    code, text, _ = lines_of(capsys, "test_vit", "--no-pretrained", "--count", "4")
    assert (code, "digits" in text) == (0, True)
    assert lines_of(capsys, "no_such_model_at_all", "--count", "4")[0] == 2


def test_averaged_weights_are_probed_where_they_are_asked_for(folder, capsys, monkeypatch) -> None:
    from lape.study import probing

    choices, restore = [], probing.restore
    monkeypatch.setattr(probing, "restore", lambda checkpoint, *, ema: (choices.append(ema), restore(checkpoint))[1])
    for words in ([], ["--ema"]):
        assert lines_of(capsys, folder / "model", "--count", "4", *words)[0] == 0
    assert choices == [False, True]


def test_a_model_of_timm_sees_images_as_timm_evaluates_it() -> None:
    from lape.study.options import ProbeOptions
    from lape.study.probing import _model_of

    transform = _model_of("test_vit", ProbeOptions(pretrained=False))[1]
    assert (transform.size, transform.crop_ratio, transform.mean) == ((160, 160), 0.95, (0.5, 0.5, 0.5))


def test_legends_name_what_differs() -> None:
    from lape.study.pictures import short_names

    assert short_names(["/a/b/LaPE/model", "/a/b/basic/model"]) == ["LaPE", "basic"]
    assert short_names(["/a/m.pth", "vit_tiny"]) == ["/a/m.pth", "vit_tiny"]
    assert short_names(["/a/b.pth"]) == ["b.pth"]
