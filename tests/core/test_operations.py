"""What a join costs, counted and not timed: operations, parameters, buffers and bytes, exactly, as functions of layers.

L layers, R rows of the position table, D width. `LaPE` is L norms of a (1, R, D) position and L additions over `basic`,
2 D parameters a layer; folded, the L additions are left.
"""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import TINY

import lape

DEPTHS = [1, 2, 5]
ONE_FAST = [DEPTHS[1], *(pytest.param(depth, marks=pytest.mark.slow) for depth in (DEPTHS[0], *DEPTHS[2:]))]
D, R = TINY["embed_dim"], 17


class Operations(TorchDispatchMode):
    """Counts what reaches torch's kernels, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            # what a mode watches is added out of place, as it may be kept; else the same additions are in place
            self.count[function._schema.name.removeprefix("aten::").removesuffix("_")] += 1
        return function(*args, **(kwargs or {}))


def model(join: str, depth: int, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return lape.create_model("vit_tiny_patch16_224", join, **{**TINY, "depth": depth, **kwargs}).eval()


def operations(of: nn.Module, *, train: bool = False) -> Counter[str]:
    x = torch.randn(2, 3, 16, 16)
    of(x)  # the one zero that hides the table is made once a device
    with torch.set_grad_enabled(train), Operations() as seen:
        y = of(x)
        if train:
            y.sum().backward()
    return seen.count


def more(mine: Counter[str], basic: Counter[str]) -> dict[str, int]:
    """What `mine` has more of, or less."""
    return {name: mine[name] - basic[name] for name in mine | basic if mine[name] != basic[name]}


@pytest.mark.parametrize("depth", DEPTHS)
def test_operations_of_a_forward(depth):
    basic, converted = operations(model("basic", depth)), operations(model("LaPE", depth))
    assert basic["native_layer_norm"] == 2 * depth + 1
    assert more(converted, basic) == {"native_layer_norm": depth, "add": depth}
    assert more(operations(model("LaPE-sharing", depth)), basic) == {"native_layer_norm": depth, "add": depth}
    assert more(operations(lape.fold_(model("LaPE", depth))), basic) == {"add": depth}
    assert more(operations(lape.remove_(model("LaPE", depth))), basic) == {}
    assert more(operations(model("share", depth)), basic) == {"add": depth}


@pytest.mark.parametrize("depth", ONE_FAST)
def test_operations_of_a_training_step(depth):
    basic, converted = (operations(model(join, depth).train(), train=True) for join in ("basic", "LaPE"))
    expected = {"native_layer_norm": depth, "native_layer_norm_backward": depth, "add": depth}
    if depth > 1:  # gradients: each is summed over the batch, and each P but the last has two users
        expected |= {"sum": depth - 1, "add": 2 * depth - 1}
    assert more(converted, basic) == expected


def grew(name: str, shallow: int, deep: int, **kwargs) -> Counter[str]:
    return operations(model(name, deep), **kwargs) - operations(model(name, shallow), **kwargs)


def test_the_chain_is_linear_in_the_layers():
    for train in (False, True):
        assert {n: 2 * c for n, c in grew("LaPE", 4, 8, train=train).items()} == grew("LaPE", 4, 12, train=train)
    deep = model("LaPE", 12)
    with Operations() as seen:
        lape.positions(deep)
    assert seen.count["native_layer_norm"] == 12


@pytest.mark.parametrize("depth", DEPTHS)
def test_parameters_buffers_and_bytes(depth):
    basic, converted = model("basic", depth), model("LaPE", depth)
    folded = lape.fold_(copy.deepcopy(converted))

    def numbers(of: nn.Module) -> tuple[int, int, int]:
        stored = sum(t.numel() * t.element_size() for t in of.state_dict().values())
        return sum(p.numel() for p in of.parameters()), sum(b.numel() for b in of.buffers()), stored

    parameters, buffers, stored = numbers(basic)
    chain, table = 2 * D * depth, R * D
    assert numbers(converted) == (parameters + chain, buffers, stored + 4 * chain)
    assert numbers(folded) == (parameters - table, buffers + table + depth * table, stored + 4 * depth * table)


@pytest.mark.parametrize("depth", ONE_FAST)
def test_nodes_of_an_exported_graph(depth):
    def nodes(of: nn.Module) -> Counter[str]:
        graph = torch.export.export(of, (torch.randn(2, 3, 16, 16),), strict=False).graph
        targets = [node.target for node in graph.nodes if node.op == "call_function"]
        return Counter(t._schema.name.removeprefix("aten::") for t in targets if hasattr(t, "_schema"))

    basic = nodes(model("basic", depth))
    zeros = {"zeros_like": 1}  # what the host adds in place of its table
    assert more(nodes(lape.fold_(model("LaPE", depth))), basic) == {"add_": depth, **zeros}
    converted = nodes(model("LaPE", depth))
    for name in ("to", "_assert_tensor_metadata"):  # to the dtype of the tokens, which it has: nothing to do
        converted[name] = basic[name]
    assert more(converted, basic) == {"layer_norm": depth, "add_": depth, **zeros}


@pytest.mark.slow
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_compiled_graph_has_one_norm_a_layer(depth):
    counts = []

    def count(graph: torch.fx.GraphModule, _inputs):
        counts.append(sum("layer_norm" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    for name in ("basic", "LaPE"):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model(name, depth), backend=count, fullgraph=True)(torch.randn(2, 3, 16, 16))
    assert counts == [2 * depth + 1, 3 * depth + 1]


def test_a_position_is_added_in_place_where_nobody_watches():
    norm, x = model("LaPE", 1).blocks[0].norm1, torch.randn(2, R, D)
    versions = []
    plain = type(norm)._host.forward

    def layer_norm(self, t):
        versions.append(y := plain(self, t))
        return y

    type(norm)._host.forward, kept = layer_norm, plain
    try:
        with torch.no_grad():
            assert norm(x) is versions[0]
            with Operations():
                assert norm(x) is not versions[1]
    finally:
        type(norm)._host.forward = kept
