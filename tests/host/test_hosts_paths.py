"""Hosts told by attribute paths: code that no library ships (small stand-ins with its names), models of one's own,
torch's encoder, torchvision's Swin by a grid, and parts of larger models."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from formula import assert_same_structure, plain
from torch import nn
from zoo import SMALL, make, make_foreign, output

import lape
from lape.convert.converted import conversion_of
from lape.host import base


class Attention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.num_heads, self.use_rel_pos = heads, False
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        shape, x = x.shape, x.flatten(1, -2)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(shape))


class Block(nn.Module):
    def __init__(self, width=32, norms=("norm1", "norm2")):
        super().__init__()
        self.names = norms
        self.add_module(norms[0], nn.LayerNorm(width))
        self.attn, self.mlp = Attention(width), nn.Linear(width, width)
        self.add_module(norms[1], nn.LayerNorm(width))

    def forward(self, x):
        x = x + self.attn(getattr(self, self.names[0])(x))
        return x + self.mlp(getattr(self, self.names[1])(x))


class PatchEmbed(nn.Module):
    def __init__(self, width=32, **attributes):
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)
        self.__dict__.update(attributes)

    def forward(self, x):
        return self.proj(x).flatten(2).mT


class DinoVisionTransformer(nn.Module):
    """DINOv2's: blocks in chunks, registers behind the class token that have no row, a table that it resamples."""

    def __init__(self):
        super().__init__()
        self.patch_embed = PatchEmbed(patches_resolution=(4, 4))
        self.patch_size, self.num_register_tokens = 4, 2
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 17, 32))
        self.register_tokens = nn.Parameter(torch.randn(1, 2, 32))
        chunks = [nn.ModuleList([Block()]), nn.ModuleList([nn.Identity(), Block()])]
        self.blocks, self.norm = nn.ModuleList(chunks), nn.LayerNorm(32)

    def prepare_tokens_with_masks(self, x):
        rows, columns = x.shape[2] // 4, x.shape[3] // 4
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1)
        table = self.pos_embed
        if (rows, columns) != (4, 4):
            maps = table[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
            maps = F.interpolate(maps, size=(rows, columns), mode="bicubic", antialias=True)
            table = torch.cat([table[:, :1], maps.flatten(2).mT], 1)
        x = x + table
        return torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)

    def forward_features(self, x):
        x = self.prepare_tokens_with_masks(x)
        for chunk in self.blocks:
            for block in chunk:
                x = block(x)
        return self.norm(x)

    def get_intermediate_layers(self, x):
        x = self.prepare_tokens_with_masks(x)
        for chunk in self.blocks:
            for block in chunk:
                x = block(x)
        return x

    def forward(self, x):
        return self.forward_features(x)


class Dino3(nn.Module):
    """DINOv3's: no table; here without the rotation, of which a norm sees nothing."""

    def __init__(self):
        super().__init__()
        self.patch_embed, self.patch_size, self.n_storage_tokens = PatchEmbed(grid_size=(4, 4)), 4, 3
        self.cls_token, self.storage_tokens = (nn.Parameter(torch.randn(1, n, 32)) for n in (1, 3))
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        x = torch.cat(
            [t.expand(len(x), -1, -1) for t in (self.cls_token, self.storage_tokens)] + [self.patch_embed(x)], 1
        )
        for block in self.blocks:
            x = block(x)
        return x


