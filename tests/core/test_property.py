"""Any host, join, kind, grid, prefix and dtype: finite, of the right shape, equal to the formula in float64, trainable.

The formula is the unconverted host in float64 with zeros in its table; hooks add what the equations say, computed here
from the saved state with plain arithmetic. Nothing of the conversion takes part in it.
"""

import copy
import itertools

import pytest
import timm
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

import lape
from lape.core.joins import JOINS, check_combination
from lape.core.position import KINDS
from lape.host import find_host

pytestmark = pytest.mark.slow

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5, torch.bfloat16: 0.1}
TRANSFORMERS = {
    "ViT": ("ViTForImageClassification", "ViTConfig", {"num_labels": 3}),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", {"num_labels": 3}),
    "AST": ("ASTForAudioClassification", "ASTConfig", {"num_labels": 3, "frequency_stride": 4, "time_stride": 4}),
    "ViViT": ("VivitForVideoClassification", "VivitConfig", {"num_labels": 3, "num_frames": 4}),
    "I-JEPA": ("IJepaForImageClassification", "IJepaConfig", {"num_labels": 3}),
    "VideoMAE": ("VideoMAEForVideoClassification", "VideoMAEConfig", {"num_labels": 3, "num_frames": 4}),
    "DINOv2 registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {"num_labels": 3}),
}
VIDEO = ("ViViT", "VideoMAE")
FAMILIES = {"DINOv3 of timm": "vit_small_patch16_dinov3", "NaFlexViT": "naflexvit_base_patch16_gap"}


@st.composite
def cases(draw):
    """(library, arguments, join, kind, image size, dtype) that mean something together."""
    library = draw(st.sampled_from(["timm"] * 4 + ["torchvision", *FAMILIES, *TRANSFORMERS]))
    join = draw(st.sampled_from(list(JOINS.values())))
    kinds = [kind for kind in KINDS.values() if kind.is_table or kind.bias_axes or kind.name == "none"]
    kind = draw(st.sampled_from(kinds))
    try:
        check_combination(join, kind)
    except lape.LapeError:
        assume(False)
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    heads = draw(st.sampled_from([1, 2, 4]))
    shape = {"width": heads * 4 * draw(st.integers(2, 4)), "heads": heads, "depth": draw(st.integers(2, 4))}
    if library == "timm":
        shape["prefix"] = draw(st.sampled_from(["class", "distilled", "registers", "bare", "pooled"]))
        shape["options"] = draw(
            st.fixed_dictionaries({}, optional={"init_values": st.just(0.5), "pre_norm": st.just(True)})
        )
        shape["any_size"] = draw(st.booleans())
    elif library in ("torchvision", "DINOv2 registers", *VIDEO):  # these hosts themselves take squares only
        columns = rows
    assume(rows * columns >= (3 if kind.is_bias else 1))  # over fewer keys a normalised bias has no gradient
    assume(library not in VIDEO or not (kind.is_bias or kind.name == "2D_sin"))  # which are for rows and columns
    assume(library != "DINOv3 of timm" or kind.is_table)  # as its rotation stays
    if join.needs_pooling:
        assume(shape.get("prefix") == "pooled")
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    return library, shape, join, kind, (rows, columns), dtype


