"""What a model makes of position when it looks at images: attention, token statistics, and "where am I?".

Images are (B, C, height, width), transformed as in evaluation, of the model's own size.
Shape suffixes: B images, N tokens, n patches, D width, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.convert.converted import conversion_of
from lape.convert.positions import positions
from lape.core.joined import host_forward
from lape.core.joins import JOINS
from lape.core.position import Grid
from lape.errors import LapeError, check_finite
from lape.host.base import watching
from lape.look.similarity import coordinates
from lape.look.watch import BATCH, Attention, check_size, forward

# --- attention --------------------------------------------------------------------------------------------------------


def attention(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """The attention weights of every layer, (L, B, H, N, N), prefix tokens first; each row sums to 1. float32, CPU.

    Of any model whose blocks are found, converted or not. Raises LapeError for images of another size than a converted
    model's own, UnsupportedModelError for blocks whose attention is not between all tokens, or goes through no softmax
    or attention function of torch.
    """
    watch, batches = Attention(model, images_BCHW), []
    for batch in torch.split(images_BCHW, BATCH):
        layers: list[Tensor] = []
        watch.run(batch, lambda _layer, weights, layers=layers: layers.append(weights.float().cpu()))  # type: ignore[misc]
        batches.append(torch.stack(layers))
    return torch.cat(batches, 1)


def attention_distance(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """(L, H) mean attention distance in pixels: sum_j a_ij d_ij, averaged over query patches i and images.

    d_ij is the distance between the centres of patches; attention on prefix tokens is left out and the rest sums to 1.
    Raises what `attention` does. Source: ViT (arXiv 2010.11929), Fig. 11.
    """
    watch = Attention(model, images_BCHW)
    side = [pixels / count for pixels, count in zip(images_BCHW.shape[-2:], watch.grid, strict=True)]
    pixels_n2 = (coordinates(watch.grid) * torch.tensor(side)).float()
    distance_nn = torch.cdist(pixels_n2, pixels_n2)
    totals: dict[int, Tensor] = {}

    def add(layer: int, weights_BHNN: Tensor) -> None:
        patches = weights_BHNN[..., watch.patches, watch.patches].float().cpu()
        patches = patches / patches.sum(-1, keepdim=True).clamp(min=1e-12)
        total_H = (patches * distance_nn).sum(-1).mean(-1).sum(0).double()
        totals[layer] = totals.get(layer, 0) + total_H

    for batch in torch.split(images_BCHW, BATCH):
        watch.run(batch, add)
    return torch.stack([totals[layer] for layer in sorted(totals)]) / len(images_BCHW)


def rollout(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """(B, rows, columns) attention rollout: how much of each patch reaches the output, as far as attention tells.

        R = A'_L ... A'_1,   A' = (mean over heads of A + 1) / 2

    The row of the class token, or the mean over the patches where there is none; sums to 1 over the patches. Raises
    what `attention` does. Source: Abnar and Zuidema, arXiv 2005.00928.
    """
    watch, maps = Attention(model, images_BCHW), []
    for batch in torch.split(images_BCHW, BATCH):
        flow: list[Tensor] = []

        def follow(_layer: int, weights_BHNN: Tensor, flow: list[Tensor] = flow) -> None:
            mean = weights_BHNN.float().cpu().mean(1)
            step = (mean + torch.eye(mean.shape[-1])) / 2
            flow[:] = [step @ flow[0]] if flow else [step]

        watch.run(batch, follow)
        rows = flow[0][:, 0] if watch.num_prefix else flow[0].mean(1)
        patches = rows[:, watch.patches]
        maps.append((patches / patches.sum(-1, keepdim=True)).reshape(-1, *watch.grid))
    return torch.cat(maps)


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
    seen_positions = positions(model, view="seen").detach()[:, prefix:]
    received_positions = positions(model).detach()[:, prefix:]
    scale, correlation = (torch.zeros(len(seen_positions), dtype=torch.float64) for _ in range(2))
    for batch in torch.split(images_BCHW, BATCH):
        for layer, x in enumerate(_tokens(model, batch)):
            total = x.attention_input if join.normalised and layer >= join.first else x.stream
            ratio = _std(received_positions[layer]) / _std(total[:, prefix:]).clamp(min=1e-12)
            scale[layer] += ratio.mean(-1).sum().cpu()
            correlation[layer] += _pearson(x.norm[:, prefix:], seen_positions[layer]).mean(-1).sum().cpu()
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
                tokens_BND = x.stream if what == "stream" else x.attention_input
                yield layer, F.pad(tokens_BND[:, prefix:].flatten(0, 1).double().cpu(), (0, 1), value=1.0)

    gram, cross = torch.zeros(layers, width + 1, width + 1).double(), torch.zeros(layers, width + 1, 2).double()
    for layer, x in tokens(images_BCHW[:half]):
        gram[layer] += x.T @ x
        cross[layer] += x.T @ place_n2.repeat(len(x) // len(place_n2), 1)
    readout = fit_places(gram, cross, ridge)

    errors = torch.zeros(layers, 2).double()
    for layer, x in tokens(images_BCHW[half:]):
        errors[layer] += (x @ readout[layer] - place_n2.repeat(len(x) // len(place_n2), 1)).square().sum(0)
    total = place_n2.square().sum(0) * (len(images_BCHW) - half)
    return torch.where(total > 0, 1 - errors / total.clamp(min=1e-12), torch.nan)


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
    place_n2 = coordinates(grid).double()
    return place_n2 - place_n2.mean(0)


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
    last_block = anatomy.root.get_submodule(anatomy.blocks[-1])
    hooks = [norm.register_forward_hook(keep) for norm in norms]
    hooks.append(last_block.register_forward_hook(lambda *_: calls.clear()))  # not what runs before the last block
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


@dataclass
class _LayerTokens:
    """What one layer got: the tokens that enter LN_l, LN_l of them, what attention sees; (B, N, D) each."""

    stream: Tensor
    norm: Tensor
    attention_input: Tensor


def _tokens(model: nn.Module, images_BCHW: Tensor) -> list[_LayerTokens]:
    conversion = conversion_of(model)
    anatomy = conversion.anatomy
    layers: list[dict[str, Tensor]] = [{} for _ in anatomy.blocks]
    norms = [anatomy.root.get_submodule(anatomy.norm_of(layer)) for layer in range(len(anatomy.blocks))]

    def keep(layer: int, norm: nn.Module, args: Any, output: Tensor) -> None:
        layers[layer] = {"stream": args[0], "norm": host_forward(norm, args[0]), "attention_input": output}

    with watching([norm.register_forward_hook(partial(keep, layer)) for layer, norm in enumerate(norms)]):
        _forward(model, images_BCHW)
    for layer, entry in enumerate(layers):
        check_finite(entry["attention_input"], f"the tokens of layer {layer}")
    return [_LayerTokens(**{name: value.float() for name, value in entry.items()}) for entry in layers]


def _forward(model: nn.Module, images_BCHW: Tensor) -> None:
    check_size(conversion_of(model), images_BCHW)
    forward(model, images_BCHW)


def _std(x: Tensor) -> Tensor:
    return x.double().std(-1, correction=0)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (a, b))
    return F.cosine_similarity(a, b, dim=-1)
