"""timm's Vision Transformers, and the models of `lape.models`, which are built like them: one row for each family."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

from torch import Tensor, nn

from lape.core.anatomy import Anatomy, Form
from lape.core.bias import AddBias, BlockBias, add_to_attn_mask, masked
from lape.core.grids import grid_beside, grid_of_map
from lape.core.norm import NEW_OUTPUT
from lape.core.position import Grid, Layout, resample
from lape.core.stages import Stage
from lape.errors import LapeError, UnsupportedModelError
from lape.host import parts
from lape.host.base import Blueprint, Host, class_name, find_host, of_constructors, without_values
from lape.host.parts import POST_NORM, RELATIVE, ROTARY, SHARED, Call, check_blocks, check_norms, children
from lape.names import nearest

NEW_OUTPUT.add("timm.layers.norm")

_NO_MASK = ("timm.layers.diff_attention.DiffAttention",)  # its two paths disagree on the heads of a mask


def vit_anatomy(root: nn.Module, blocks: list[str], layout: Layout, **more: Any) -> Anatomy:
    """The anatomy of a model whose blocks have `norm1` and `attn`; raises UnsupportedModelError with the reason.

    `more` are further fields of `Anatomy`, and `slot`, the path of the table, which the model may lack; None: its
    forward adds none.
    """
    norm_name = "norm" if more.get("branches") else "norm1"
    check_norms(root, [f"{block}.{norm_name}" for block in blocks])
    if getattr(getattr(root, "patch_drop", None), "prob", 0.0) > 0:
        raise UnsupportedModelError(
            "patch_drop_rate > 0 removes tokens at random, so a token's position is no longer known in the blocks: "
            "create the model with patch_drop_rate=0"
        )
    first: Any = root.get_submodule(blocks[0])
    more = {"slot": "pos_embed", "add_bias": bias_adder_of(first.attn), **more}
    sizes = {"width": getattr(first, norm_name).normalized_shape[-1], "num_heads": first.attn.num_heads}
    return parts.checked_anatomy(root, blocks, layout, norm=norm_name, attention="attn", **sizes, **more)


def block_biases(methods: list[str], layout: Layout) -> tuple[BlockBias, ...]:
    """The bias of each block between all tokens, computed by these methods."""
    return tuple(BlockBias(method, layout.num_patches, layout.num_prefix) for method in methods)


def bias_adder_of(attention: nn.Module) -> AddBias | None:
    """The function that hands a bias to an attention of timm; None when it takes none."""
    parameters = inspect.signature(attention.forward).parameters
    if class_name(type(attention)) in _NO_MASK:
        return None
    if "attn_mask" in parameters:
        return add_to_attn_mask
    return add_to_shared_bias if "shared_rel_pos_bias" in parameters else None


def add_to_shared_bias(bias_1HNN: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """For BEiT's attention(x, shared_rel_pos_bias=...), an additive bias that broadcasts to (B, H, N, N)."""
    return args, {**kwargs, "shared_rel_pos_bias": masked(bias_1HNN, kwargs.get("shared_rel_pos_bias"))}


def measure(root: nn.Module) -> tuple[Grid, tuple[int, int]]:
    """Grid of the present input size, and the pixels of the image for each patch."""
    patch_embed: Any = root.get_submodule("patch_embed")
    if getattr(patch_embed, "grid_size", None) is None or not hasattr(patch_embed, "feat_ratio"):
        raise UnsupportedModelError(
            f"patch_embed is a {class_name(type(patch_embed))}, which does not tell its grid: "
            "use timm's PatchEmbed or HybridEmbed"
        )
    return tuple(patch_embed.grid_size), tuple(patch_embed.feat_ratio(as_scalar=False))


def pooling(root: nn.Module) -> dict[str, Any]:
    """`pooled` and `last_norm` of an anatomy, for models with `global_pool`, `norm` and perhaps `fc_norm` behind it.

    Where `fc_norm` does the work, `norm` is an Identity: then no norm stands between the blocks and the pooling.
    """
    averages = getattr(root, "global_pool", "token") in ("avg", "avgmax", "max") or hasattr(root, "seq_pool")
    pooled = averages and not (getattr(root, "pool_include_prefix", False) and root.num_prefix_tokens)
    norm = root._modules.get("norm")
    return {"pooled": pooled, "last_norm": None if norm is None or isinstance(norm, nn.Identity) else "norm"}


