"""The chain is computed once a forward, and what is handed over is never out of date."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import NEEDS_HAND_OVER, TINY
from lape.norm import PositionalNorm
from torch import nn
from torch.utils.checkpoint import checkpoint

import lape

LAYERS = TINY["depth"]


def converted(depth: int = LAYERS, join: str = "LaPE", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = lape.create_model("vit_tiny_patch16_224", join, **{**TINY, "depth": depth, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16)


class Calls:
    """How often the norms of position run."""

    def __init__(self, model: nn.Module):
        self.count = 0
        for module in model.modules():
            if isinstance(module, PositionalNorm):
                module.pe_norm.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1

    def of(self, run) -> int:
        self.count = 0
        run()
        return self.count


def without_handover(model: nn.Module) -> nn.Module:
    """The same model, whose norms always ask all the way down."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, PositionalNorm):
            module.successor = None
    return plain


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@NEEDS_HAND_OVER
@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_forward_computes_each_norm_once(depth, mode):
    model, x = converted(depth), image()
    calls = Calls(model)
    with mode():
        assert calls.of(lambda: model(x)) == depth
        assert calls.of(lambda: model(x)) == depth
        assert calls.of(lambda: lape.positions(model)) == depth
    plain = without_handover(model)
    assert Calls(plain).of(lambda: plain(x)) == depth * (depth + 1) // 2


def test_outputs_are_equal_bit_for_bit_and_gradients_to_rounding():
    model, x = converted(), image()
    plain = without_handover(model)
    assert torch.equal(model(x), plain(x))
    ours, theirs = gradients(model, x), gradients(plain, x)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def test_not_stale_across_a_step_of_the_optimizer_nor_an_assignment():
    model, x = converted(), image()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        gradients(model, x)
        optimizer.step()
        assert torch.equal(model(x), without_handover(model)(x))
    model.blocks[0].norm1.pe_norm.weight = nn.Parameter(torch.randn(TINY["embed_dim"]))
    assert torch.equal(model(x), without_handover(model)(x))


class Stop(Exception):
    pass


def abandoned(model: nn.Module, x: torch.Tensor, layer: int = 1) -> None:
    """A forward that ends right after the norm of a layer, which has left its P for a successor that never asks."""

    def stop(*_: object) -> None:
        raise Stop

    handle = model.blocks[layer].norm1.register_forward_hook(stop)
    with pytest.raises(Stop):
        model(x)
    handle.remove()


def is_kept(model: nn.Module, layer: int = 1) -> bool:
    return bool(model.blocks[layer].norm1.successor._kept.__dict__)


@NEEDS_HAND_OVER
@pytest.mark.parametrize("change", ["table", "norm", "another norm", "replaced", "grid", "grad", "autocast"])
def test_what_an_abandoned_forward_left_is_not_believed_after_a_change(change):
    model, x = converted(dynamic_img_size=True), image()
    last = model.blocks[2].norm1
    with torch.no_grad():
        abandoned(model, x)
        assert is_kept(model)
        if change == "table":
            model.lape_position[0].pos_embed.add_(1)
        elif change == "norm":
            model.blocks[1].norm1.pe_norm.weight.mul_(2)
        elif change == "another norm":
            model.blocks[0].norm1.pe_norm.bias.add_(torch.randn(TINY["embed_dim"]))
        elif change == "replaced":
            model.blocks[0].norm1.pe_norm.weight = nn.Parameter(torch.randn(TINY["embed_dim"]))
    grid = (8, 2) if change == "grid" else None
    with torch.set_grad_enabled(change == "grad"), torch.autocast("cpu", enabled=change == "autocast"):
        got, wanted = last.position(grid), without_handover(model).blocks[2].norm1.position(grid)
    assert torch.equal(got, wanted)
    assert got.requires_grad == (change == "grad")
    assert not is_kept(model)


