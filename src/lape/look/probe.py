"""What a model makes of position when it looks at images: attention, token statistics, and "where am I?".

The model's own forward runs; hooks and torch's function override watch it, and nothing of it is copied. Images are
(B, C, height, width), transformed as in evaluation, of the model's own size.
Shape suffixes: B images, N tokens, n patches, D width, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lape.convert.converted import Conversion, conversion_of
from lape.convert.positions import positions
from lape.core.joined import host_forward
from lape.core.joins import JOINS
from lape.core.position import Grid
from lape.errors import LapeError, check_finite

BATCH = 16  # images at a time: what is watched is used at once, not kept

# --- attention --------------------------------------------------------------------------------------------------------


def attention(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """The attention weights of every layer, (L, B, H, N, N), prefix tokens first; each row sums to 1. float32, CPU.

    Raises LapeError for a model that is not converted, images of another size, or a block whose attention goes
    through no softmax or attention function of torch.
    """
    batches = []
    for batch in torch.split(images_BCHW, BATCH):
        layers: list[Tensor] = []
        _run(model, batch, lambda _layer, weights, layers=layers: layers.append(weights.float().cpu()))  # type: ignore[misc]
        batches.append(torch.stack(layers))
    return torch.cat(batches, 1)


def attention_distance(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """(L, H) mean attention distance in pixels: sum_j a_ij d_ij, averaged over query patches i and images.

    d_ij is the distance between the centres of patches; attention on prefix tokens is left out and the rest sums to 1.
    Source: ViT (arXiv 2010.11929), Fig. 11.
    """
    conversion = conversion_of(model)
    prefix, anatomy = conversion.layout.num_prefix, conversion.anatomy
    row, column = torch.meshgrid(*map(torch.arange, conversion.layout.grid), indexing="ij")
    place = torch.stack([row.flatten() * anatomy.patch_size[0], column.flatten() * anatomy.patch_size[1]], -1).float()
    distance_nn = torch.cdist(place, place)
    totals = torch.zeros(len(anatomy.blocks), anatomy.num_heads, dtype=torch.float64)

    def add(layer: int, weights_BHNN: Tensor) -> None:
        patches = weights_BHNN[..., prefix:, prefix:].float().cpu()
        patches = patches / patches.sum(-1, keepdim=True).clamp(min=1e-12)
        totals[layer] += (patches * distance_nn).sum(-1).mean(-1).sum(0).double()

    for batch in torch.split(images_BCHW, BATCH):
        _run(model, batch, add)
    return totals / len(images_BCHW)


def rollout(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """(B, rows, columns) attention rollout: how much of each patch reaches the output, as far as attention tells.

        R = A'_L ... A'_1,   A' = (mean over heads of A + 1) / 2

    The row of the class token, or the mean over the patches where there is none; sums to 1 over the patches.
    Source: Abnar and Zuidema, arXiv 2005.00928.
    """
    layout = conversion_of(model).layout
    maps = []
    for batch in torch.split(images_BCHW, BATCH):
        flow: list[Tensor] = []

        def follow(_layer: int, weights_BHNN: Tensor, flow: list[Tensor] = flow) -> None:
            mean = weights_BHNN.float().cpu().mean(1)
            step = (mean + torch.eye(mean.shape[-1])) / 2
            flow[:] = [step @ flow[0]] if flow else [step]

        _run(model, batch, follow)
        rows = flow[0][:, 0] if layout.num_prefix else flow[0].mean(1)
        patches = rows[:, layout.num_prefix :]
        maps.append((patches / patches.sum(-1, keepdim=True)).reshape(-1, *layout.grid))
    return torch.cat(maps)


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
    logits = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        mask = attn_mask
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1)


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratios:
    """Means over images and patches, (L,) each."""

    scale: Tensor
    correlation: Tensor


def token_and_position(model: nn.Module, images_BCHW: Tensor) -> Ratios:
    """How position stands to the tokens in every layer, on real images.

    scale: sigma_P / sigma_(x+P), sigma the standard deviation over the width of a token: the factor by which a token
    norm scales the position (LaPE, ICCV 2023, Eq. 7). For `basic` and `share` x+P is what enters LN_l, which holds all
    position added so far; where position has a norm of its own, P and x+P are the two terms' sum that attention sees.
    correlation: Pearson correlation over the width between LN_l(x) and the position that the layer sees (as drawn by
    MPVG, arXiv 2502.02919, for its models): negative where tokens work against the position.

    Raises LapeError where a model has no position per token (RPE, none).
    """
    conversion = conversion_of(model)
    prefix, join = conversion.layout.num_prefix, JOINS[conversion.join]
    seen = positions(model, view="seen").detach()[:, prefix:]
    received = positions(model).detach()[:, prefix:]
    scale, correlation = (torch.zeros(len(seen), dtype=torch.float64) for _ in range(2))
    for batch in torch.split(images_BCHW, BATCH):
        for layer, x in enumerate(_tokens(model, batch)):
            whole = x.attended if join.normalised and layer >= join.first else x.entering
            scale[layer] += (_std(received[layer]) / _std(whole[:, prefix:]).clamp(min=1e-12)).mean(-1).sum().cpu()
            correlation[layer] += _pearson(x.normed[:, prefix:], seen[layer]).mean(-1).sum().cpu()
    return Ratios(scale / len(images_BCHW), correlation / len(images_BCHW))


def where_am_i(
    model: nn.Module, images_BCHW: Tensor, what: Literal["stream", "seen"] = "stream", ridge: float = 1e-3
) -> Tensor:
    """(L, 2) how well a linear probe reads row and column from the patch tokens of layer l: R^2 on images not fitted.

    1: exactly; 0: no better than the middle of the grid. One probe a layer: ridge regression (`ridge` times the mean
    eigenvalue of the tokens' covariance) on the first half of the images, tested on the others. A side of one patch
    has nothing to read: NaN.

    Args:
        what: "stream": the tokens that enter LN_l; "seen": what attention gets, LN_l(x) plus the layer's position.

    Raises LapeError for fewer than two images.
    """
    if len(images_BCHW) < 2:
        raise LapeError(f"a probe needs images to fit and others to test, {len(images_BCHW)} given: give 2 or more")
    if what not in ("stream", "seen"):
        raise LapeError(f"unknown tokens {what!r}: known are 'stream' and 'seen'")
    conversion = conversion_of(model)
    prefix = conversion.layout.num_prefix
    place_n2 = places(conversion.layout.grid)
    width, layers = conversion.anatomy.width, len(conversion.anatomy.blocks)
    half = len(images_BCHW) // 2

    def tokens(images: Tensor) -> Iterator[tuple[int, Tensor]]:
        for batch in torch.split(images, BATCH):
            for layer, x in enumerate(_tokens(model, batch)):
                tokens_BND = x.entering if what == "stream" else x.attended
                yield layer, F.pad(tokens_BND[:, prefix:].flatten(0, 1).double().cpu(), (0, 1), value=1.0)

    gram, cross = torch.zeros(layers, width + 1, width + 1).double(), torch.zeros(layers, width + 1, 2).double()
    for layer, x in tokens(images_BCHW[:half]):
        gram[layer] += x.T @ x
        cross[layer] += x.T @ place_n2.repeat(len(x) // len(place_n2), 1)
    readout = fit_places(gram, cross, ridge)

    wrong = torch.zeros(layers, 2).double()
    for layer, x in tokens(images_BCHW[half:]):
        wrong[layer] += (x @ readout[layer] - place_n2.repeat(len(x) // len(place_n2), 1)).square().sum(0)
    total = place_n2.square().sum(0) * (len(images_BCHW) - half)
    return torch.where(total > 0, 1 - wrong / total.clamp(min=1e-12), torch.nan)


def fit_places(gram: Tensor, cross: Tensor, ridge: float, measure: Tensor | None = None) -> Tensor:
    """Ridge regressions (L, D + 1, 2) from products of tokens that end in a 1: x^T x (L, D + 1, D + 1), x^T place.

    The penalty is `ridge` times the mean eigenvalue, of `measure` where that is given; the constant is not damped.
    """
    penalty = ridge * (gram if measure is None else measure).diagonal(dim1=-2, dim2=-1)[:, :-1].mean(-1)
    damp = torch.diag_embed(F.pad(penalty[:, None].expand(-1, gram.shape[-1] - 1), (0, 1)))
    solution: Tensor = torch.linalg.lstsq(gram + damp, cross, driver="gelsd").solution
    return solution


def places(grid: Grid) -> Tensor:
    """(n, 2) row and column, their middle taken off."""
    row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    place = torch.stack([row.flatten(), column.flatten()], -1).double()
    return place - place.mean(0)


@dataclass(frozen=True)
class LastNorm:
    """The norm before pooling and head."""

    weight: Tensor | None  # (D,)
    bias: Tensor | None  # (D,)
    bias_variance: float | None
    cosine: Tensor  # (B, N) between a token before and after
    length_before: Tensor  # (B, rows, columns) length of the patch tokens
    length_after: Tensor


def last_norm(model: nn.Module, images_BCHW: Tensor) -> LastNorm:
    """Statistics of the last norm, as drawn by MPVG (arXiv 2502.02919): gain and bias, the variance of the bias over
    the width, the cosine of every token before and after, and the lengths of the patch tokens.

    Raises LapeError where the first LayerNorm behind the blocks does not see the tokens (a norm of pooled features).
    """
    conversion = conversion_of(model)
    anatomy, layout = conversion.anatomy, conversion.layout
    inside = {id(m) for path in anatomy.blocks for m in anatomy.root.get_submodule(path).modules()}
    calls: list[tuple[nn.LayerNorm, Tensor, Tensor]] = []  # of one forward: the norm, its input and output

    def keep(module: nn.Module, args: Any, _output: Tensor) -> None:
        assert isinstance(module, nn.LayerNorm)
        if not calls or calls[0][0] is module:
            by_itself = host_forward(module, args[0])
            calls.append((module, args[0].detach().cpu().float(), by_itself.detach().cpu().float()))

    norms = [m for m in anatomy.root.modules() if isinstance(m, nn.LayerNorm) and id(m) not in inside]
    last = anatomy.root.get_submodule(anatomy.blocks[-1])
    hooks = [*((norm, keep) for norm in norms), (last, lambda *_: calls.clear())]  # not what runs before the last block
    calls_of_all = []
    with watching(hooks):
        for batch in torch.split(images_BCHW, BATCH):
            _forward(model, batch)
            calls_of_all += calls
    if not calls or calls[0][1].ndim != 3 or calls[0][1].shape[1] != layout.num_tokens:
        raise LapeError("no LayerNorm of the tokens behind the last block: this model norms its pooled features")
    norm = calls[0][0]
    before, after = (torch.cat([call[k] for call in calls_of_all]) for k in (1, 2))  # type: ignore[misc]
    check_finite(after, "the tokens behind the last norm")
    length = [x[:, layout.num_prefix :].norm(dim=-1).unflatten(-1, layout.grid) for x in (before, after)]
    return LastNorm(
        weight=None if norm.weight is None else norm.weight.detach().cpu(),
        bias=None if norm.bias is None else norm.bias.detach().cpu(),
        bias_variance=None if norm.bias is None else norm.bias.detach().double().var(correction=0).item(),
        cosine=F.cosine_similarity(before, after, dim=-1),
        length_before=length[0],
        length_after=length[1],
    )


# --- watching ---------------------------------------------------------------------------------------------------------

Hook = tuple[nn.Module, Callable[..., None]]


@contextmanager
def watching(hooks: Sequence[Hook]) -> Iterator[None]:
    """Calls each hook after its module's forward."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Seen:
    """What one layer got: tokens entering LN_l, LN_l of them, what attention sees; (B, N, D) each."""

    entering: Tensor
    normed: Tensor
    attended: Tensor


def _tokens(model: nn.Module, images_BCHW: Tensor) -> list[_Seen]:
    conversion = conversion_of(model)
    anatomy = conversion.anatomy
    layers: list[dict[str, Tensor]] = [{} for _ in anatomy.blocks]
    hooks: list[Hook] = []

    def keep(layer: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(norm: nn.Module, args: Any, output: Tensor) -> None:
            layers[layer] = {"entering": args[0], "normed": host_forward(norm, args[0]), "attended": output}

        return hook

    for layer in range(len(anatomy.blocks)):
        hooks.append((anatomy.root.get_submodule(anatomy.norm_of(layer)), keep(layer)))
    with watching(hooks):
        _forward(model, images_BCHW)
    for layer, entry in enumerate(layers):
        check_finite(entry["attended"], f"the tokens of layer {layer}")
    return [_Seen(**{name: value.float() for name, value in entry.items()}) for entry in layers]


def _run(model: nn.Module, images_BCHW: Tensor, use: Callable[[int, Tensor], None]) -> None:
    """A forward in which `use` gets (layer, attention weights (B, H, N, N))."""
    layers, count = len(conversion_of(model).anatomy.blocks), 0

    def numbered(weights: Tensor) -> None:
        nonlocal count
        if count < layers:
            check_finite(weights, f"the attention weights of layer {count}")
            use(count, weights)
            count += 1

    with _Weights(numbered):
        _forward(model, images_BCHW)
    if count != layers:
        raise LapeError(
            f"attention was seen in {count} of {layers} layers: this model computes it in a way that cannot be watched"
        )


@torch.no_grad()
def _forward(model: nn.Module, images_BCHW: Tensor) -> None:
    conversion = conversion_of(model)
    _check_size(conversion, images_BCHW)
    like = next(model.parameters())
    with evaluating(model):
        model(images_BCHW.to(like.device, like.dtype))


def _check_size(conversion: Conversion, images_BCHW: Tensor) -> None:
    if conversion.anatomy.stages:
        raise LapeError("the model attends in windows, on another grid in each stage: its attention is not drawn")
    if conversion.anatomy.shuffle is not None:
        raise LapeError(
            "the model shuffles the patches of every image, so its tokens are in no order that can be drawn: load its "
            "weights into ViTModel or ViTForImageClassification and convert that"
        )
    patch, grid = conversion.anatomy.patch_size, conversion.layout.grid
    if len(grid) != 2:
        raise LapeError("the model takes videos, its attention is not drawn: figures are of rows and columns")
    size = (grid[0] * patch[0], grid[1] * patch[1])
    if images_BCHW.ndim != 4 or not len(images_BCHW) or tuple(images_BCHW.shape[-2:]) != size:
        raise LapeError(
            f"images of shape {tuple(images_BCHW.shape)} were given: (images, channels, {size[0]}, {size[1]}) is "
            "what this model takes"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _std(x: Tensor) -> Tensor:
    return x.double().std(-1, correction=0)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (a, b))
    return F.cosine_similarity(a, b, dim=-1)