def make(library: str, shape: dict, grid: tuple[int, int]) -> torch.nn.Module:
    """A small host on patches of 4 x 4 pixels, away from its initial values."""
    torch.manual_seed(0)
    size, width, heads, depth = tuple(4 * side for side in grid), shape["width"], shape["heads"], shape["depth"]
    if library == "timm":
        pooled = {"class_token": False, "global_pool": "avg", "fc_norm": False}
        extra = {
            "registers": {"reg_tokens": 2},
            "bare": {"reg_tokens": 3, "no_embed_class": True},
            "pooled": pooled,
        }.get(shape["prefix"], {})
        name = "deit_tiny_distilled_patch16_224" if shape["prefix"] == "distilled" else "vit_tiny_patch16_224"
        model = timm.create_model(
            name,
            img_size=size,
            patch_size=4,
            embed_dim=width,
            num_heads=heads,
            depth=depth,
            num_classes=3,
            mlp_ratio=2,
            dynamic_img_size=shape["any_size"],
            **extra,
            **shape["options"],
        )
    elif library in FAMILIES:
        sizes = {"patch_size": 4, "embed_dim": width, "num_heads": heads, "depth": depth, "mlp_ratio": 2}
        sizes |= {"pos_embed_grid_size": grid} if library == "NaFlexViT" else {"img_size": size}
        model = timm.create_model(FAMILIES[library], num_classes=3, **sizes)
    elif library == "torchvision":
        from torchvision.models import VisionTransformer

        model = VisionTransformer(size[0], 4, depth, heads, width, 2 * width, num_classes=3)
    else:
        transformers = pytest.importorskip("transformers")
        cls, config, extra = TRANSFORMERS[library]
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
        sizes |= {
            "AST": {"patch_size": 4, "num_mel_bins": size[0], "max_length": size[1]},
            "ViViT": {"image_size": size[0], "tubelet_size": [2, 4, 4]},
            "VideoMAE": {"image_size": size[0], "tubelet_size": 2, "patch_size": 4},
        }.get(library, {"patch_size": 4, "image_size": size})
        config = getattr(transformers, config)(intermediate_size=2 * width, **sizes, **extra)
        model = getattr(transformers, cls)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def written_out(host: torch.nn.Module, state: dict, join: str, kind, x: torch.Tensor) -> torch.Tensor:
    """The host in float64 with the join's equations in hooks; `state` has the names of files."""
    host = copy.deepcopy(host).double()
    found, root = find_host(host)
    anatomy = found.examine(root)
    prefix = next(f"{path}." if path else "" for path, module in host.named_modules() if module is root)
    state = {key.removeprefix(prefix): tensor.double() for key, tensor in state.items()}
    layout, width, blocks = anatomy.layout, anatomy.width, [root.get_submodule(path) for path in anatomy.blocks]
    slot = anatomy.table_slot or anatomy.table_key
    own = state.get(slot)

    def rows(name: str) -> torch.Tensor:
        return state[name].reshape(1, -1, width)

    def spread(p: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(1, layout.bare, width, dtype=p.dtype)
        return torch.cat([p[:, : layout.prefix_rows], zeros, p[:, layout.prefix_rows :]], 1)

    def normed(p: torch.Tensor, home: str, eps: float) -> torch.Tensor:
        centred = p - p.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return y * state[f"{home}.pe_norm.weight"] + state[f"{home}.pe_norm.bias"]

    def after(norm: torch.nn.Module, p: torch.Tensor) -> None:
        norm.register_forward_hook(lambda _m, _x, y: y + spread(p))

    def before(block: torch.nn.Module, p: torch.Tensor) -> None:
        block.register_forward_pre_hook(lambda _m, args: (args[0] + spread(p), *args[1:]))

    at_input = join in ("basic", "PVG", "MPVG") and kind.is_table
    for path in anatomy.encoder:  # VideoMAE's sines, a plain tensor
        owner, _, name = path.rpartition(".")
        setattr(root.get_submodule(owner), name, torch.zeros_like(getattr(root.get_submodule(owner), name)))
    if anatomy.table is not None:
        table = root.get_parameter(slot)
        table.data = own.reshape(table.shape) if at_input else torch.zeros_like(table)
    elif at_input and anatomy.table_slot is not None:  # the host adds what lies there
        setattr(root, slot, torch.nn.Parameter(rows(slot)))
    elif at_input:
        after(root.get_submodule(anatomy.input), rows(slot))
    if kind.is_bias:
        for path, block in zip(anatomy.blocks, blocks, strict=True):
            bias = bias_of(state, f"{path}.{anatomy.attention}", layout, kind, join)

            def hand_over(_m, args, kwargs, bias=bias):
                return anatomy.add_bias(bias, args, kwargs)

            block.get_submodule(anatomy.attention).register_forward_pre_hook(hand_over, with_kwargs=True)
    elif kind.is_table and join != "basic":
        chain = None if join == "unshare" else rows(slot)
        for layer, (path, block) in enumerate(zip(anatomy.blocks, blocks, strict=True)):
            norm = block.get_submodule(anatomy.norm)
            if join in ("share", "unshare"):
                before(block, rows(slot) if join == "share" else rows(f"{slot}{layer}"))
            elif join == "beside":
                after(norm, rows(slot))
            elif join == "LaPE-sharing":
                after(norm, normed(rows(slot), path, norm.eps))
            elif join == "LaPE" or layer > 0:
                chain = normed(chain, path, norm.eps)
                after(norm, chain)
        if join == "MPVG":
            after(root.norm, normed(rows(slot), "norm", root.norm.eps))
    return logits(host, x.double())


def bias_of(state: dict, path: str, layout, kind, join: str) -> torch.Tensor:
    """(1, H, N, N): b_ij = table[offset of i and j], normalised over j for LaPE; zero for prefix tokens."""
    (height, columns), n = layout.grid, layout.num_patches
    entries = state[f"{path}.relative_position_bias_table"]
    b = torch.zeros(entries.shape[1], n, n, dtype=entries.dtype)
    for i, j in itertools.product(range(n), range(n)):
        dy, dx = i // columns - j // columns, i % columns - j % columns
        offset = i - j + n - 1 if kind.name == "1D_RPE" else (dy + height - 1) * (2 * columns - 1) + dx + columns - 1
        b[:, i, j] = entries[offset]
    if join == "LaPE":
        centred = b - b.mean(-1, keepdim=True)
        b = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        b = b * state[f"{path}.pe_norm.weight"] + state[f"{path}.pe_norm.bias"]
    return torch.nn.functional.pad(b, (layout.num_prefix, 0, layout.num_prefix, 0))[None]


def converted_equals_the_formula_and_learns(case) -> bool:
    """Asserts it; False for a case that says nothing, as the host itself is not finite in that dtype on this machine.

    (On some CPUs a patch convolution in bf16 gives NaN.)
    """
    library, shape, join, kind, grid, dtype = case
    transformers_4 = library in TRANSFORMERS and kind.is_bias and not bias_is_taken()
    assume(not transformers_4)  # refused there, as another test asserts
    event(f"{library}, {join.name}, {kind.name}, {dtype}")
    host = make(library, shape, grid)
    model = copy.deepcopy(host)
    own = {id(parameter) for parameter in model.parameters()}
    lape.apply_(model, join.name, kind.name)
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in own and parameter.requires_grad:
                parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    new = {name for name, p in model.named_parameters() if id(p) not in own and p.requires_grad}
    has_norms = join.normalised and not join.normless
    assert bool(new) == (kind.is_bias or has_norms or (kind.is_table and not kind.frozen))
    model, host = model.to(dtype), host.to(dtype)
    sides = (4 * grid[0], 4 * grid[1])
    shapes = {"AST": sides[::-1], **dict.fromkeys(VIDEO, (4, 3, *sides))}
    x = torch.randn(2, *shapes.get(library, (3, *sides))).to(dtype)
    if not logits(host, x).isfinite().all():
        return False
    got = logits(model, x)
    assert got.shape == (2, 3)
    assert got.dtype == dtype
    assert got.isfinite().all()
    expected = written_out(host, lape.to_reference_state_dict(model), join.name, kind, x)
    error = (got.detach().double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype], float(error)

    got.float().square().sum().backward()
    # The last block's bias moves only what patches ask for, and a head that reads a class token does not see them.
    unread = f"lape.biases.{shape['depth'] - 1}." if shape.get("prefix") != "pooled" else "nothing"
    for name in new:
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert dtype == torch.bfloat16 or gradient.abs().sum() > 0 or unread in name, name

    with torch.no_grad():
        folded = logits(lape.fold_(copy.deepcopy(model)), x)
    assert (folded.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    if kind.is_table:
        received = lape.positions(model)
        tokens = lape.convert.converted.conversion_of(model).layout.num_tokens
        assert received.shape == (shape["depth"], tokens, shape["width"])
        assert received.isfinite().all()
    return True


def test_converted_equals_the_formula_and_learns():
    said = []

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(cases())
    def every(case):
        said.append(converted_equals_the_formula_and_learns(case))

    every()
    assert said.count(False) <= 0.05 * len(said), f"{said.count(False)} of {len(said)} hosts were not finite"


def bias_is_taken() -> bool:
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5