@NEEDS_HAND_OVER
def test_what_nothing_has_changed_is_used_once():
    model, x = converted(), image()
    with torch.no_grad():
        abandoned(model, x)
        calls = Calls(model)
        assert calls.of(lambda: model.blocks[2].norm1.position()) == 1
        assert calls.of(lambda: model.blocks[2].norm1.position()) == 3


def test_a_graph_that_gave_its_gradient_is_not_handed_over():
    model, x = converted(), image()
    seen = []
    handle = model.blocks[1].norm1.register_forward_hook(lambda _m, _x, y: seen.append(y))
    abandoned(model, x, layer=1)
    handle.remove()
    seen[0].sum().backward()
    model.blocks[2].norm1.position().sum().backward()  # would raise: backward through the graph a second time


def test_two_forwards_before_one_backward():
    model, x, y = converted(), image(), image()
    model.zero_grad()
    (model(x).square().sum() + model(y).square().sum()).backward()
    both = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    one, other = gradients(model, x), gradients(model, y)
    for name, value in both.items():
        torch.testing.assert_close(value, one[name] + other[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_each_block_has_the_same_gradients(reentrant):
    model, x = converted(), image().requires_grad_()
    wanted = gradients(model, x)
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda t, f=forward: checkpoint(f, t, use_reentrant=reentrant)
    for name, value in gradients(model, x).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_threads_with_models_sizes_and_modes_of_their_own():
    model = converted(dynamic_img_size=True)
    sizes = [(16, 16), (24, 16), (16, 32)]
    images = [torch.randn(1, 3, *size) for size in sizes]
    wanted = [without_handover(copy.deepcopy(model))(x).detach() for x in images]
    wrong: list[str] = []

    def work(i: int) -> None:
        for step in range(10):
            with torch.set_grad_enabled(step % 2 == 0):
                if not torch.equal(model(images[i]), wanted[i]):
                    wrong.append(f"thread {i}, step {step}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@NEEDS_HAND_OVER
def test_copies_and_pickles_hold_nothing_that_was_left():
    model, x = converted(), image()
    abandoned(model, x)
    assert is_kept(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not is_kept(other)
        assert other.blocks[1].norm1.successor.norm is other.blocks[1].norm1
        assert other.blocks[2].norm1._source[0] is other.blocks[1].norm1.successor
        assert torch.equal(other(x), model(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_functional_call_and_vmap_over_parameters():
    model, x = converted(), image()
    abandoned(model, x)
    states = [{n: p.detach() + 0.1 * i for n, p in model.named_parameters()} for i in range(2)]
    singles = torch.stack([torch.func.functional_call(model, state, (x,)) for state in states])
    for state, single in zip(states, singles, strict=True):
        other = copy.deepcopy(model)
        other.load_state_dict(state, strict=False)
        torch.testing.assert_close(other(x), single)
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    together = torch.func.vmap(lambda state: torch.func.functional_call(model, state, (x,)))(stacked)
    torch.testing.assert_close(together, singles, rtol=1e-4, atol=1e-4)
    by_func = torch.func.grad(lambda s: torch.func.functional_call(model, s, (x,)).square().sum())(
        dict(model.named_parameters())
    )
    for name, value in gradients(model, x).items():
        torch.testing.assert_close(by_func[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_compiled_after_an_abandoned_forward():
    model, x = converted(), image()
    with torch.no_grad():
        abandoned(model, x)
        model.lape_position[0].pos_embed.mul_(3)
        wanted = without_handover(model)(x)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), wanted)


def test_parameters_without_a_version_are_never_believed():
    with torch.inference_mode():
        model, x = converted(), image()
        plain = without_handover(model)
        assert torch.equal(model(x), plain(x))
        assert Calls(model).of(lambda: model(x)) == LAYERS * (LAYERS + 1) // 2


def test_norms_that_share_a_table_hand_nothing_over():
    model = converted(join="LaPE-sharing")
    assert all(m.successor is None for m in model.modules() if isinstance(m, PositionalNorm))
    assert Calls(model).of(lambda: model(image())) == LAYERS