class OpenClip(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.grid_size, self.patch_size = nn.Conv2d(3, 32, 4, 4), (4, 4), (4, 4)
        self.class_embedding = nn.Parameter(torch.randn(32))
        self.positional_embedding = nn.Parameter(torch.randn(17, 32))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([Block(norms=("ln_1", "ln_2")) for _ in range(2)])

    def forward(self, x):
        x = self.conv1(x).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        for block in self.transformer.resblocks:
            x = block(x)
        return x


class Sam(nn.Module):
    def __init__(self):
        super().__init__()
        self.img_size, self.patch_embed = 16, PatchEmbed(patch_size=4)
        self.pos_embed = nn.Parameter(torch.randn(1, 4, 4, 32))
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        x = self.patch_embed(x).unflatten(1, (4, 4)) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x


class Mae(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = PatchEmbed(img_size=(16, 16), patch_size=(4, 4))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 32), requires_grad=False)
        self.blocks, self.decoder_blocks = (nn.ModuleList([Block(), Block()]) for _ in range(2))

    def random_masking(self, x, mask_ratio):
        order = torch.rand(len(x), 16).argsort(1)
        kept = order[:, : int(16 * (1 - mask_ratio))]
        return x.gather(1, kept[..., None].expand(-1, -1, 32)), None, order.argsort(1)

    def forward_encoder(self, x, mask_ratio):
        x, _, _ = self.random_masking(self.patch_embed(x) + self.pos_embed[:, 1:], mask_ratio)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x, mask_ratio=0.0):
        return self.forward_encoder(x, mask_ratio)


class Deit3(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = PatchEmbed(img_size=(16, 16), patch_size=(4, 4))
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 16, 32))
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward_features(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x) + self.pos_embed], 1)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        return self.forward_features(x)


@functools.cache
def named(cls: type, name: str) -> type:
    """A class that is taken for one of this name, "module.Class"."""
    module, _, short = name.rpartition(".")
    return type(short, (cls,), {"__module__": module, "__qualname__": short, "forward": cls.forward})


# name -> (stand-in, kind that is needed, tokens with a row before the patches, without)
HUB = {
    "dinov2.models.vision_transformer.DinoVisionTransformer": (DinoVisionTransformer, None, 1, 2),
    "dinov3.models.vision_transformer.DinoVisionTransformer": (Dino3, "learnable", 4, 0),
    "open_clip.transformer.VisionTransformer": (OpenClip, None, 1, 0),
    "segment_anything.modeling.image_encoder.ImageEncoderViT": (Sam, None, 0, 0),
    "models_mae.MaskedAutoencoderViT": (Mae, None, 1, 0),
    "models_v2.vit_models": (Deit3, None, 0, 1),
}


def stand_in(name: str) -> nn.Module:
    torch.manual_seed(1)
    return named(HUB[name][0], name)().eval()


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)  # of patches that are shuffled
    return model(x)


def assert_norms_return_the_formula(model: nn.Module, x: torch.Tensor, in_order=lambda p: p) -> None:
    """In float64: y_l = LN_l(x_l) + P_(l+1), P_(l+1) = LN'_l(P_l), zero for tokens that own no row."""
    model, seen = copy.deepcopy(model).double(), []
    link = conversion_of(model).link
    link.root, anatomy = model, conversion_of(model).anatomy
    state, (rows, bare) = lape.to_reference_state_dict(model), (anatomy.layout.prefix_rows, anatomy.layout.bare)
    norms = [getattr(model.get_submodule(path), anatomy.norm) for path in anatomy.blocks]
    for norm in norms:
        norm.register_forward_hook(lambda norm, args, y: seen.append((plain(norm, *args), y)))
    run(model, x.double())
    p = state[anatomy.table_slot or "pos_embed"]
    p = p.reshape(1, -1, p.shape[-1])
    for path, norm, (alone, y) in zip(anatomy.blocks, norms, seen, strict=True):
        p = F.layer_norm(p, p.shape[-1:], state[f"{path}.pe_norm.weight"], state[f"{path}.pe_norm.bias"], norm.eps)
        tokens = torch.cat([p[:, :rows], p.new_zeros(1, bare, p.shape[-1]), p[:, rows:]], 1)
        tokens = in_order(tokens) if alone.ndim == 3 else tokens.unflatten(1, alone.shape[1:3])
        assert (y - alone - tokens).abs().max() <= 1e-10 * y.abs().max()


