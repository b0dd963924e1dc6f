"""The equations written out, from saved tensors and plain modules: what a converted model is compared with."""

import copy
import itertools
from collections.abc import Collection, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from zoo import output

import lape
from lape.convert.converted import conversion_of
from lape.core.joins import JOINS, check_combination
from lape.core.position import KINDS

MEANINGFUL = []


ANYWHERE = [join.name for join in JOINS.values() if not join.needs_pooling]


for _join, _kind in itertools.product(JOINS.values(), KINDS.values()):
    elsewhere = _kind.conditional or _kind.untouched or _kind.fixed_bias or _kind.rotary  # tests/convert/test_rivals.py
    if _join.needs_pooling or elsewhere:  # tests/convert/test_pooled.py
        continue
    try:
        check_combination(_join, _kind)
        MEANINGFUL.append((_join.name, _kind.name))
    except lape.LapeError:
        pass


TOLERANCE = 2e-6


def hosts_with(
    pairs: Sequence[tuple[str, str | None]], hosts: Iterable[str], whole: Collection[str]
) -> list[tuple[str, str | None, str]]:
    """(join, kind, host): all pairs with the hosts in `whole`; each other host meets each join and each kind.

    Joins, kinds and hosts are written apart: a mistake in one shows wherever it is, one between two of them where
    those two meet.
    """
    cases = []
    for place, host in enumerate(hosts):
        start = 5 * place % len(pairs)  # another beginning for each host, so that others meet
        met: set[str | None] = set()
        for join, pe in (*pairs[start:], *pairs[:start]):
            if host in whole or not {f"join {join}", pe} <= met:
                cases.append((join, pe, host))
            met |= {f"join {join}", pe}
    return cases


def shake_position(model: torch.nn.Module) -> None:
    """Gives every parameter of position a value that shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("lape.", "pos_embed", "position_embedding", "bias_table")):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


def of_position(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of position, by name: all that is new, and the table in the host's slot."""
    conversion = conversion_of(model)
    table = f"{conversion.path}{conversion.anatomy.table_slot}"
    return {n: p for n, p in model.named_parameters() if n.startswith(f"{conversion.path}lape.") or n == table}


def unconverted(model: torch.nn.Module, original: torch.nn.Module) -> torch.nn.Module:
    """The host with the numbers that its parameters have in a converted model, where they have the same names."""
    host, state = copy.deepcopy(original), model.state_dict()
    host.load_state_dict({key: state[key] for key in host.state_dict()}, strict=True)
    return host


