"""Further encoders of transformers, tiny: windows, maps, detection tokens, queries, packed images, sound and video.

What a norm returns inside a forward in float64 is compared with the equations, from the numbers of the state dict; how
the rows of a table stand in the batch of a block is written down here, not asked for.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from formula import assert_host_keys, assert_same_structure, of_position, plain
from zoo import SMALL, WIDE, make_family, make_wide, wide_output

import lape
from lape.convert.converted import conversion_of
from lape.host.base import without_values

transformers = pytest.importorskip("transformers", minversion="5.20")
NO_INPUT = ("vitdet", "lw_detr", "sam3", "sam2", "mllama")  # which have no place where a new table could be added
CASES = [
    (family, join, pe)
    for place, (family, (*_, needed, _rows, _bare, _beside)) in enumerate(WIDE.items())
    for join in ("basic", ("share", "unshare", "LaPE-sharing")[place % 3], "LaPE")  # each three times in ten families
    for pe in dict.fromkeys((needed, "learnable"))
    if not (join == "basic" and pe and family in (*NO_INPUT, "llama4"))
    and not (join in ("share", "unshare") and family == "timesformer")  # whose two attentions a block read one stream
]


def shake(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lape." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


def raw_rows(model: torch.nn.Module) -> torch.Tensor:
    """P (1, R, D) of the grid of the images, from the numbers alone."""
    conversion, family = conversion_of(model), type(model).__module__.split(".")[-2]
    state = model.state_dict()
    if f"{conversion.path}lape.table_0" in state:
        return state[f"{conversion.path}lape.table_0"]
    table = state[f"{conversion.path}{conversion.anatomy.table_slot}"]
    table = table.reshape(1, -1, table.shape[-1])
    if family == "mllama":
        return (1 - state["gated_positional_embedding.gate"].tanh()) * table
    if family == "timesformer":
        times = state["embeddings.time_embeddings"]
        rows = [table[:, 1 + place] + times[:, frame] for frame in range(3) for place in range(16)]
        return torch.stack([table[:, 0], *rows], dim=1)
    if family == "vitpose_backbone":
        return table[:, 1:] + table[:, :1]
    if family in ("vitdet", "lw_detr"):  # pretrained on 3 x 3
        maps = table[:, 1:].unflatten(1, (3, 3)).permute(0, 3, 1, 2).float()
        maps = F.interpolate(maps, size=(4, 4), mode="bicubic", align_corners=False)
        return maps.flatten(2).mT.to(table.dtype)
    if family == "sam3":  # pretrained on 2 x 2, tiled
        rows = [table[:, (row % 2) * 2 + column % 2] for row in range(4) for column in range(4)]
        return torch.stack(rows, dim=1)
    return table


def as_in_batch(family: str, layer: int, p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Rows (1, R, D) where they belong in what a norm returns."""
    if family in ("vitdet", "sam3"):
        return p.unflatten(1, (4, 4)).expand_as(y)
    if family == "timesformer":  # along time: each place of each video; then each frame, behind the class token
        along = [[1 + frame * 16 + place for frame in range(3)] for place in range(16)]
        within = [[0, *(1 + frame * 16 + place for place in range(16))] for frame in range(3)]
        return p[0, within if layer % 2 else along].repeat(2, 1, 1)
    if family == "mllama":  # 17 tokens of each of 4 tiles, padded to 24
        return F.pad(p, (0, 0, 0, 7)).repeat(2, 4, 1)
    if family == "eomt":
        return F.pad(p, (0, 0, 3 + 5 * (layer == 2), 0)).expand_as(y)
    if family == "eomt_dinov3":
        return F.pad(p, (0, 0, 5 * (layer == 2), 0)).expand_as(y)
    if family in ("lw_detr", "rf_detr"):
        prefix = family == "rf_detr"
        cells = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
        windows = torch.stack([p[0, [0] * prefix + [cell + prefix for cell in window]] for window in cells])
        windows = windows if y.shape[0] == 8 else windows.flatten(0, 1)[None]
        return windows.repeat(y.shape[0] // len(windows), 1, 1)
    return p.expand_as(y)


@pytest.mark.matrix
@pytest.mark.parametrize(("family", "join", "pe"), CASES)
def test_five_equalities(family, join, pe, tmp_path):
    _, _, inputs, _, rows, bare, beside = WIDE[family]
    model, original, x = make_wide(family), make_wide(family), inputs()
    with torch.no_grad():
        before = wide_output(original, x)
        lape.apply_(model, join, pe)
        assert_host_keys(model, original, parameters=family not in ("vitpose_backbone", "timesformer", *NO_INPUT))
        done = lape.describe(model)
        assert (done.prefix_tokens, done.positioned_prefix_tokens) == (rows + bare, rows)
        assert (beside or "") in (done.beside or "")
        shake(model)
        converted = wide_output(model, x)
        if join == "basic" and pe is None:
            assert torch.equal(converted, before)
        else:
            assert not torch.allclose(converted, before, atol=1e-5)
        if join == "LaPE" and family in ("hiera", "sam2"):
            assert_attention_gets_the_formula(copy.deepcopy(model).double(), family, x[0].double())
        elif join == "LaPE":
            assert_norms_return_the_formula(copy.deepcopy(model).double(), family, x)
        others = [lape.fold_(copy.deepcopy(model)), copy.deepcopy(model)]
        if hasattr(transformers, WIDE[family][0]):
            others.append(lape.load(lape.save(model, tmp_path / "model")))
        for other in others:
            assert (wide_output(other, x) - converted).abs().max() <= 1e-5 * converted.abs().max()
        lape.remove_(model)
        assert_same_structure(model, original)
        model.load_state_dict(original.state_dict())
        assert torch.equal(wide_output(model, x), before)


def assert_norms_return_the_formula(model, family, x) -> None:
    """y_l = LN_l(x_l) + P_(l+1) in every block, P_(l+1) = LN'_l(P_l), zero for tokens that own no row."""
    conversion, seen = conversion_of(model), []
    anatomy, state = conversion.anatomy, lape.to_reference_state_dict(model)
    norms = [anatomy.root.get_submodule(anatomy.norm_of(layer)) for layer in range(len(anatomy.blocks))]
    for norm in norms:
        norm.register_forward_hook(lambda norm, args, y: seen.append((plain(norm, *args), y)))
    wide_output(model, tuple(a.double() if a.is_floating_point() else a for a in x))
    assert len(seen) == len(norms)
    p = raw_rows(model)
    for layer, (path, norm, (alone, y)) in enumerate(zip(anatomy.blocks, norms, seen, strict=True)):
        gain, shift = (state[f"{conversion.path}{path}.pe_norm.{name}"] for name in ("weight", "bias"))
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        p = F.layer_norm(p, p.shape[-1:], gain, shift, eps)
        expected = alone + as_in_batch(family, layer, p, y)
        assert (y - expected).abs().max() <= 1e-10 * expected.abs().max()


def assert_attention_gets_the_formula(model, family, x) -> None:
    """Its norm feeds the stream at a border, so attention alone gets LN_l(x_l) + P_(l+1); P is pooled as the stream."""
    conversion, normed, attended = conversion_of(model), [], []
    anatomy, state, prefix = conversion.anatomy, lape.to_reference_state_dict(model), conversion.path
    layers = [anatomy.root.get_submodule(path) for path in anatomy.blocks]
    for layer in layers:
        getattr(layer, anatomy.norm).register_forward_hook(lambda _m, _a, y: normed.append(y))
        layer.attn.qkv.register_forward_pre_hook(lambda _m, args: attended.append(args[0]))
    model(x)
    normed = [y for y in normed if len(y) == len(x)]  # a position passes the norm of a border, too
    grid = (16, 16) if family == "hiera" else (14, 12)
    if "lape.table_0" in state or family == "hiera":
        p = raw_rows(model)
    elif prefix + "new_table" in state:
        p = state[prefix + "new_table"]
    else:
        image = F.interpolate(state[prefix + "pos_embed"], size=grid, mode="bicubic")
        window = state[prefix + "pos_embed_window"]
        cells = itertools.product(range(grid[0]), range(grid[1]))
        p = torch.stack([image[:, :, i, j] + window[:, :, i % 2, j % 2] for i, j in cells], 1)
    for i, (path, layer) in enumerate(zip(anatomy.blocks, layers, strict=True)):
        before = layers[i - 1]
        if i and hasattr(before, "proj"):
            p = before.proj(getattr(before, anatomy.norm)(p)).unflatten(1, (grid[0] // 2, 2, grid[1] // 2, 2))
            p, grid = p.amax((2, 4)).flatten(1, 2), (grid[0] // 2, grid[1] // 2)
        gain, shift = (state[f"{prefix}{path}.pe_norm.{name}"] for name in ("weight", "bias"))
        p = F.layer_norm(p, p.shape[-1:], gain, shift, getattr(layer, anatomy.norm).eps)
        if family == "hiera":
            expected = normed[i] + p[:, in_order_of_hiera(grid)]
        else:
            from transformers.models.sam2.modeling_sam2 import window_partition

            expected = normed[i] + p.unflatten(1, grid)
            expected = window_partition(expected, layer.window_size)[0] if layer.window_size else expected
        assert (attended[i] - expected).abs().max() <= 1e-10 * expected.abs().max()


def in_order_of_hiera(grid: tuple[int, int]) -> list[int]:
    """Finest places within windows of 4 x 4, then coarser ones, then windows; of fewer levels where it was pooled."""
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1)]
    fine, coarse = pairs if grid[0] > 4 else [(0, 0)], pairs if grid[0] > 8 else [(0, 0)]
    size = 2 if grid[0] > 4 else 1
    scale = size * (2 if grid[0] > 8 else 1)
    windows = itertools.product(range(grid[0] // scale), range(grid[1] // scale))
    places = itertools.product(fine, coarse, list(windows))
    return [
        (R * scale + a2 * size + a1) * grid[1] + C * scale + b2 * size + b1 for (a1, b1), (a2, b2), (R, C) in places
    ]


@pytest.mark.parametrize("family", WIDE)
def test_every_new_parameter_gets_a_gradient(family):
    model = lape.apply_(make_wide(family).train(), "LaPE", WIDE[family][3])
    y = wide_output(model, WIDE[family][2]())
    (y * torch.randn_like(y)).sum().backward()
    new = of_position(model)
    assert len(new) == 1 + 2 * lape.describe(model).blocks
    assert all(p.grad is not None and p.grad.any() for p in new.values()), family


@pytest.mark.parametrize("family", ["dinov3_vit", "internvl", "lw_detr", "vitdet", "yolos", "vivit"])
def test_activations_are_recomputed(family):
    model = lape.apply_(make_wide(family), "LaPE", WIDE[family][3]).train()
    x = WIDE[family][2]()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)  # of what the host does at random in training
        wide_output(model, x).square().sum().backward()
        gradients.append([p.grad.clone() for p in of_position(model).values()])
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * one.abs().max())


@pytest.mark.parametrize(("family", "size"), [("dinov3_vit", (8, 32)), ("yolos", (24, 16)), ("vitdet", (24, 8))])
def test_images_of_another_size_get_the_position_of_their_own_grid(family, size):
    model = lape.apply_(make_wide(family), "LaPE", WIDE[family][3])
    shake(model)
    anatomy, seen = conversion_of(model).anatomy, []
    getattr(anatomy.root.get_submodule(anatomy.blocks[-1]), anatomy.norm).register_forward_hook(
        lambda norm, args, y: seen.append(y - plain(norm, *args))
    )
    wide_output(model, (torch.randn(2, 3, *size),))
    expected = lape.positions(model, size)[-1]
    assert (seen[0][0].reshape(expected.shape) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_packed_images_each_get_the_position_of_their_own_grid():
    model = lape.apply_(make_wide("siglip2"))
    shake(model)
    x, mask = torch.randn(2, 16, 48), torch.ones(2, 16).long()
    mask[1, 6:] = 0
    together = model(x, mask, torch.tensor([[4, 4], [2, 3]])).last_hidden_state
    whole = model(x[:1], mask[:1], torch.tensor([[4, 4]])).last_hidden_state
    small = model(x[1:, :6], mask[1:, :6], torch.tensor([[2, 3]])).last_hidden_state
    assert torch.allclose(together[:1], whole, atol=1e-5)
    assert torch.allclose(together[1:, :6], small, atol=1e-5)
    other = model(x[1:, :6], mask[1:, :6], torch.tensor([[3, 2]])).last_hidden_state
    assert not torch.allclose(other, small, atol=1e-3)
    plainly = lape.remove_(lape.apply_(make_wide("siglip2"), "basic"))
    assert torch.equal(
        plainly(x, mask, torch.tensor([[4, 4], [2, 3]]))[0],
        make_wide("siglip2")(x, mask, torch.tensor([[4, 4], [2, 3]]))[0],
    )


def packed_naflex(grids: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Patches of images of these grids with their places, padded to 16."""
    coordinates, valid = torch.zeros(len(grids), 16, 2).long(), torch.zeros(len(grids), 16).bool()
    for i, grid in enumerate(grids):
        places = torch.cartesian_prod(*map(torch.arange, grid))
        coordinates[i, : len(places)], valid[i, : len(places)] = places, True
    return {"patches": torch.randn(len(grids), 16, 48), "patch_coord": coordinates, "patch_valid": valid}


def of_packed(host: str, join: str = "LaPE", pe: str | None = None):
    """A converted model, and a function of grids that gives what it makes of images of them, packed."""
    if host == "siglip2":
        model = lape.apply_(make_wide("siglip2"), join, pe)

        def forward(grids):
            mask = torch.tensor([[int(i < rows * columns) for i in range(16)] for rows, columns in grids])
            return model(torch.randn(len(grids), 16, 48), mask, torch.tensor(grids)).last_hidden_state
    else:
        model = lape.apply_(make_family("NaFlexViT"), join, pe)

        def forward(grids):
            return model(packed_naflex(grids))

    shake(model)
    return model, forward


@pytest.mark.parametrize("join", ["LaPE", "share"])
@pytest.mark.parametrize("host", ["siglip2", "NaFlexViT"])
def test_layers_of_packed_images_are_recomputed_to_the_bit(host, join):
    """Also where an image has as many tokens as the model's own grid, and after a batch of one grid."""
    model, forward = of_packed(host, join)
    grids, gradients = [(4, 4), (2, 3), (2, 8)], []
    for recomputed in (False, True):
        if recomputed:
            enable = "set_grad_checkpointing" if host == "NaFlexViT" else "activation_checkpointing_enable"
            getattr(model, enable)()
        model.train().zero_grad()
        torch.manual_seed(0)
        forward([(2, 8)] * 3).square().sum().backward()
        forward(grids).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    one, other = forward(grids), forward(grids)
    with pytest.raises(lape.LapeError, match="cannot tell of which forward"):
        (one.sum() + other.sum()).backward()


@pytest.mark.parametrize(("host", "pe"), [("siglip2", "PEG"), ("NaFlexViT", "PEG"), ("NaFlexViT", "2D_RPE")])
def test_kinds_for_one_grid_refuse_images_of_several(host, pe):
    _, forward = of_packed(host, "basic", pe)
    assert forward([(4, 4)] * 2).isfinite().all()
    for grids in ([(4, 4), (2, 8)], [(2, 3), (2, 3)]):
        with pytest.raises(lape.LapeError, match="images of several grids, or padded ones, are packed"):
            forward(grids)


@pytest.mark.parametrize("family", ["idefics2", "idefics3", "smolvlm"])
def test_rows_that_a_host_picks_for_an_image_are_those_that_it_gets(family):
    """An image of 3 x 2 patches beside one of 4 x 4: rows of the table by the place of each patch in the image."""
    model = lape.apply_(make_wide(family))
    shake(model)
    mask = torch.ones(2, 4, 4).bool()
    mask[1, 3:] = mask[1, :, 2:] = False
    anatomy, seen = conversion_of(model).anatomy, []
    getattr(anatomy.root.get_submodule(anatomy.blocks[-1]), anatomy.norm).register_forward_hook(
        lambda norm, args, y: seen.append(y - plain(norm, *args))
    )
    model(torch.randn(2, 3, 16, 16), mask)
    (added,), p = seen, lape.positions(model)[-1]
    assert torch.allclose(added[0], p, atol=1e-5)
    for row, column in itertools.product(range(3), range(2)):  # its upper left corner lies in (row 4/3, column 4/2)
        assert torch.allclose(added[1, row * 4 + column], p[row * 4 // 3 * 4 + column * 2], atol=1e-5)
    if family == "idefics2":
        assert lape.positions(model, (12, 8)).shape == (2, 6, 32)


def test_a_video_has_numbers_along_three_axes():
    from lape.look.probe import attention
    from lape.look.similarity import Maps

    model = lape.apply_(make_wide("vivit"))
    assert lape.grid(model) == (2, 4, 4)
    assert lape.positions(model, (8, 16, 24)).shape == (2, 1 + 4 * 4 * 6, 32)
    assert lape.correlation(model).shape == (2, 32, 32)
    with pytest.raises(lape.LapeError, match=r"size=16 is no image size: give \(frames, height, width\)"):
        lape.positions(model, 16)
    with pytest.raises(lape.LapeError, match="rows and columns, the grid is 2 x 4 x 4"):
        Maps.of(model)
    with pytest.raises(lape.LapeError, match="takes videos"):
        attention(model, torch.randn(1, 3, 16, 16))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["divided_space_time", "joint_space_time", "space_only"])
def test_timesformer_in_each_of_its_ways_of_attending(attention):
    """Its stream has the frames of a place side by side; with space_only, each frame is an image by itself."""
    config = transformers.TimesformerConfig(**SMALL, num_frames=3, attention_type=attention)
    original, x = transformers.TimesformerModel(config).eval(), torch.randn(2, 3, 3, 16, 16)
    model, entered = lape.apply_(copy.deepcopy(original), "basic", "learnable"), []
    shake(model)
    table = model.state_dict()["embeddings.position_embeddings" if attention == "space_only" else "lape.table_0"]
    bare = copy.deepcopy(original)
    for parameter in (bare.embeddings.position_embeddings, getattr(bare.embeddings, "time_embeddings", None)):
        if parameter is not None:
            parameter.zero_()
    for one in (bare, model):
        one.encoder.layer[0].register_forward_pre_hook(lambda _m, args: entered.append(args[0]))
        one(x)
    order = [0, *(1 + frame * 16 + place for place in range(16) for frame in range(3))]
    expected = entered[0] + (table if attention == "space_only" else table[:, order])
    assert (entered[1] - expected).abs().max() <= 1e-5 * expected.abs().max()
    layers = 4 if attention == "divided_space_time" else 2
    assert lape.describe(lape.apply_(original)).joined == layers
    if attention == "divided_space_time":
        with pytest.raises(lape.LapeError, match="several attentions"):
            lape.apply_(lape.remove_(original), "share")
        return
    shared, reached = lape.apply_(lape.remove_(original), "share"), []
    shared.encoder.layer[1].layernorm_before.register_forward_hook(lambda _m, args, _y: reached.append(args[0]))
    shared.encoder.layer[1].register_forward_pre_hook(lambda _m, args: reached.append(args[0]))
    shared(x)
    p = lape.positions(shared)[1:]
    p = p if attention == "space_only" else p[:, order]
    assert torch.allclose(reached[1] - reached[0], p.expand_as(reached[0]), atol=1e-5)


def test_the_sine_of_videomae_is_1d_sin():
    host, x = make_wide("videomae"), WIDE["videomae"][2]()
    expected = wide_output(host, x)
    model = lape.apply_(copy.deepcopy(host), "basic", "1D_sin")
    assert torch.allclose(wide_output(model, x), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        ("VideomtForUniversalSegmentation", "VideomtConfig", "run once a frame"),
        ("VideoPrismVisionModel", "VideoPrismVisionConfig", "a spatial and a temporal encoder with a table each"),
        ("Swinv2Model", "Swinv2Config", "behind attention"),
    ],
)
def test_refused_with_the_true_reason(model, config, reason):
    with without_values():
        made = getattr(transformers, model)(getattr(transformers, config)())
    with pytest.raises(lape.UnsupportedModelError, match=reason):
        lape.apply_(made)


@pytest.mark.parametrize(
    ("family", "join", "pe", "reason"),
    [
        ("vivit", "basic", "2D_RPE", "one grid of rows and columns"),
        ("vivit", "LaPE", "2D_sin", "rows and columns, the grid is"),
        ("yolos", "basic", "PEG", "one grid of rows and columns"),
        ("vitdet", "basic", "learnable", "no place where it adds a table"),
        ("dinov3_vit", "LaPE", None, "no position table of its own, its rotary"),
        ("videomae", "LaPE", None, "position_embeddings computes its position"),
    ],
)
def test_kinds_that_would_not_be_what_they_say_are_refused(family, join, pe, reason):
    model, original = make_wide(family), make_wide(family)
    with pytest.raises(lape.LapeError, match=reason):
        lape.apply_(model, join, pe)
    assert_same_structure(model, original)