def shuffled(p: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    order = torch.rand(2, 16).argsort(1)
    return torch.stack([torch.cat([p[0, :1], p[0, 1:][row]]) for row in order])


@pytest.mark.parametrize("name", HUB)
@pytest.mark.parametrize("join", ["basic", "share", "unshare", "LaPE-sharing", "LaPE"])
def test_code_that_no_library_ships(name, join):
    pe, rows, bare = HUB[name][1:]
    model, original, x = stand_in(name), stand_in(name), torch.randn(2, 3, 16, 16)
    if join == "basic" and pe:
        with pytest.raises(lape.LapeError, match="no place where it adds a table"):
            lape.apply_(model, join, pe)
        return
    if join == "unshare" and "mae" in name:
        with pytest.raises(lape.LapeError, match="would repeat one frozen table"):
            lape.apply_(model, join, pe)
        return
    with torch.no_grad():
        before = run(original, x)
        lape.apply_(model, join, pe)
        done = lape.describe(model)
        assert (done.prefix_tokens, done.positioned_prefix_tokens, done.grid) == (rows + bare, rows, (4, 4))
        for parameter in model.lape.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        converted = run(model, x)
        assert torch.equal(converted, before) is (join == "basic")
        if join == "LaPE":
            assert_norms_return_the_formula(model, x, shuffled if "mae" in name else lambda p: p)
        folded = lape.fold_(copy.deepcopy(model))
        assert (run(folded, x) - converted).abs().max() <= 1e-5 * converted.abs().max()
        state = model.state_dict()
        twin = lape.apply_(stand_in(name), join, pe)
        twin.load_state_dict(state, strict=True)
        assert torch.equal(run(twin, x), converted)
        lape.remove_(model)
        assert_same_structure(model, original)
        assert torch.equal(run(model, x), before)


@pytest.mark.parametrize("name", HUB)
def test_every_new_parameter_gets_a_gradient(name):
    model = lape.apply_(stand_in(name).train(), "LaPE", HUB[name][1])
    y = run(model, torch.randn(2, 3, 16, 16))
    (y * torch.randn_like(y)).sum().backward()
    assert len(list(model.lape.parameters())) == 4 + (HUB[name][1] is not None)
    assert all(p.grad is not None and p.grad.any() for p in model.lape.parameters())


def test_an_entry_of_its_own_gets_the_same_positions():
    model = lape.apply_(stand_in("dinov2.models.vision_transformer.DinoVisionTransformer"))
    for size in ((16, 16), (8, 24)):
        x = torch.randn(2, 3, *size)
        assert (model.norm(model.get_intermediate_layers(x)) - model(x)).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------------- models of one's own


class Mine(nn.Module):
    def __init__(self, post=False):
        super().__init__()
        self.stem, self.where = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(1, 16, 32))
        kind = {"batch_first": True, "norm_first": not post, "dropout": 0.0, "dim_feedforward": 48}
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(32, 2, **kind) for _ in range(2)])

    def forward(self, x):
        x = self.stem(x).flatten(2).mT + self.where
        for layer in self.layers:
            x = layer(x)
        return x


WHERE = {"blocks": "layers", "attention": "self_attn", "table": "where", "grid": (4, 4), "patch_size": 4}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(base, "_HOSTS", dict(base._HOSTS))


def test_a_model_of_ones_own_is_registered_in_one_line(table):
    host = lape.register_host(Mine, **WHERE)
    assert host in lape.hosts()
    model = lape.apply_(Mine().eval())
    x = torch.randn(2, 3, 16, 16)
    assert_norms_return_the_formula(model, x)
    with torch.no_grad():  # where torch would take a fused path that passes the norm by
        without = model(x)
    assert (without - model(x)).abs().max() <= 1e-5
    with pytest.raises(lape.LapeError, match="registered already"):
        lape.register_host(Mine, **WHERE)
    with pytest.raises(lape.LapeError, match="does not know blockz: known are blocks, norm"):
        lape.register_host(Dino3, blockz="layers")


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ({"blocks": "levels"}, "has no 'levels' that holds its blocks"),
        ({"norm": "before"}, "has no blocks with 'before' and 'self_attn'"),
        ({"norm": "linear1"}, "must be a LayerNorm or an RMSNorm"),
        ({"grid": (5, 4)}, "expected 20 rows"),
        ({"grid": None}, "has no img_size or image_size: name it for lape.register_host"),
    ],
)
def test_paths_that_are_not_there_are_named(table, where, reason):
    lape.register_host(Mine, **{**WHERE, **where})
    with pytest.raises(lape.UnsupportedModelError, match=reason):
        lape.apply_(Mine())


