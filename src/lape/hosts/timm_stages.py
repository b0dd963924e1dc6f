"""timm's models of stages: Swin, on maps (B, rows, columns, D) whose grid halves and whose width doubles."""

from __future__ import annotations

from typing import Any

from torch import nn

from lape.bias import OwnBias
from lape.errors import UnsupportedModelError
from lape.hosts.base import RELATIVE, Anatomy, Host, class_name
from lape.hosts.timm_parts import POST_NORM, anatomy, children, measure
from lape.position import Layout
from lape.stages import Stage

_SWIN = "timm.models.swin_transformer"
_BLOCKS = (f"{_SWIN}.SwinTransformerBlock",)


def examine_swin(root: nn.Module) -> Anatomy:
    """Swin: `norm1` stands before the windows are cut and shifted, so a position joins the whole map of a stage.

    Its relative bias stays, or is joined itself; a table is new, over the grid of the first stage.
    """
    grid, patch_size = measure(root)
    blocks, stages, biases = [], [], []
    for number, (name, stage) in enumerate(root.get_submodule("layers").named_children()):
        paths = children(root, f"layers.{name}.blocks")
        first: Any = root.get_submodule(paths[0])
        merging: Any = stage.get_submodule("downsample")
        if number and class_name(type(merging)) != f"{_SWIN}.PatchMerging":
            raise UnsupportedModelError(
                f"layers.{name}.downsample is a {class_name(type(merging))}, not a PatchMerging"
            )
        path = f"layers.{name}.downsample" if number else None
        stages.append(Stage(len(paths), tuple(first.input_resolution), first.norm1.normalized_shape[0], path))
        blocks += paths
        for path in paths:
            block: Any = root.get_submodule(path)
            biases.append(OwnBias(f"{path}.attn._get_rel_pos_bias", block.attn.window_area))
    return anatomy(
        root,
        blocks,
        _BLOCKS,
        {},
        Layout(grid, prefix_rows=0),
        patch_size,
        slot=None,
        beside=RELATIVE,
        own_bias=tuple(biases),
        stages=tuple(stages),
        input="patch_embed",
    )


HOSTS = (
    Host(
        "timm Swin",
        (f"{_SWIN}.SwinTransformer",),
        _BLOCKS,
        examine_swin,
        note="on its relative bias, or a new table beside it, pe='learnable', merged from stage to stage; one size",
        tested=("timm 1.0.31",),
        refused={
            "timm.models.swin_transformer_v2.SwinTransformerV2Block": POST_NORM,
            "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock": POST_NORM,
            f"{_SWIN}.SwinTransformerBlock": (
                "its model was taken apart by features_only=True: create it with feature_cls='getter', too"
            ),
        },
    ),
)