def layout_of(root: Any) -> Layout:
    """The layout of a model that tells `num_prefix_tokens` and perhaps `no_embed_class`."""
    grid, prefix = measure(root)[0], root.num_prefix_tokens
    return Layout(grid, 0, prefix) if getattr(root, "no_embed_class", False) else Layout(grid, prefix)


def blueprint(model: nn.Module) -> Blueprint | None:
    """The name under which timm made a model; `current` has its arguments. None for a model around one."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") if hasattr(config, "get") else None
    return (name, {}) if name else None


_PATHS = (  # paths in a model that end in the names of arguments
    "embed_dim global_pool no_embed_class dynamic_img_size pool_include_prefix patch_embed.img_size "
    "patch_embed.patch_size patch_embed.dynamic_img_pad blocks.0.attn.num_heads blocks.0.ls1.init_values"
).split()


def _at(model: Any, path: str) -> Any:
    return reduce(lambda part, name: getattr(part, name, None), path.split("."), model)


def current(root: nn.Module) -> dict[str, Any]:
    """Arguments of timm's constructor, as far as the model shows them, those that it takes."""
    head, reg, blocks = (_at(root, name) for name in ("head", "reg_token", "blocks"))
    values = {
        **{path.rpartition(".")[2]: _at(root, path) for path in _PATHS},
        "in_chans": _at(root, "patch_embed.proj.in_channels"),
        "num_classes": 0 if isinstance(head, nn.Identity) else _at(head, "out_features"),
        "reg_tokens": None if reg is None else reg.shape[1],
        "class_token": _at(root, "cls_token") is not None,
        "depth": len(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else None,
        "fc_norm": isinstance(_at(root, "fc_norm"), nn.LayerNorm),
        "pos_embed": _at(root, "pos_embed_argument"),
        "pre_norm": not isinstance(_at(root, "norm_pre"), nn.Identity),
    }
    arguments = {parameter.name for parameter in of_constructors(type(root).__mro__)}
    return {name: value for name, value in values.items() if name in arguments and value is not None}


# Arguments that say where weights come from and where the model lies, not what it is: no file holds them.
NOT_THE_MODEL = frozenset(
    "pretrained pretrained_cfg pretrained_cfg_overlay pretrained_strict pretrained_filter_fn pretrained_model_args "
    "checkpoint_path cache_dir default_cfg model_cfg feature_cfg kwargs_filter pruned scriptable exportable no_jit "
    "device dtype".split()
)
_BY_NAME = inspect.Parameter.POSITIONAL_OR_KEYWORD
_OF_ALL_MODELS = {"features_only", "feature_cls", "out_indices", "use_naflex"}


def check_arguments(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raises LapeError for an argument that no constructor in this model's timm file takes."""
    import timm

    import lape.models  # noqa: F401

    arch = name.split(".")[0]
    if not timm.is_model(arch):
        raise unknown_model_error(name)
    classes = [c for c in vars(sys.modules[timm.model_entrypoint(arch).__module__]).values() if isinstance(c, type)]
    bases = {base for c in classes for base in c.__mro__ if base.__module__.startswith(("timm.", "lape."))}
    names = {parameter.name for parameter in of_constructors(bases) if parameter.kind is _BY_NAME}
    allowed = (names | _OF_ALL_MODELS) - NOT_THE_MODEL
    for argument in kwargs:
        if argument not in allowed:
            raise LapeError(f"{argument!r} is no argument of {arch} that says what the model is")


def unknown_model_error(name: str) -> LapeError:
    import timm

    arch, models = name.split(".")[0], timm.list_models()
    guess = nearest(arch, models) or next((model for model in models if arch and model.startswith(arch)), None)
    hint = f"did you mean {guess!r}? " if guess else ""
    return LapeError(f"unknown model {name!r}: {hint}timm.list_models() has all names")


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A timm model by name. Raises LapeError: an unknown name (the nearest is named), wrong arguments or size."""
    import timm

    import lape.models  # noqa: F401  they are known to timm from here on

    if not isinstance(name, str) or not timm.is_model(name.split(".")[0]):
        raise unknown_model_error(str(name))
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except (TypeError, AssertionError) as error:
        raise _creation_error(name, kwargs, error) from error
    except Exception as error:  # of a download: the hub's clients raise what they like
        if kwargs.get("pretrained"):
            raise LapeError(
                f"the pretrained weights of {name!r} cannot be had ({' '.join(str(error).split())[:160]}): look at the "
                "network, or give a file that is here"
            ) from error
        if "pretrained tag" not in str(error):
            raise
        tags = ", ".join(tag for tag in timm.list_pretrained() if tag.split(".")[0] == name.split(".")[0])
        raise LapeError(f"unknown model {name!r}, of this one there are: {tags or 'none with a tag'}") from error
    _check_divisible(model, name)
    return model


def _check_divisible(model: nn.Module, name: str) -> None:
    """Raises LapeError for an input size that is no multiple of the patch size."""
    patch_embed = getattr(model, "patch_embed", None)
    size, patch = getattr(patch_embed, "img_size", None), getattr(patch_embed, "patch_size", None)
    patch = (patch, patch) if isinstance(patch, int) else patch
    if size and patch and (size[0] % patch[0] or size[1] % patch[1]):
        raise LapeError(
            f"input size {size[0]} x {size[1]} is not divisible by the patch of {name}, {patch[0]} x {patch[1]}: "
            f"use {size[0] // patch[0] * patch[0] or patch[0]} or another multiple"
        )


def _creation_error(name: str, kwargs: dict[str, Any], error: Exception) -> LapeError:
    """Why a model cannot be made: it is none that can be converted, or an argument that it does not take."""
    import timm

    with without_values():
        plain = timm.create_model(name)
    try:
        find_host(plain)
    except UnsupportedModelError as unsupported:
        return unsupported
    reason = " ".join(str(error).split()) or type(error).__name__
    wrong = re.search(r"unexpected keyword argument '(\w+)'", reason)
    if wrong is None:
        return LapeError(f"model {name!r} with {kwargs}: {reason}")
    guess = nearest(wrong[1], inspect.signature(type(plain).__init__).parameters)
    hint = f"; did you mean {guess!r}?" if guess else ""
    return LapeError(f"model {name!r} takes no argument {wrong[1]!r}{hint}")


Fields = dict[str, Any]
"""Fields of `Anatomy` by name."""


def _host(
    name: str, module: str, root_class: str, blocks: str, read: Callable[[Any], Fields], resizes: bool = False
) -> Host:
    """One family: `read(root)` gives the fields of `Anatomy` that differ from a plain ViT's, and `blocks` where these
    lie elsewhere.

    Modules are those of `timm.models`, blocks of another library have their full names. With `resizes` it has
    `set_input_size`.
    """
    models = "timm.models"
    homes = {0: f"{models}.{module}.", 1: f"{models}."}  # by the dots in a block's name
    classes = tuple(homes.get(block.count("."), "") + block for block in blocks.split())
    reasons = {f"{models}.{block}": reason for block, reason in _REFUSALS.get(name, {}).items()}

    def examine(root: nn.Module) -> Anatomy:
        fields = read(root)
        paths = fields.pop("blocks") if "blocks" in fields else children(root, "blocks")
        if "layout" not in fields:
            fields |= {"layout": layout_of(root), "patch_size": measure(root)[1]}
        check_blocks("timm", root, paths, classes, reasons)
        if all("attns" in root.get_submodule(path)._modules for path in paths):  # several attentions side by side
            paths, fields["branches"] = [branch for path in paths for branch in children(root, f"{path}.attns")], True
        return vit_anatomy(root, paths, **fields)

    return Host(
        name=name,
        root_classes=(f"{models}.{module}.{root_class}",),
        block_classes=classes,
        examine=examine,
        measure=measure if resizes else None,
        note=_NOTES[name],
        package="timm",
        blueprint=blueprint,
        build=build,
        current=current,
        check_arguments=check_arguments,
        tested=("timm 1.0.31",),
        refused=reasons,
    )


_RELPOS = "vision_transformer_relpos"
_NOTES = {
    "timm VisionTransformer": (
        "plain, DeiT, distilled, DeiT-III, registers, LayerScale, class token or pooled, behind a CNN (hybrid), "
        "several attentions side by side; the models of lape.models (ViT-Lite, CVT, CCT, T2T-ViT, CeiT)"
    ),
    "timm BEiT": "its table, or its relative bias",
    "timm CaiT": "the blocks between patches; class attention comes behind them and gets no position",
    "timm EVA": "the absolute table, also beside rotary position embedding",
    "timm relative-position ViT": "on its relative bias, or a new table beside it, pe='learnable'",
    "timm NaFlexViT": "images of any size, also packed patches of several sizes in a batch",
    "timm PiT": "its table, pooled from stage to stage as the tokens are; class tokens have no position; one size",
    "timm Qwen3-ViT": "the absolute table beside rotary position embedding, images of any size",
    "timm SAM ViT": "beside its relative bias, global and windowed attention",
    "timm VOLO": "the transformer blocks behind its table; class attention gets no position",
    "timm XCiT": (
        "a table in place of its Fourier encoding, pe='learnable' or '2D_sin'; class attention gets no position"
    ),
    "timm Swin": "on its relative bias, or a new table beside it, pe='learnable', merged from stage to stage; one size",
}
_PARALLEL = "one norm feeds attention and MLP at once, and the MLP must get no position"
_PIXELS = "it has no position embedding, and attends between the pixels of one place in all patches"
_REFUSALS = {  # classes of timm.models
    "timm VisionTransformer": {
        "vision_transformer.ResPostBlock": POST_NORM,
        "vision_transformer.ParallelScalingBlock": _PARALLEL,
        "vision_transformer.DiffParallelScalingBlock": _PARALLEL,
        # Models that hold blocks like the above in another arrangement.
        "crossvit.MultiScaleBlock": (
            "two branches with a position table each exchange their class tokens, so there is no one position to hand "
            "on"
        ),
        "mobilevit.MobileVitBlock": _PIXELS,
        "mobilevit.MobileVitV2Block": _PIXELS,
    },
    "timm EVA": {"eva.EvaBlockPostNorm": POST_NORM},
    "timm relative-position ViT": {f"{_RELPOS}.ResPostRelPosBlock": POST_NORM},
    "timm Swin": {
        "swin_transformer_v2.SwinTransformerV2Block": POST_NORM,
        "swin_transformer_v2_cr.SwinTransformerV2CrBlock": POST_NORM,
        "swin_transformer.SwinTransformerBlock": (
            "its model was taken apart by features_only=True: create it with feature_cls='getter', too"
        ),
    },
}


def _plain(root: Any) -> Fields:
    """ViT and EVA: images of any size by `dynamic_img_size`; EVA's rotation inside attention stays."""
    return {
        "patch_embed": "patch_embed" if getattr(root, "dynamic_img_size", False) else None,
        "grid_from": grid_of_map,
        "adds": ("_pos_embed",),
        "own_kind": getattr(root, "table_kind", "learnable"),
        "table_std": getattr(root, "table_std", None),
        "beside": ROTARY if getattr(root, "rope", None) is not None else None,
        **pooling(root),
    }


def _beit(root: Any) -> Fields:
    """Its relative bias, shared or each block's own, stays or is joined itself."""
    owners = [f"{path}.attn" for path in children(root, "blocks")]
    has_bias = [_at(root, f"{path}.relative_position_bias_table") is not None for path in owners]
    biases = block_biases([f"{path}._get_rel_pos_bias" for path in owners], layout_of(root)) if all(has_bias) else ()
    beside = RELATIVE if any(has_bias) else SHARED if root.rel_pos_bias is not None else None
    return {"beside": beside, "own_bias": biases, **pooling(root)}


def _relpos(root: Any) -> Fields:
    """It has no table and adds none; its bias is joined, or a new table beside it."""
    if root.shared_rel_pos is not None:
        return {"slot": None, "beside": SHARED, **pooling(root)}
    methods = [f"{path}.attn.rel_pos.get_bias" for path in children(root, "blocks")]
    return {"slot": None, "beside": RELATIVE, "own_bias": block_biases(methods, layout_of(root)), **pooling(root)}


def _patches(root: Any) -> Fields:
    """CaiT, SAM and Swin: patches only; CaiT's class token enters behind its blocks and has no position."""
    grid, patch_size = measure(root)
    return {"layout": Layout(grid, prefix_rows=0), "patch_size": patch_size}


def _naflex(root: Any) -> Fields:
    """On images (B, C, height, width): prefix tokens own no rows, the grid follows the image."""
    kind, grid = root.embeds.pos_embed_type, root.embeds.pos_embed_grid_size
    if grid is None:
        raise UnsupportedModelError(
            "the model does not know a grid: create it with pos_embed_grid_size=(rows, columns)"
        )
    form = {"form": Form(_sum_of_axes, ("embeds.pos_embed_x",))} if kind == "factorized" else {}
    return {
        "layout": Layout(tuple(grid), 0, root.num_prefix_tokens),
        "patch_size": root.embeds.patch_size,
        "slot": {"learned": "embeds.pos_embed", "factorized": "embeds.pos_embed_y"}.get(kind),
        "resample": _naflex_resampling(root.embeds, factorized=kind == "factorized"),
        "packed_grids": None if root.embeds.pos_embed_use_grid_sample else _grids_of_coordinates,
        **form,
        "patch_embed": "embeds",
        "grid_from": grid_beside,
        "adds": ("embeds.forward",),
        "beside": ROTARY if root.rope is not None else None,
        **pooling(root),
    }


def _sum_of_axes(rows_1HD: Tensor, columns_1WD: Tensor) -> Tensor:
    return (rows_1HD[:, :, None] + columns_1WD[:, None]).flatten(1, 2)


def _naflex_resampling(embeds: Any, *, factorized: bool) -> Callable[..., Tensor]:
    """As the model resamples its table for nearly every image; the axes of a factorized one, linearly."""
    square = embeds.pos_embed_ar_preserving
    if factorized:
        return partial(resample, mode="bilinear", antialias=False, square=square)
    options = {"antialias": embeds.pos_embed_antialias, "align_corners": embeds.pos_embed_align_corners}
    return partial(resample, mode=embeds.pos_embed_interp_mode, square=square, **options)


def _grids_of_coordinates(
    patches: Tensor, patch_coord: Tensor | None = None, patch_valid: Tensor | None = None
) -> list[Grid] | None:
    """The grid of each image of packed patches, as the model reads it in their coordinates; None for images."""
    return None if patch_coord is None else [tuple(grid) for grid in (patch_coord.amax(1) + 1).tolist()]


def _pit(root: Any) -> Fields:
    """The table is that of the patches of the first stage; between stages a convolution pools the position, too.

    Class tokens own no row.
    """
    embed, stages, blocks = root.patch_embed, [], []
    grid = tuple(embed.grid_size)
    for number, path in enumerate(children(root, "transformers")):
        pool = f"{path}.pool" if number else None
        if pool is not None:
            stride, _ = root.get_submodule(pool).conv.stride
            grid = tuple((side + 2 * (stride // 2) - stride - 1) // stride + 1 for side in grid)
        inside = children(root, f"{path}.blocks")
        width = root.get_submodule(inside[0]).norm1.normalized_shape[0]
        stages.append(Stage(len(inside), grid, width, pool, _pooled))
        blocks += inside
    layout = Layout(stages[0].grid, 0, root.num_tokens)
    fields = {"layout": layout, "patch_size": embed.conv.stride, "pixels": embed.img_size}
    return {**fields, "blocks": blocks, "stages": tuple(stages), "form": Form(_of_channels_first), "add_bias": None}


def _of_channels_first(table_1DHW: Tensor) -> Tensor:
    return table_1DHW.flatten(2).transpose(1, 2)


def _pooled(pool: Any, p_1nD: Tensor, grid: Grid) -> Tensor:
    map_1DRC: Tensor = pool.conv(p_1nD.transpose(1, 2).unflatten(2, grid))
    return _of_channels_first(map_1DRC)


def _qwen3(root: Any) -> Fields:
    """Beside rotary position; the table of a square grid is resampled for nearly every image."""
    side = root.pos_embed_grid_size
    return {
        "layout": Layout((side, side), 0),
        "patch_size": measure(root)[1],
        "patch_embed": "patch_embed",
        "grid_from": grid_of_map,
        "adds": ("_pos_embed",),
        "resample": partial(resample, mode="bilinear", antialias=False, align_corners=True),
        "beside": ROTARY,
    }


def _sam(root: Any) -> Fields:
    """`norm1` stands before the windows are cut, so a position joins the whole map."""
    relative = RELATIVE if _at(root, "blocks.0.attn.use_rel_pos") else None
    slot = "pos_embed" if root.pos_embed is not None else None
    beside = ROTARY if root.rope_global is not None else relative
    return {**_patches(root), "slot": slot, "beside": beside, "add_bias": None, "maps": True}


def _volo(root: Any) -> Fields:
    """The blocks behind its table, which it adds before network[2]: outlookers and a downsampling come first."""
    stem, down = root.patch_embed, root.network[1]
    if class_name(type(down)) != "timm.models.volo.Downsample":
        raise UnsupportedModelError(f"network.1 is a {class_name(type(down))}: its downsampling is expected there")
    stride = math.prod(layer.stride[0] for layer in (stem.conv[0], stem.proj, down.proj))
    blocks = [path for stage in children(root, "network")[2:] for path in children(root, stage)]
    layout = Layout(tuple(root.pos_embed.shape[1:3]), prefix_rows=0)
    return {"blocks": blocks, "layout": layout, "patch_size": (stride, stride), "add_bias": None, "maps": True}


def _xcit(root: Any) -> Fields:
    """Its position comes from a module, in whose place a table can be joined; attention is over channels."""
    side, (height, width) = root.patch_embed.patch_size, root.patch_embed.img_size
    fields = {"layout": Layout((height // side, width // side), prefix_rows=0), "patch_size": (side, side)}
    encoder = ("pos_embed",) if root.pos_embed is not None else ()
    return {**fields, "slot": None, "encoder": encoder, "patch_embed": "patch_embed", "grid_from": grid_beside}


def _swin(root: Any) -> Fields:
    """`norm1` stands before the windows are cut and shifted, so a position joins the whole map of a stage.

    Its relative bias stays, or is joined itself; a table is new, over the grid of the first stage.
    """
    stages, blocks = [], []
    for number, path in enumerate(children(root, "layers")):
        merging = class_name(type(root.get_submodule(f"{path}.downsample")))
        if number and merging != "timm.models.swin_transformer.PatchMerging":
            raise UnsupportedModelError(f"{path}.downsample is a {merging}, not a PatchMerging")
        inside = children(root, f"{path}.blocks")
        first = root.get_submodule(inside[0])
        grid, width = tuple(first.input_resolution), first.norm1.normalized_shape[0]
        stages.append(Stage(len(inside), grid, width, f"{path}.downsample" if number else None))
        blocks += inside
    windows = [(f"{path}.attn._get_rel_pos_bias", root.get_submodule(f"{path}.attn").window_area) for path in blocks]
    biases = tuple(BlockBias(method, area) for method, area in windows)
    fields = {"slot": None, "input": "patch_embed", "beside": RELATIVE, "own_bias": biases, "maps": True}
    return {**_patches(root), **fields, "blocks": blocks, "stages": tuple(stages)}


HOSTS = (
    _host(
        "timm VisionTransformer",
        "vision_transformer",
        "VisionTransformer",
        "Block ParallelThingsBlock lape.models.compact.CompactBlock",
        _plain,
        resizes=True,
    ),
    _host("timm BEiT", "beit", "Beit", "Block", _beit, resizes=True),
    _host("timm CaiT", "cait", "Cait", "LayerScaleBlock", _patches),
    _host("timm EVA", "eva", "Eva", "EvaBlock", _plain, resizes=True),
    _host("timm relative-position ViT", _RELPOS, "VisionTransformerRelPos", "RelPosBlock", _relpos, resizes=True),
    _host("timm NaFlexViT", "naflexvit", "NaFlexVit", "vision_transformer.Block eva.EvaBlock", _naflex),
    _host("timm PiT", "pit", "PoolingVisionTransformer", "vision_transformer.Block", _pit),
    _host("timm Qwen3-ViT", "qwen3_vit", "Qwen3VitEncoder", "eva.EvaBlock", _qwen3),
    _host("timm SAM ViT", "vision_transformer_sam", "VisionTransformerSAM", "Block", _sam),
    _host("timm VOLO", "volo", "VOLO", "Transformer", _volo),
    _host("timm XCiT", "xcit", "Xcit", "XCABlock", _xcit),
    _host("timm Swin", "swin_transformer", "SwinTransformer", "SwinTransformerBlock", _swin),
)
