"""Swin, of timm and transformers, and MViT: a chain of norms within a stage, the host's own merging at its border."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import TOLERANCE, assert_same_structure, of_position, plain, shake_position
from timm.optim import create_optimizer_v2
from zoo import output

import lape
from lape.convert.converted import conversion_of
from lape.core.joins import JOINS

TIMM = {
    "img_size": (32, 24),
    "patch_size": 4,
    "embed_dim": 16,
    "depths": (2, 1, 1),
    "num_heads": (2, 4, 4),
    "window_size": 3,
    "num_classes": 5,
}
HF = {
    "image_size": 24,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 3,
    "drop_path_rate": 0.0,
}
HOSTS = ("timm", "Hugging Face", "Hugging Face with a table", "Donut", "MaskFormer")
CASES = [
    (host, join, pe)
    for host in HOSTS
    for join in ("basic", "share", "unshare", "LaPE-sharing", "LaPE")
    for pe in ("learnable", "2D_sin", None)
    if not (join == "unshare" and pe == "2D_sin") and not (pe is None and host != "Hugging Face with a table")
]


def make(host: str) -> torch.nn.Module:
    torch.manual_seed(1)
    if host == "timm":
        model: torch.nn.Module = timm.create_model("swin_tiny_patch4_window7_224", **TIMM)
    else:
        transformers = pytest.importorskip("transformers", minversion="5")
        if host in ("Donut", "MaskFormer"):
            name = {"Donut": "DonutSwin", "MaskFormer": "MaskFormerSwin"}[host]
            folder = "donut.modeling_donut_swin" if host == "Donut" else "maskformer.modeling_maskformer_swin"
            module = __import__(f"transformers.models.{folder}", fromlist=["x"])
            config = getattr(transformers, f"{name}Config", None) or getattr(module, f"{name}Config")
            model = getattr(module, f"{name}Model")(config(**HF))
        else:
            own = {"use_absolute_embeddings": host != "Hugging Face"}
            model = transformers.SwinModel(transformers.SwinConfig(**HF, **own))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def image(host: str) -> torch.Tensor:
    return torch.randn(2, 3, *((32, 24) if host == "timm" else (24, 24)))


def parts(model: torch.nn.Module, host: str) -> list[tuple[torch.nn.Module | None, list[torch.nn.Module], str]]:
    """(what merges into the stage, its blocks, the norm's name) of each stage; written down here, not asked for."""
    if host == "timm":
        return [(s.downsample if i else None, list(s.blocks), "norm1") for i, s in enumerate(model.layers)]
    stages = [m for m in model.modules() if type(m).__name__.endswith("SwinStage")]
    before = [None, *(s.downsample for s in stages)]
    return [(m, list(s.blocks), "layernorm_before") for m, s in zip(before, stages, strict=False)]


def merged(merging: torch.nn.Module, p: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """2 x 2 neighbours side by side, the host's norm and reduction on them, by hand; odd sides get zeros."""
    maps = F.pad(p.unflatten(1, grid), (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
    corners = [(0, 0), (1, 0), (0, 1), (1, 1)]  # (row, column), down the left side first
    joined = torch.cat([maps[:, row::2, column::2] for row, column in corners], dim=-1)
    norm = merging.norm
    y = F.layer_norm(joined, norm.normalized_shape, norm.weight, norm.bias, norm.eps) @ merging.reduction.weight.T
    return y.flatten(1, 2)


def expected_positions(model: torch.nn.Module, host: str, join: str) -> list[torch.Tensor]:
    """What each block receives, from the numbers of the state dict and the formulas."""
    state = lape.to_reference_state_dict(model)
    grid = (8, 6) if host == "timm" else (6, 6)
    slot = "pos_embed" if host == "timm" else "embeddings.position_embeddings"
    gains = [t for n, t in state.items() if n.endswith("pe_norm.weight")]
    shifts = [t for n, t in state.items() if n.endswith("pe_norm.bias")]
    raw = chain = state[slot if join != "unshare" else f"{slot}0"]
    found: list[torch.Tensor] = []
    for merging, blocks, norm_name in parts(model, host):
        if merging is not None:
            raw, chain = merged(merging, raw, grid), merged(merging, chain, grid)
            grid = tuple((side + 1) // 2 for side in grid)
        for block in blocks:
            layer = len(found)
            norm = getattr(block, norm_name, None)
            if join in ("LaPE", "LaPE-sharing"):
                width, eps = raw.shape[-1:], norm.eps
                source = chain if join == "LaPE" else raw
                chain = F.layer_norm(source, width, gains[layer], shifts[layer], eps)
                found.append(chain)
            else:
                found.append(state[f"{slot}{layer}"] if join == "unshare" else raw)
    return found


@pytest.mark.matrix
@pytest.mark.parametrize(("host", "join", "pe"), CASES)
def test_five_equalities(host, join, pe, tmp_path):
    model, original, x = make(host), make(host), image(host)
    saved_as = {"name": "swin_tiny_patch4_window7_224", **TIMM} if host == "timm" else {}
    with torch.no_grad():
        before = output(original, x)
        lape.apply_(model, join, pe)
        shake_position(model)
        converted = output(model, x)
        check_blocks(copy.deepcopy(model), host, join, x)
        tolerance = TOLERANCE * converted.abs().max()
        folded = lape.fold_(copy.deepcopy(model))
        others = [folded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        if host not in ("Donut", "MaskFormer"):  # which are parts of models
            others.append(lape.load(lape.save(model, tmp_path / "model", **saved_as)))
            others.append(lape.load(lape.save(folded, tmp_path / "folded", **saved_as)))
        for other in others:
            assert (output(other, x) - converted).abs().max() <= tolerance
        lape.remove_(model)
        assert_same_structure(model, original)
        model.load_state_dict(original.state_dict())
        assert torch.equal(output(model, x), before)


def check_blocks(model, host, join, x) -> None:
    """The stream into each block, what its norm makes of it, and what positions() says, against the formulas."""
    expected = expected_positions(model, host, join)
    told = [row for s in range(len(parts(model, host))) for row in lape.positions(model, stage=s)]
    for p, q in zip(expected, told, strict=True):
        assert (p - q).abs().max() <= 1e-5 * p.abs().max().clamp(min=1)
    site, norm_name = JOINS[join].site, parts(model, host)[0][2]
    blocks = [block for _, blocks, _ in parts(model, host) for block in blocks]
    entered, normed, embedded = [], [], []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        getattr(block, norm_name).register_forward_hook(lambda _m, _a, y: normed.append(y))
    embed = model.patch_embed if host == "timm" else model.embeddings.norm
    embed.register_forward_pre_hook(lambda m, args: embedded.append(plain(m, args[0])))
    output(model, x)
    first = embedded[0] + (expected[0].reshape(1, *embedded[0].shape[1:]) if site == "input" else 0)
    assert (entered[0] - first).abs().max() <= 1e-6 * first.abs().max()
    for block, h, y, p in zip(blocks, entered, list(normed), expected, strict=True):
        token_norm = partial(plain, getattr(block, norm_name))
        p = p.reshape(1, *h.shape[1:])
        wanted = {"input": token_norm(h), "block": token_norm(h + p), "norm": token_norm(h) + p}[site]
        assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("host", HOSTS)
def test_parameters_and_gradients(host):
    plain = make(host)
    model = lape.apply_(make(host), "LaPE", "learnable").eval()  # in training, drop path may leave the last block out
    widths = [16, 16, 32, 64] if host == "timm" else [16, 16, 32]
    table = 48 * 16 if host == "timm" else 36 * 16
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert count == sum(2 * width for width in widths) + (0 if "table" in host else table)
    y = output(model, image(host))
    (y * torch.randn_like(y)).sum().backward()
    new = of_position(model)
    assert len(new) == 1 + 2 * len(widths)
    assert all(p.grad is not None and p.grad.any() for p in new.values())
    if host == "timm":
        groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5).param_groups
        ids = {id(p) for p in new.values()}
        assert all(group["weight_decay"] == 0 for group in groups for p in group["params"] if id(p) in ids)
        assert sum(id(p) in ids for group in groups for p in group["params"]) == len(ids)


@pytest.mark.parametrize("host", ["timm", "Hugging Face"])
def test_on_its_relative_bias(host, tmp_path):
    model, original, x = make(host), make(host), image(host)
    with torch.no_grad():
        lape.apply_(model)
        assert lape.describe(model).pe == "2D_RPE"
        assert lape.describe(model).beside is None
        shake_position(model)
        y = output(model, x)
        state = lape.to_reference_state_dict(model)
        gains = [t for n, t in state.items() if n.endswith("pe_norm.weight")]
        shifts = [t for n, t in state.items() if n.endswith("pe_norm.bias")]
        by_hand = copy.deepcopy(original)
        blocks = [block for _, blocks, _ in parts(by_hand, host) for block in blocks]
        for theirs, block, gain, shift in zip(parts_flat(model, host), blocks, gains, shifts, strict=True):
            owner = block.attn if host == "timm" else block.attention.relative_position_bias
            name = "_get_rel_pos_bias" if host == "timm" else "forward"
            owner.load_state_dict(theirs, strict=False)
            bias = getattr(owner, name)()
            bias = (bias - bias.mean(-1, keepdim=True)) / (bias.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
            setattr(owner, name, lambda b=bias * gain + shift: b)
        assert (output(by_hand, x) - y).abs().max() <= TOLERANCE * y.abs().max()
        assert (output(lape.fold_(copy.deepcopy(model)), x) - y).abs().max() <= TOLERANCE * y.abs().max()
        with pytest.raises(lape.LapeError, match="biases of different heads or windows"):
            lape.position_bias(model)
        lape.remove_(model)
        assert_same_structure(model, original)


def parts_flat(model, host) -> list[dict[str, torch.Tensor]]:
    blocks = [block for _, blocks, _ in parts(model, host) for block in blocks]
    owners = [block.attn if host == "timm" else block.attention.relative_position_bias for block in blocks]
    return [owner.state_dict() for owner in owners]


def test_a_border_is_computed_once_a_forward_and_anew_after_a_step():
    model, x = lape.apply_(make("timm"), "LaPE", "learnable"), image("timm")
    shake_position(model)
    calls: list[torch.Size] = []
    merging = model.layers[1].downsample
    merging.register_forward_hook(lambda _m, args, _y: calls.append(args[0].shape))
    model(x)
    assert calls.count(torch.Size([1, 8, 6, 16])) == 1
    with torch.no_grad():
        for parameter in (merging.reduction.weight, merging.norm.weight):
            parameter.mul_(1.5)
        assert torch.equal(model(x), copy.deepcopy(model)(x))
    generated = lape.apply_(make("timm"), "basic", "PEG")
    assert not torch.equal(generated(x), make("timm")(x))
    assert torch.equal(lape.remove_(generated)(x), make("timm")(x))


def test_one_stage_or_one_clear_line():
    model = lape.apply_(make("timm"), "LaPE", "learnable")
    assert lape.positions(model, stage=1).shape == (1, 12, 32)
    assert lape.correlation(model, stage=0).shape == (2, 48, 48)
    for stage in (None, 3, -1):
        with pytest.raises(lape.LapeError, match="name a stage from 0 to 2"):
            lape.positions(model, stage=stage)
    with pytest.raises(lape.LapeError, match="one size"):
        lape.positions(model, (64, 48), stage=0)
    with pytest.raises(lape.LapeError, match="one size"):
        model.set_input_size(img_size=(64, 48))
    with pytest.raises(lape.LapeError, match="leave stage out"):
        lape.positions(lape.apply_(timm.create_model("vit_tiny_patch16_224", depth=1)), stage=0)
    with pytest.raises(lape.LapeError, match="name a stage"):
        lape.correlation(model)
    from lape.look.probe import attention_distance

    with pytest.raises(lape.LapeError, match="in windows"):
        attention_distance(model, image("timm"))


def test_other_sizes_at_run_time_are_one_clear_line():
    model = lape.apply_(make("Hugging Face"), "LaPE", "learnable")
    with pytest.raises(lape.LapeError, match="64 tokens arrived, the position is for 36"):
        model(torch.randn(1, 3, 32, 32))
    dynamic = timm.create_model("swin_tiny_patch4_window7_224", **TIMM, dynamic_img_size=True)
    with pytest.raises(lape.LapeError, match="one image size"):
        lape.apply_(dynamic, "LaPE", "learnable")(torch.randn(1, 3, 48, 48))


@pytest.mark.slow
@torch.no_grad()
def test_compiled():
    model, x = lape.apply_(make("timm"), "LaPE", "learnable"), image("timm")
    shake_position(model)
    torch.compiler.reset()
    assert torch.allclose(torch.compile(model, backend="aot_eager")(x), model(x), atol=1e-5)


def test_timm_uses_it_as_before():
    model = lape.apply_(make("timm"), "LaPE", "learnable")
    shake_position(model)
    x = image("timm")
    y = model(x)
    assert torch.equal(model.forward_head(model.forward_features(x)), y)
    final, maps = model.forward_intermediates(x)
    assert [m.shape[1] for m in maps] == [16, 32, 64]
    assert (final - model.forward_features(x)).abs().max() <= 1e-5
    model.set_grad_checkpointing(True)
    assert torch.equal(model(x.requires_grad_()), y)
    apart = timm.create_model("swin_tiny_patch4_window7_224", **TIMM, features_only=True)
    with pytest.raises(lape.UnsupportedModelError, match="feature_cls='getter'"):
        lape.apply_(apart)
    getter = timm.create_model("swin_tiny_patch4_window7_224", **TIMM, features_only=True, feature_cls="getter")
    assert lape.describe(lape.apply_(getter, "LaPE", "learnable")).joined == 4
    assert len(getter(image("timm"))) == 3
    with pytest.raises(lape.UnsupportedModelError, match="join='MPVG'"):
        lape.apply_(make("timm"), "MPVG", "learnable")


# --------------------------------------------------------------------- MViT of torchvision

PLAIN_JOINS = ("basic", "share", "unshare", "LaPE-sharing", "LaPE")
MVIT_CASES = [(v, join, pe) for v in (1, 2) for join in PLAIN_JOINS for pe in ("learnable", None)[: 3 - v]]


def mvit(version: int, **rates: float) -> torch.nn.Module:
    """The first version widens behind its MLP and has a table; the second widens before attention and has none."""
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    torch.manual_seed(1)
    second = version == 2
    widths = (16, 16, 32) if second else (16, 32, 32)
    settings = [  # heads, widths, kernels and strides of queries, then of keys
        MSBlockConfig(1, *widths[:2], [], [3, 3, 3], [], [1, 2, 2]),
        MSBlockConfig(2, *widths[1:], [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
        MSBlockConfig(2, 32, 32, [], [], [], []),
    ]
    more = {"residual_pool": second, "residual_with_cls_embed": not second, "rel_pos_embed": second}
    model = MViT((16, 24), 4, settings, proj_after_attn=second, num_classes=5, **more, **rates)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def beyond(block: torch.nn.Module, p: torch.Tensor, grid: list[int], version: int) -> tuple[torch.Tensor, list[int]]:
    """A position (1, 1 + n, D) behind a block, along its skip: by hand from the numbers of the block."""

    def widened(p: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
        if block.project is None:
            return p
        y = F.layer_norm(p, p.shape[-1:], norm.weight, norm.bias, norm.eps)
        return y @ block.project.weight.T + block.project.bias

    p = widened(p, block.norm1) if version == 2 else p
    if block.pool_skip is not None:  # the largest of 3 x 3 around every second row and column
        maps = p[:, 1:].mT.unflatten(2, grid)
        grid = [grid[0], (grid[1] + 1) // 2, (grid[2] + 1) // 2]
        pooled = F.max_pool3d(maps, (1, 3, 3), (1, 2, 2), (0, 1, 1)).flatten(2).mT
        p = torch.cat([p[:, :1], pooled], 1)
    return (p if version == 2 else widened(p, block.norm2)), grid


def mvit_positions(model: torch.nn.Module, version: int, join: str) -> list[torch.Tensor]:
    state, grid, found = lape.to_reference_state_dict(model), [2, 4, 6], []
    own = "pos_encoding.spatial_pos"
    tables = [state[key] for key in sorted(state) if key.startswith(("new_table", "pos_embed"))]
    if not tables:
        frames, first = state["pos_encoding.temporal_pos"], state["pos_encoding.class_pos"]
        places = state[own if join != "unshare" else f"{own}0"]
        tables = [torch.stack([first, *(frame + place for frame in frames for place in places)])[None]]
        tables += [state[f"{own}{i}"] for i in (1, 2) if join == "unshare"]
    raw = chain = tables[0]
    for layer, block in enumerate(model.blocks):
        if join in ("LaPE", "LaPE-sharing"):
            gain, shift = (state[f"blocks.{layer}.pe_norm.{name}"] for name in ("weight", "bias"))
            source = chain if join == "LaPE" else raw
            chain = F.layer_norm(source, source.shape[-1:], gain, shift, block.norm1.eps)
            found.append(chain)
        else:
            found.append(tables[layer] if join == "unshare" else raw)
        (raw, after), (chain, _) = beyond(block, raw, grid, version), beyond(block, chain, grid, version)
        grid = after
    return found


@pytest.mark.matrix
@pytest.mark.parametrize(("version", "join", "pe"), MVIT_CASES)
def test_mvit_five_equalities(version, join, pe, tmp_path):
    """Its norms feed attention (version 1), or the stream as well where it widens (2), which gets no position."""
    model, original, x = mvit(version), mvit(version), torch.randn(2, 3, 4, 16, 24)
    with torch.no_grad():
        before = original(x)
        lape.apply_(model, join, pe)
        shake_position(model)
        converted = model(x)
        check_mvit(copy.deepcopy(model), version, join, x)
        folded = lape.fold_(copy.deepcopy(model))
        others = [folded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        others += [lape.load(lape.save(one, tmp_path / name)) for one, name in ((model, "model"), (folded, "folded"))]
        for other in others:
            assert (other(x) - converted).abs().max() <= TOLERANCE * converted.abs().max()
        lape.remove_(model)
        assert_same_structure(model, original)
        model.load_state_dict(original.state_dict())
        assert torch.equal(model(x), before)


def test_mvit_comes_back_with_the_rates_of_its_training(tmp_path):
    model = lape.apply_(mvit(1, dropout=0.1, attention_dropout=0.2, stochastic_depth_prob=0.4))
    again = lape.load(lape.save(model, tmp_path / "m"))
    rates = [{name: part.p for name, part in m.named_modules() if hasattr(part, "p")} for m in (model, again)]
    assert rates[0] == rates[1]
    assert [block.stochastic_depth.p for block in again.blocks] == [0.0, 0.2, 0.4]


def check_mvit(model, version, join, x) -> None:
    model, x = model.double(), x.double()
    expected, entered, normed, attended, skipped, embedded = mvit_positions(model, version, join), [], [], [], [], []
    stages = len(conversion_of(model).anatomy.stages)
    told = [row for stage in range(stages) for row in lape.positions(model, stage=stage)]
    for p, q in zip(expected, told, strict=True):
        assert (p[0] - q).abs().max() <= 1e-10 * p.abs().max()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        block.norm1.register_forward_hook(lambda m, args, _y: normed.append((args[0], plain(m, args[0]))))
        block.attn.qkv.register_forward_pre_hook(lambda _, args: attended.append(args[0]))
        if version == 2 and block.project is not None:
            block.project.register_forward_pre_hook(lambda _, args: skipped.append(args[0]))
    model.conv_proj.register_forward_hook(lambda _m, _a, y: embedded.append(y.flatten(2).mT))
    model(x)
    normed = [y for h, y in normed if len(h) == 2]  # a position passes the norm of a border, too
    site = JOINS[join].site
    tokens = torch.cat([model.pos_encoding.class_token.expand(2, 1, -1), embedded[0]], 1)
    first = tokens + (expected[0] if join in ("basic", "share", "unshare") else 0)
    assert (entered[0] + (expected[0] if site == "block" else 0) - first).abs().max() <= 1e-10 * first.abs().max()
    for y, seen, p in zip(normed, attended, expected, strict=True):
        assert (seen - y - (p if site == "norm" else 0)).abs().max() <= 1e-10 * y.abs().max()
    if version == 2:
        assert torch.equal(next(h for h in skipped if len(h) == 2), normed[1])


@pytest.mark.parametrize("version", [1, 2])
def test_mvit_learns_and_says_what_it_keeps(version):
    model = lape.apply_(mvit(version), "LaPE", None if version == 1 else "learnable")
    assert lape.describe(model).beside == (None if version == 1 else "relative position bias in attention")
    assert lape.grid(model) == (2, 4, 6)
    y = model(torch.randn(2, 3, 4, 16, 24))
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in of_position(model).values())
    with pytest.raises(lape.LapeError, match="one grid of rows and columns"):
        lape.apply_(mvit(1), "LaPE", "2D_RPE")
    if version == 2:
        with pytest.raises(lape.LapeError, match="no position table of its own, its relative position bias"):
            lape.apply_(mvit(2))