def test_post_norm_stays_refused(table):
    lape.register_host(Mine, **WHERE)
    with pytest.raises(lape.UnsupportedModelError, match="post-norm"):
        lape.apply_(Mine(post=True))


def test_what_is_suggested_can_be_registered(table):
    model, x = Mine().eval(), torch.randn(1, 3, 16, 16)
    before = model(x)
    suggestion = lape.suggest_host(model, x)
    assert suggestion.where == {**WHERE, "patch_size": (4, 4)}
    line = "(Mine, blocks='layers', attention='self_attn', table='where', patch_size=(4, 4), grid=(4, 4))"
    assert str(suggestion) == f"lape.register_host{line}"
    assert torch.equal(model(x), before)
    lape.register_host(suggestion.root, **suggestion.where)
    assert lape.describe(lape.apply_(model)).joined == 2
    for cls in (Dino3, OpenClip, Deit3):
        found = lape.suggest_host(cls().eval(), x)
        assert not found.problems, found
    assert "not checked in a forward" in str(lape.suggest_host(OpenClip()))


def test_a_patch_is_as_far_as_the_next_one_where_patches_overlap():
    model = Mine().eval()
    model.stem = nn.Conv2d(3, 32, 7, 4, 3)
    assert lape.suggest_host(model, torch.randn(1, 3, 16, 16)).where == {**WHERE, "patch_size": (4, 4)}


def test_one_row_for_all_tokens_is_no_table():
    model, x = Mine().eval(), torch.randn(1, 3, 16, 16)
    model.where = nn.Parameter(torch.randn(1, 1, 32))
    assert lape.suggest_host(model, x).where["table"] is None


class Doubled(nn.TransformerEncoderLayer):
    def forward(self, src, **more):
        return super().forward(2 * src, **more)


def test_a_norm_must_read_what_enters_its_block():
    model = Mine().eval()
    for layer in model.layers:
        layer.__class__ = Doubled
    assert "norm1 does not read what enters its block" in str(lape.suggest_host(model, torch.randn(1, 3, 16, 16)))


def test_a_suggestion_leaves_every_module_in_its_own_mode():
    model = Mine().train()
    model.layers[0].norm1.eval()
    modes = [module.training for module in model.modules()]
    lape.suggest_host(model, torch.randn(1, 3, 16, 16))
    assert [module.training for module in model.modules()] == modes


def test_why_nothing_is_suggested():
    x = torch.randn(1, 3, 16, 16)
    assert "post-norm" in str(lape.suggest_host(Mine(post=True).eval(), x))
    assert "no list of two or more blocks" in str(lape.suggest_host(nn.Linear(2, 2)))
    assert "does not take this image" in str(lape.suggest_host(Mine(), torch.randn(1, 4, 16, 16)))
    with pytest.raises(lape.LapeError, match="is no model"):
        lape.suggest_host("vit")


# --------------------------------------------------------------------------------------------- what only the user knows


def encoder(**more) -> nn.TransformerEncoder:
    torch.manual_seed(1)
    kind = {"batch_first": True, "norm_first": True, "dropout": 0.0, "dim_feedforward": 48, **more}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, **kind), 2, enable_nested_tensor=False).eval()


def test_torch_encoder_by_its_grid():
    model, x = encoder(), torch.randn(2, 12, 32)
    before = model(x)
    lape.apply_(model, "LaPE", "learnable", grid=(3, 4))
    assert_norms_return_the_formula(model, x)
    with torch.no_grad():
        assert (model(x) - lape.fold_(copy.deepcopy(model))(x)).abs().max() <= 1e-5
        assert not torch.allclose(model(x), before, atol=1e-4)
    with pytest.raises(lape.LapeError, match="13 tokens arrived, the position is for 12"):
        model(torch.randn(2, 13, 32))
    assert torch.equal(lape.remove_(model)(x), before)
    for more, given, reason in (
        ({}, None, r"lape.apply_\(model, grid=\(rows, columns\)\)"),
        ({"norm_first": False}, (3, 4), "norm_first=True"),
        ({"batch_first": False}, (3, 4), "batch_first=True"),
    ):
        with pytest.raises(lape.UnsupportedModelError, match=reason):
            lape.apply_(encoder(**more), "LaPE", "learnable", grid=given)
    with pytest.raises(lape.LapeError, match="knows its own grid, leave it out"):
        lape.apply_(make(), grid=(4, 4))


def swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    torch.manual_seed(1)
    return SwinTransformer([4, 4], 16, [1, 2], [2, 4], [3, 3], stochastic_depth_prob=0.0, num_classes=5).eval()


@pytest.mark.parametrize(
    ("join", "pe"),
    [("basic", "learnable"), ("share", "2D_sin"), ("unshare", "learnable"), ("LaPE", "learnable"), ("LaPE", None)],
)
def test_torchvision_swin_by_its_grid(join, pe, tmp_path):
    model, original, x = swin(), swin(), torch.randn(2, 3, 24, 20)
    with torch.no_grad():
        lape.apply_(model, join, pe, grid=(6, 5))
        for parameter in model.lape.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        y = model(x)
        assert not torch.allclose(y, original(x), atol=1e-4)
        for other in (lape.fold_(copy.deepcopy(model)), lape.load(lape.save(model, tmp_path / "model"))):
            assert (other(x) - y).abs().max() <= 1e-5 * y.abs().max()
        if join == "LaPE" and pe:
            p, seen = model.lape.table_0.double(), []
            twin = copy.deepcopy(model).double()
            for block in (*twin.features[1], *twin.features[3]):
                block.norm1.register_forward_hook(lambda m, args, y: seen.append((plain(m, *args), y)))
            twin(x.double())
            for number, (alone, y) in enumerate(seen):
                if number == 1:
                    maps = F.pad(p.unflatten(1, (6, 5)), (0, 0, 0, 1))
                    corners = [maps[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
                    merging = twin.features[2]
                    p = F.linear(merging.norm(torch.cat(corners, -1)), merging.reduction.weight).flatten(1, 2)
                norm = twin.lape.norms[str(number)]
                p = F.layer_norm(p, p.shape[-1:], norm.weight, norm.bias, 1e-5)
                assert (y - alone - p.unflatten(1, y.shape[1:3])).abs().max() <= 1e-10 * y.abs().max()
        assert torch.equal(lape.remove_(model)(x), original(x))


def test_torchvision_swin_without_a_grid_says_what_to_do():
    with pytest.raises(lape.UnsupportedModelError, match=r"lape.apply_\(model, grid=\(56, 56\)\)"):
        lape.apply_(swin())
    with pytest.raises(lape.LapeError, match=r"grid=\(6, 0\) is no grid"):
        lape.apply_(swin(), grid=(6, 0))


# ---------------------------------------------------------------------------------------------- parts of larger models


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_tower, self.other_tower, self.head = make(), make_foreign("torchvision"), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.cat([self.vision_tower(x), self.other_tower(x)], 1))


def test_a_tower_is_converted_by_its_name():
    model, original, x = Towers().eval(), Towers().eval(), torch.randn(2, 3, 16, 16)
    original.load_state_dict(model.state_dict())
    before = model(x)
    with pytest.raises(
        lape.UnsupportedModelError, match=r"2 convertible models \(vision_tower, other_tower\): name one, .*at='v"
    ):
        lape.apply_(model)
    with pytest.raises(
        lape.LapeError, match=r"at='tower': this Towers has no such part; it consists of vision_tower, "
    ):
        lape.apply_(model, at="tower")
    lape.apply_(model, at="vision_tower")
    assert conversion_of(model).path == "vision_tower."
    assert not torch.allclose(model(x), before)
    lape.remove_(model)
    assert_same_structure(model, original)
    assert torch.equal(model(x), before)


def test_a_whole_multimodal_model_keeps_its_tower_through_files(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=8)
    model = lape.apply_(transformers.CLIPModel(config).eval(), at="vision_model")
    x = torch.randn(2, 3, 16, 16)
    expected = output(model.vision_model, x)
    model.save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "theirs", lape.save(model, tmp_path / "ours")):
        assert torch.equal(output(lape.load(path).vision_model, x), expected)
