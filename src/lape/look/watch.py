"""Watching any Vision Transformer at work, converted or not: the tokens of every depth, the attention of every layer.

The model's own forward runs in eval mode; hooks on its blocks and torch's function override watch it, and nothing of it
is copied. Depth 0 is what enters the first block, depth d what leaves block d - 1.
Shape suffixes: B images, N tokens, n patches, D width, E depths (layers + 1), H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lape.convert.converted import Conversion, conversion_of, conversions
from lape.core.anatomy import Anatomy
from lape.core.position import Grid
from lape.errors import LapeError, UnsupportedModelError, check_finite
from lape.host import check_module, find_host
from lape.host.base import evaluating, watching

BATCH = 16  # images at a time: what is watched is used at once, not kept
MOST_PREFIX = 16  # class token and registers
OVER_CHANNELS = frozenset({"XCA", "ChannelAttention"})  # classes, whose weights may have the shape of those of tokens

# --- tokens -----------------------------------------------------------------------------------------------------------


class Watch:
    """The patch tokens of every depth of a model, (E, B, n, D), for images of one size."""

    def __init__(self, model: nn.Module, images_BCHW: Tensor):
        if images_BCHW.ndim != 4 or not len(images_BCHW):
            raise LapeError(f"images of shape {tuple(images_BCHW.shape)} were given: (images, channels, height, width)")
        self.model = model
        anatomy, self.blocks, prefix = _parts(model)
        height, width = images_BCHW.shape[-2:]
        tokens = [x.shape[1:] for x in self.tokens(images_BCHW[:1])]
        if len(set(tokens)) > 1:
            raise UnsupportedModelError(
                "the model's tokens change their number or width on the way: there is no one grid to probe"
            )
        count, extra = tokens[0][0], 0
        self.count = count
        if anatomy is None:
            self.grid = _grid_like(height, width, count if prefix is None else count - prefix)
        else:
            if len(anatomy.patch_size) != 2:
                raise UnsupportedModelError("the model takes videos: a probe reads rows and columns of images")
            (down, right), pads, extra = anatomy.patch_size, anatomy.pads, anatomy.layout.suffix_rows
            self.grid = ((height + (down - 1) * pads) // down, (width + (right - 1) * pads) // right)
        self.num_prefix = count - self.grid[0] * self.grid[1] - extra
        self.patches = slice(self.num_prefix, self.num_prefix + self.grid[0] * self.grid[1])
        if self.num_prefix != prefix and (prefix is not None or not 0 <= self.num_prefix <= MOST_PREFIX):
            raise UnsupportedModelError(
                f"{count} tokens are no grid of an image of {height} x {width} pixels: give another size, or a "
                "Vision Transformer"
            )
        sides = ((height // self.grid[0], -2), (width // self.grid[1], -1))
        self.steps = [step for step, side in zip(sides, self.grid, strict=True) if side > 1]

    def __call__(self, images_BCHW: Tensor) -> list[Tensor]:
        return [x[:, self.patches] for x in self.tokens(images_BCHW)]

    def tokens(self, images_BCHW: Tensor) -> list[Tensor]:
        """All tokens of every depth, (B, N, D) each, prefix tokens first. float32, CPU."""
        tokens: list[Tensor] = []

        def keep(value: Any) -> None:
            x = value[0] if isinstance(value, tuple) else value
            if x.ndim < 3 or len(x) != len(images_BCHW):
                raise UnsupportedModelError(
                    f"blocks with tokens of shape {tuple(x.shape)}, not (images, tokens, width)"
                )
            tokens.append(x.float().cpu().flatten(1, -2))

        hooks = [block.register_forward_hook(lambda _m, _args, output: keep(output)) for block in self.blocks]
        hooks.append(
            self.blocks[0].register_forward_pre_hook(
                lambda _m, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        )
        with watching(hooks):
            forward(self.model, images_BCHW)
        if len(tokens) != len(self.blocks) + 1:
            raise UnsupportedModelError(
                f"{len(tokens) - 1} of {len(self.blocks)} blocks ran once: the model is not a plain stack"
            )
        return tokens


def _parts(model: nn.Module) -> tuple[Anatomy | None, list[nn.Module], int | None]:
    """Anatomy, blocks, number of prefix tokens; None where no host knows the model, or it does not say its number."""
    check_module(model)
    try:
        anatomy = anatomy_of(model)
    except UnsupportedModelError:
        lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
        stacks = [stack for stack in lists if len({type(block) for block in stack}) == 1]
        if not stacks:
            raise UnsupportedModelError(
                f"no stack of equal blocks in this {type(model).__name__}: it cannot be probed"
            ) from None
        prefix = getattr(model, "num_prefix_tokens", None)
        return None, max(stacks, key=len), prefix if isinstance(prefix, int) else None
    if anatomy.shuffle is not None:
        raise UnsupportedModelError(
            "the model shuffles the patches of every image: its tokens are in no order to be probed"
        )
    return anatomy, [anatomy.root.get_submodule(path) for path in anatomy.blocks], anatomy.layout.num_prefix


def anatomy_of(model: nn.Module) -> Anatomy:
    """Of a converted model, or as its host says. Raises UnsupportedModelError where no host knows it."""
    anatomies = [c.anatomy for c in conversions(model) if c.anatomy.blocks]
    if anatomies:
        return anatomies[0]
    host, root = find_host(model)
    return host.examine(root)


def _grid_like(height: int, width: int, count: int) -> Grid:
    """The largest grid of an image's shape that has at most `count` patches."""
    unit = math.gcd(height, width)
    rows, columns = height // unit, width // unit
    side = math.isqrt(count // (rows * columns))
    return rows * side, columns * side


# --- attention --------------------------------------------------------------------------------------------------------


class Attention:
    """Watches attention in a model, for images of one size: its grid, prefix tokens, and weights by layer.

    Raises UnsupportedModelError where there is no attention between all tokens to be read, LapeError for images of
    another size than a converted model's own.
    """

    def __init__(self, model: nn.Module, images_BCHW: Tensor):
        self.model = model
        if any(c.anatomy.blocks for c in conversions(model)):
            conversion = conversion_of(model)
            check_size(conversion, images_BCHW)
            anatomy, layout = conversion.anatomy, conversion.layout
            self.blocks = [anatomy.root.get_submodule(path) for path in anatomy.blocks]
            self.grid, self.num_prefix, self.count = layout.grid, layout.num_prefix, layout.num_tokens
        else:
            watch = Watch(model, images_BCHW)
            self.blocks, self.grid = watch.blocks, watch.grid
            self.num_prefix, self.count = watch.num_prefix, watch.count
        self.patches = slice(self.num_prefix, self.num_prefix + math.prod(self.grid))
        kinds = {type(module).__name__ for block in self.blocks for module in block.modules()}
        if over := sorted(kinds & OVER_CHANNELS):
            raise UnsupportedModelError(
                f"{over[0]} attends over channels: there is no attention between tokens to read"
            )

    def run(self, images_BCHW: Tensor, use: Callable[[int, Tensor], None]) -> None:
        """A forward in which `use` gets (layer, weights (B, H, N, N)): the first between all tokens in each block."""
        inside: list[int] = []
        layers: set[int] = set()

        def use_with_layer(weights: Tensor) -> None:
            if not inside or inside[-1] in layers or weights.shape[-2:] != (self.count, self.count):
                return
            check_finite(weights, f"the attention weights of layer {inside[-1]}")
            layers.add(inside[-1])
            use(inside[-1], weights if weights.ndim == 4 else weights.unflatten(0, (len(images_BCHW), -1)))  # SAM

        hooks = [
            block.register_forward_pre_hook(lambda *_, layer=layer: inside.append(layer))
            for layer, block in enumerate(self.blocks)
        ]
        hooks += [block.register_forward_hook(lambda *_: inside.clear()) for block in self.blocks]
        with watching(hooks), _Weights(use_with_layer):
            forward(self.model, images_BCHW)
        if len(layers) != len(self.blocks):
            raise UnsupportedModelError(
                f"attention was seen in {len(layers)} of {len(self.blocks)} layers: this model computes it in a way "
                "that cannot be watched"
            )


class _Weights(TorchFunctionMode):
    """Hands the attention weights of every attention that runs to `use`, whichever way the host computes them."""

    def __init__(self, use: Callable[[Tensor], None]):
        super().__init__()
        self._use = use

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._use(_softmax(*args, **kwargs))
        elif func is F.multi_head_attention_forward:  # torch's own module, as torchvision's
            out, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
            assert weights is not None
            self._use(weights)
            return out, None
        result = func(*args, **kwargs)
        if func in (F.softmax, torch.softmax, Tensor.softmax) and result.ndim == 4:
            self._use(result)
        return result


def _softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights of `F.scaled_dot_product_attention`, whose arguments these are."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    logits = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None:
        mask = attn_mask
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1)