def written_out(
    converted: torch.nn.Module,
    original: VisionTransformer,
    x: torch.Tensor,
    join: str,
    kind: str,
    pe_norm: str = "layernorm",
) -> torch.Tensor:
    """The formulas of the README, step by step, from saved numbers and the modules of an unconverted model."""
    state, model = lape.to_reference_state_dict(converted), unconverted(converted, original)
    layers = len(model.blocks)
    width, n = model.embed_dim, model.patch_embed.num_patches
    cls_dist_reg = [
        token.expand(x.shape[0], -1, -1)
        for name in ("cls_token", "dist_token", "reg_token")
        if (token := getattr(model, name, None)) is not None
    ]
    prefix = sum(token.shape[1] for token in cls_dist_reg)
    patches = model.patch_embed(x).reshape(x.shape[0], n, width)
    tokens = torch.cat([*cls_dist_reg, patches], dim=1)

    def table(name: str) -> torch.Tensor:
        p = state[name].reshape(1, -1, width)
        return F.pad(p, (0, 0, prefix, 0)) if model.no_embed_class else p

    def normed(p: torch.Tensor, home: str) -> torch.Tensor:
        weight, bias = (state.get(f"{home}.pe_norm.{name}") for name in ("weight", "bias"))
        y = F.layer_norm(p, (width,), eps=1e-6) if pe_norm.endswith("norm") else p
        if pe_norm == "learned-norm":
            y = p / (p.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        y = (1 if weight is None else weight) * y + (0 if bias is None else bias)
        if model.no_embed_class:
            y[:, :prefix] = 0
        return y

    def bias(layer: int) -> torch.Tensor | None:
        if "RPE" not in kind:
            return None
        entries, (rows, columns) = (
            state[f"blocks.{layer}.attn.relative_position_bias_table"],
            model.patch_embed.grid_size,
        )
        b = torch.zeros(entries.shape[1], n, n)
        for i, j in itertools.product(range(n), range(n)):
            dy, dx = i // columns - j // columns, i % columns - j % columns
            offset = i - j + n - 1 if kind == "1D_RPE" else (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1
            b[:, i, j] = entries[offset]
        if join == "LaPE":
            weight, shift = (state[f"blocks.{layer}.attn.pe_norm.{name}"] for name in ("weight", "bias"))
            b = F.layer_norm(b, (n,), weight, shift, eps=1e-5)
        return F.pad(b, (prefix, 0, prefix, 0))[None]

    has_table = KINDS[kind].is_table
    h = tokens + table("pos_embed") if join in ("basic", "PVG", "MPVG") and has_table else tokens
    h = model.norm_pre(h)
    p = None if join in ("basic", "unshare") or not has_table else table("pos_embed")
    for layer in range(layers):
        block = model.blocks[layer]
        if join == "share":
            h = h + p
        if join == "unshare":
            h = h + table(f"pos_embed{layer}")
        seen = block.norm1(h)
        if join == "beside":
            seen = seen + (F.pad(p[:, prefix:], (0, 0, prefix, 0)) if model.no_embed_class else p)
        if join == "LaPE-sharing":
            seen = seen + normed(p, f"blocks.{layer}")
        if join == "LaPE" and has_table:
            p = normed(p, f"blocks.{layer}")
            seen = seen + p
        if join in ("PVG", "MPVG") and layer > 0:
            p = normed(p, f"blocks.{layer}")
            seen = seen + p
        h = h + block.ls1(block.attn(seen, attn_mask=bias(layer)))
        h = h + block.ls2(block.mlp(block.norm2(h)))
    if join == "MPVG":
        return model.forward_head(model.norm(h) + normed(table("pos_embed"), "norm"))
    return model.forward_head(model.norm(h))


def assert_same_structure(model: torch.nn.Module, original: torch.nn.Module) -> None:
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in original.named_modules()]
    for kind in ("named_parameters", "named_buffers"):
        assert [n for n, _ in getattr(model, kind)()] == [n for n, _ in getattr(original, kind)()]
    assert list(model.state_dict()) == list(original.state_dict())
    for (path, ours), (_, theirs) in zip(model.named_modules(), original.named_modules(), strict=True):
        assert set(vars(ours)) == set(vars(theirs)), path
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks"):
            assert len(getattr(ours, hooks)) == len(getattr(theirs, hooks)), path


def capture(module: torch.nn.Module, into: list) -> None:
    """Records the first tensor that a module is given."""

    def hook(_, args, kwargs):
        into.append(args[0] if args else kwargs["hidden_states"])

    module.register_forward_pre_hook(hook, with_kwargs=True)


def received(model: torch.nn.Module, join: str, kind: str) -> list[torch.Tensor]:
    """What each block receives, (1, N, D), written out from the saved state: LN by hand, zero rows for bare tokens."""
    state, conversion = lape.to_reference_state_dict(model), conversion_of(model)
    prefix = conversion.path
    layout, width = conversion.layout, conversion.anatomy.width
    slot = prefix + conversion.anatomy.table_slot

    def normed(p, path):
        centred = p - p.mean(-1, keepdim=True)
        eps = getattr(conversion.anatomy.root.get_submodule(path), conversion.anatomy.norm).eps
        y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return y * state[f"{prefix}{path}.pe_norm.weight"] + state[f"{prefix}{path}.pe_norm.bias"]

    def spread(p):
        zeros = torch.zeros(1, layout.bare, width)
        return torch.cat([p[:, : layout.prefix_rows], zeros, p[:, layout.prefix_rows :]], 1)

    chain, out = None, []
    for i, path in enumerate(conversion.anatomy.blocks):
        table = state[f"{slot}{i}" if join == "unshare" else slot].reshape(1, -1, width)
        if join == "LaPE":
            chain = normed(table if chain is None else chain, path)
        out.append(
            spread(
                {"LaPE": chain, "LaPE-sharing": normed(table, path) if join == "LaPE-sharing" else None}.get(
                    join, table
                )
            )
        )
    return out


def check_layers(model: torch.nn.Module, x: torch.Tensor, join: str, pe: str) -> None:
    """Inside the forward: the stream that enters each block, what its attention sees, and what its MLP's norm gets."""
    conversion = conversion_of(model)
    anatomy, site = conversion.anatomy, JOINS[join].site
    entered, attended, norms = [], [], []
    for path in anatomy.blocks:
        block = anatomy.root.get_submodule(path)
        capture(block, entered)
        capture(getattr(block, anatomy.attention), attended)
        norms.append(partial(torch.nn.LayerNorm.forward, getattr(block, anatomy.norm)))
    output(model, x)
    assert len(entered) == len(attended) == 2
    p = received(model, join, pe) if KINDS[pe].is_table else [torch.zeros(())] * 2
    for h, seen, token_norm, p_l in zip(entered, attended, norms, p, strict=True):
        expected = {"input": token_norm(h), "block": token_norm(h + p_l), "norm": token_norm(h) + p_l}[site]
        if KINDS[pe].is_bias:
            expected = token_norm(h)
        assert (seen - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_host_keys(model: torch.nn.Module, original: torch.nn.Module, *, parameters: bool = True) -> None:
    """Every key of the host is one of the converted model, in its order and shape; what is new begins with `lape.`."""
    ours, theirs = model.state_dict(), original.state_dict()
    path = conversion_of(model).path
    assert {key: ours[key].shape for key in theirs} == {key: tensor.shape for key, tensor in theirs.items()}
    assert all(key.startswith(f"{path}lape.") for key in ours if key not in theirs)
    missing, unexpected = copy.deepcopy(model).load_state_dict(theirs, strict=False)
    assert not unexpected
    assert set(missing) == {key for key in ours if key not in theirs}
    if parameters:  # with a kind that has no table, the host's lies idle, as a buffer
        names = [name for name, _ in original.named_parameters()]
        assert [name for name, _ in model.named_parameters() if f"{path}lape." not in name] == names


def plain(module: torch.nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """What a host's module returns by itself: its forward as its own library has it."""
    own = next(c for c in type(module).__mro__ if not c.__module__.startswith("lape.c") and "forward" in vars(c))
    return own.forward(module, *args)