def check_size(conversion: Conversion, images_BCHW: Tensor) -> None:
    """Raises LapeError for other images than the model's own, UnsupportedModelError where tokens are no one grid."""
    if conversion.anatomy.stages:
        raise UnsupportedModelError(
            "the model attends in windows, on another grid in each stage: its attention is not drawn"
        )
    if conversion.anatomy.shuffle is not None:
        raise UnsupportedModelError(
            "the model shuffles the patches of every image, so its tokens are in no order that can be drawn: load its "
            "weights into ViTModel or ViTForImageClassification and convert that"
        )
    patch, grid = conversion.anatomy.patch_size, conversion.layout.grid
    if len(grid) != 2:
        raise UnsupportedModelError(
            "the model takes videos, its attention is not drawn: figures are of rows and columns"
        )
    size = (grid[0] * patch[0], grid[1] * patch[1])
    if images_BCHW.ndim != 4 or not len(images_BCHW) or tuple(images_BCHW.shape[-2:]) != size:
        raise LapeError(
            f"images of shape {tuple(images_BCHW.shape)} were given: (images, channels, {size[0]}, {size[1]}) is "
            "what this model takes"
        )


# --- hooks ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def forward(model: nn.Module, images_BCHW: Tensor) -> None:
    """A forward in eval mode, for those who watch it."""
    parameter = next(model.parameters())
    with evaluating(model):
        model(images_BCHW.to(parameter.device, parameter.dtype))
