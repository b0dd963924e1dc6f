"""A converted model stays the user's model: what people do to a Vision Transformer works on it as on the host.

Each test is a kind of use, over hosts of the three libraries and over joins where the join can matter.
"""

import copy
import io
import tempfile
import threading
from functools import partial

import pytest
import timm
import torch
from formula import TOLERANCE, assert_host_keys
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from zoo import TINY, image, make, make_foreign, output

import lape
from lape.convert.converted import conversion_of
from lape.core.forward import THREAD, check_hidden

pytestmark = [  # what torch, peft and the hosts say of themselves
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:For backward hooks to be called, module output.*ModelOutput"),
]
JOINS = [("LaPE", None), ("share", None), ("unshare", None), ("LaPE", "2D_RPE"), ("basic", "PEG"), ("LaPE", "2D_sin")]
LIBRARIES = {
    "timm": make,
    "transformers": partial(make_foreign, "ViT"),
    "torchvision": partial(make_foreign, "torchvision"),
}


def converted(library: str = "timm", join: str = "LaPE", pe: str | None = None, **kwargs) -> nn.Module:
    """Every parameter away from its start, so that position matters."""
    model = lape.apply_(LIBRARIES[library](**kwargs), join, pe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return model.eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


every_library = pytest.mark.parametrize("library", LIBRARIES)
every_join = pytest.mark.parametrize(("join", "pe"), JOINS)


# ------------------------------------------------------------------------------------------- keys, classes, attributes


@pytest.mark.matrix
@every_library
@every_join
def test_classes_names_and_order_are_the_hosts(library, join, pe):
    model, host = converted(library, join, pe), LIBRARIES[library]()
    assert_host_keys(model, host, parameters=pe in (None, "2D_sin"))
    theirs = dict(host.named_modules())
    ours = {path: module for path, module in model.named_modules() if path != "lape" and not path.startswith("lape.")}
    assert list(ours) == list(theirs)
    for path, module in ours.items():
        assert isinstance(module, type(theirs[path]))
        assert type(module).__name__ == type(theirs[path]).__name__


@every_join
def test_what_is_written_acts(join, pe, x):
    """Attributes and modules that are put in: LoRA by hand, another MLP, no fused attention, another eps."""

    class Changed(nn.Module):
        def __init__(self, inner: nn.Module, width: int):
            super().__init__()
            self.inner, self.more = inner, nn.Linear(32, width)

        def forward(self, t):
            return self.inner(t) + 5 * self.more(t)

    for where, width in (("attn.qkv", 96), ("mlp", 32)):
        model = converted("timm", join, pe)
        before = model(x)
        for block in model.blocks:
            block.set_submodule(where, Changed(block.get_submodule(where), width))
        after = model(x)
        assert far(before, after) > 1e-3
        after.square().sum().backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if ".more." in n)
    model, maps = converted("timm", join, pe), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _m, _a, weights: maps.append(weights))
    model(x)
    assert len(maps) == 3
    before = model(x)
    model.blocks[0].norm1.eps = 0.5
    assert far(before, model(x)) > 0


def test_a_patch_embedding_that_pads_and_another_number_of_channels():
    model = converted(dynamic_img_size=True)
    model.patch_embed.dynamic_img_pad = True
    model.patch_embed.proj = nn.Conv2d(4, 32, 4, 4)
    assert model(torch.randn(1, 4, 18, 18)).isfinite().all()


# ------------------------------------------------------------------------------------------------------- hooks


@every_library
@every_join
def test_hooks_of_all_kinds(library, join, pe, x):
    model = converted(library, join, pe).train()
    calls = []
    for module in model.modules():
        module.register_full_backward_hook(lambda *_: calls.append("backward"))
        module.register_full_backward_pre_hook(lambda *_: calls.append("before"))
    output(model, x).square().sum().backward()
    assert {"backward", "before"} == set(calls)
    if join == "LaPE":
        folded = lape.fold_(converted(library, join, pe))
        for module in folded.modules():
            module.register_full_backward_hook(lambda *_: None)
        output(folded, x.clone().requires_grad_()).square().sum().backward()


@pytest.mark.parametrize("fold", [False, True])
def test_nobodys_tensor_is_changed_after_it_was_handed_out(fold, x):
    """Global hooks, hooks on every module and a replaced forward keep outputs; they must stay as they were."""
    model = converted()
    model = lape.fold_(model) if fold else model
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_module, _args, result):
        kept.extend((t, t.clone()) for t in (result if isinstance(result, tuple | list) else [result]))

    handle = register_module_forward_hook(keep)
    handles = [module.register_forward_hook(keep) for module in model.modules()]
    norm = model.blocks[1].norm1
    forward = norm.forward

    def replaced(t):
        keep(norm, (), y := forward(t))
        return y

    norm.forward = replaced
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
        for one in handles:
            one.remove()
    assert len(kept) > 50
    assert all(torch.equal(now, then) for now, then in kept)


# ----------------------------------------------------------------------------------------------- threads and grids


def test_two_threads_with_images_of_two_grids_of_one_count():
    model = converted(dynamic_img_size=True)
    images = {"wide": torch.randn(1, 3, 8, 32), "square": torch.randn(1, 3, 16, 16)}
    with torch.no_grad():
        alone = {name: model(x) for name, x in images.items()}
    reached, go, results = threading.Event(), threading.Event(), {}

    def hold(_module, _args, _output):  # the wide one waits behind its patch embedding
        if threading.current_thread().name == "wide":
            reached.set()
            go.wait(60)

    model.patch_embed.register_forward_hook(hold)

    def run(name):
        if name == "square":
            reached.wait(60)
        with torch.no_grad():
            results[name] = model(images[name])
        go.set()

    threads = [threading.Thread(target=run, args=(name,), name=name) for name in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[name], alone[name]) for name in images)


def test_blocks_by_hand_are_the_forward(x):
    model = converted("timm", "LaPE")
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    for block in model.blocks:
        tokens = block(tokens)
    assert far(model.forward_head(model.norm(tokens)), model(x)) == 0
    with pytest.raises(lape.LapeError, match="9 tokens arrived, the position is for 17"):
        model.blocks[0](torch.randn(2, 9, 32))


# --------------------------------------------------------------------------- initialisation, meta device, assignment


@every_library
@every_join
def test_meta_device_and_loading(library, join, pe, x):
    model = converted(library, join, pe)
    expected = output(model, x)
    for assign in (False, True):
        with torch.device("meta"):
            empty = lape.apply_(LIBRARIES[library](), join, pe)
        if not assign:
            empty = empty.to_empty(device="cpu")
            for tensor in (*empty.parameters(), *empty.buffers()):
                tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)
        extra = {name: b for name, b in model.named_buffers() if name not in model.state_dict()}  # the host's own
        empty.load_state_dict(model.state_dict(), assign=assign)
        for name, buffer in extra.items():
            owner, _, last = name.rpartition(".")
            setattr(empty.get_submodule(owner), last, buffer)
        assert far(output(empty.eval(), x), expected) == 0


@pytest.mark.parametrize("join", ["LaPE", "share", "basic"])
def test_drawing_weights_anew_draws_the_table_and_nothing_invisible(join, tmp_path):
    model = converted("timm", join)
    with torch.no_grad():
        model.pos_embed.zero_()
    model.init_weights("")
    assert 0.01 < model.pos_embed.std() < 0.03
    x = image(model)
    assert far(lape.load(lape.save(model, tmp_path / "m"))(x), model(x)) == 0
    foreign = lape.apply_(make_foreign("ViT"), join)
    with torch.no_grad():
        foreign.embeddings.position_embeddings.zero_()
    foreign.apply(foreign._init_weights)
    assert foreign.embeddings.position_embeddings.std() > 0.01


def test_a_host_file_loads_and_misses_only_what_is_new():
    model, host = converted(), make()
    missing, unexpected = model.load_state_dict(host.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(key.startswith("lape.") for key in missing)
    assert torch.equal(model.pos_embed, host.pos_embed)


# --------------------------------------------------------------------------- adapters, averages, quantisers, offloading


@every_join
def test_adapters_of_peft(join, pe, x):
    peft = pytest.importorskip("peft")
    model = converted("timm", join, pe)
    expected = model(x)
    config = peft.LoraConfig(target_modules=["qkv", "fc1"], modules_to_save=["head", "lape"])
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    assert far(adapted(x), expected) <= TOLERANCE * expected.abs().max()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():  # the copies of what is new learn, not the first ones
            if "modules_to_save" in name and ".lape." in name:
                parameter.add_(1.0)
    trained = adapted.eval()(x)
    if any(p.numel() for p in model.lape.parameters()):
        assert far(trained, expected) > 1e-3
    merged = adapted.merge_and_unload()
    assert far(merged(x), trained) <= 1e-5 * trained.abs().max()
    assert lape.describe(merged).joined == lape.describe(model).joined


def test_norm_tuning_of_peft_trains_the_norms_and_copies_no_model(x):
    peft = pytest.importorskip("peft")
    model = converted()
    expected, size = model(x), sum(p.numel() for p in model.parameters())
    tuned = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["norm1"]))
    assert far(tuned(x), expected) == 0
    assert sum(p.numel() for p in tuned.parameters()) == size + 3 * 64
    assert far(tuned.merge_and_unload()(x), expected) == 0


@every_join
def test_averages_quantisers_and_offloading(join, pe, x):
    from timm.utils import ModelEmaV3

    model, host = converted("timm", join, pe), make()
    expected = model(x)
    assert far(torch.optim.swa_utils.AveragedModel(model)(x), expected) == 0
    assert far(ModelEmaV3(model).module(x), expected) == 0
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert far(quantised(x), expected) <= 0.3 * expected.abs().max()
    kinds = [(type(m).__name__, ".quantized." in type(m).__module__) for m in quantised.modules()]
    assert kinds.count(("Linear", True)) == sum(isinstance(m, nn.Linear) for m in host.modules())
    accelerate = pytest.importorskip("accelerate")
    for library in ("timm", "transformers"):
        away = converted(library, join, pe)
        here = output(away, x)
        accelerate.cpu_offload(away, execution_device="cpu")
        assert far(output(away, x), here) == 0


def test_a_forward_that_was_replaced_before_is_refused():
    model = make()
    model.blocks[1].norm1.forward = model.blocks[1].norm1.forward
    state, classes = model.state_dict(), [type(m) for m in model.modules()]
    with pytest.raises(lape.UnsupportedModelError, match=r"blocks\.1\.norm1\.forward was replaced .*before that"):
        lape.apply_(model)
    assert list(model.state_dict()) == list(state)
    assert [type(m) for m in model.modules()] == classes
    accelerate = pytest.importorskip("accelerate")
    for join in ("share", "LaPE"):
        offloaded = make_foreign("ViT")
        accelerate.cpu_offload(offloaded, execution_device="cpu")
        with pytest.raises(lape.UnsupportedModelError, match="forward was replaced"):
            lape.apply_(offloaded, join)


# ------------------------------------------------------------------------------------------------- graphs


@pytest.mark.matrix
@every_join
def test_graphs_of_torch(join, pe, x):
    from torchvision.models.feature_extraction import create_feature_extractor

    model = converted("timm", join, pe)
    expected, seen = model(x), []
    traced = torch.jit.trace(model, x)
    assert far(traced(x), expected) <= TOLERANCE * expected.abs().max()
    assert far(torch.export.export(model, (x,), strict=False).module()(x), expected) <= TOLERANCE * expected.abs().max()
    extractor = create_feature_extractor(copy.deepcopy(model), ["blocks.2"])
    model.blocks[2].register_forward_hook(lambda _m, _a, y: seen.append(y))
    model(x)
    assert far(extractor(x)["blocks.2"], seen[0]) <= TOLERANCE * seen[0].abs().max()

    def positions_of(module: nn.Module) -> int:
        return sum(p.numel() for n, p in module.named_parameters() if "lape" in n or "pos_embed" in n)

    assert positions_of(extractor) == positions_of(model)  # they train, move and are saved with it


def test_a_tracer_that_looks_past_the_hidden_table_is_refused():
    """As torch 2.6's strict export does, which would add the table to the tokens as well."""
    model = converted("timm", "LaPE", None)
    with pytest.raises(lape.LapeError, match="pass strict=False"):
        check_hidden(model._lape)  # nobody adds: the table reads as itself
    THREAD.adding_depth += 1
    try:
        check_hidden(model._lape)
    finally:
        THREAD.adding_depth -= 1


@pytest.mark.parametrize(
    ("library", "node"), [("timm", "blocks.1"), ("torchvision", "encoder.layers.encoder_layer_1.add_1")]
)
@pytest.mark.parametrize("fold", [False, True])
def test_feature_extraction_by_torch_fx(library, node, fold, x):
    from torchvision.models.feature_extraction import create_feature_extractor

    model = converted(library)
    model = lape.fold_(model) if fold else model
    assert create_feature_extractor(model, [node])(x)[node].shape == (2, 17, 32)


@pytest.mark.slow
@pytest.mark.parametrize("join", ["LaPE", "share", "basic"])
def test_export_with_dynamic_height_and_width(join):
    from torch.export import Dim, export

    model = converted("timm", join, dynamic_img_size=True)
    sizes = {0: Dim("batch", min=1, max=64), 2: 4 * Dim("h", min=2, max=16), 3: 4 * Dim("w", min=2, max=16)}
    graph = export(model, (torch.randn(2, 3, 20, 28),), dynamic_shapes=(sizes,)).module()
    for size in ((2, 3, 20, 28), (3, 3, 12, 32), (1, 3, 16, 16)):
        x = torch.randn(*size)
        assert far(graph(x), model(x)) <= 1e-5 * model(x).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("join", "pe"), [("LaPE", None), ("LaPE", "2D_RPE"), ("basic", "PEG")])
def test_blocks_compiled_one_by_one(join, pe, x):
    torch._dynamo.reset()
    model = converted("timm", join, pe)
    expected = model(x)
    for i in range(3):
        model.blocks[i] = torch.compile(model.blocks[i], backend="aot_eager", fullgraph=True)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert far(model(x), expected) <= TOLERANCE * expected.abs().max()


@every_join
def test_gradients_of_each_sample(join, pe, x):
    from torch.func import functional_call, grad, vmap

    model = converted("timm", join, pe)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(values, one):
        return functional_call(model, values, (one[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    model(x[1:]).square().sum().backward()
    for name, parameter in parameters.items():
        assert far(each[name][1], parameter.grad) <= 1e-4 * parameter.grad.abs().max().clamp(min=1e-3), name


# ---------------------------------------------------------------------------------- several devices, several models


@every_join
def test_a_replica_of_data_parallel_uses_its_own_parameters(join, pe, x):
    """As torch.nn.parallel.replicate makes them: parameters as plain attributes, children linked anew."""
    model, other = converted("timm", join, pe), converted("timm", join, pe)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    theirs = dict(other.named_modules())
    replicas = {path: module._replicate_for_data_parallel() for path, module in model.named_modules()}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name in module._modules:
            setattr(replicas[path], name, replicas[prefix + name])
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                setattr(replicas[path], name, getattr(theirs[path], name).detach())
    assert far(replicas[""](x), other(x)) <= TOLERANCE * other(x).abs().max()


def test_a_wrapped_model_is_refused():
    with pytest.raises(lape.UnsupportedModelError, match=r"is in DataParallel already.*then wrap"):
        lape.apply_(nn.DataParallel(make()))


def test_several_converted_models_in_one_are_told_apart():
    both = nn.ModuleDict({"student": lape.apply_(make()), "teacher": lape.apply_(make(), "share")})
    for call in (lape.fold_, lape.remove_, lape.describe, lape.positions, lape.to_reference_state_dict):
        with pytest.raises(lape.LapeError, match=r"holds 2 converted models: pass one of student, teacher"):
            call(both)
    assert lape.describe(both["teacher"]).join == "share"
    with pytest.raises(lape.UnsupportedModelError, match="holds 2 convertible models"):
        lape.apply_(nn.ModuleList([make(), make()]))


# ------------------------------------------------------------------------------------- pruning, slicing, replacing


@every_join
def test_pruned_sliced_and_replaced_blocks(join, pe, x):
    model = converted("timm", join, pe)
    pruned, sliced, replaced = (copy.deepcopy(model) for _ in range(3))
    pruned.prune_intermediate_layers([1])
    sliced.blocks = sliced.blocks[1:]
    replaced.blocks[1] = make().blocks[1]
    joined = {"pruned": 2, "sliced": 2, "replaced": 2} if pe != "PEG" else {"pruned": 1, "sliced": 0, "replaced": 1}
    for name, changed in {"pruned": pruned, "sliced": sliced, "replaced": replaced}.items():
        expected = changed(x)
        done = lape.describe(changed)
        assert (done.joined, done.blocks) == (joined[name], 3 if name == "replaced" else 2), name
        if pe in (None, "2D_sin"):
            received = lape.positions(changed)
            assert len(received) == done.blocks
            theirs = lape.positions(model)
            wanted = {
                "pruned": theirs[:2],
                "sliced": theirs[1:],
                "replaced": theirs * torch.tensor([1.0, 0, 1])[:, None, None],
            }
            assert torch.equal(received, wanted[name]), name
        if pe != "PEG":
            assert far(lape.fold_(copy.deepcopy(changed))(x), expected) <= TOLERANCE * expected.abs().max(), name
        lape.remove_(changed)
        assert not [key for key in changed.state_dict() if "lape" in key]


# ------------------------------------------------------------------------------------------------ saving


def resized(model, **kwargs):
    model.set_input_size(**kwargs)
    return model


def another_head(model, *args):
    model.reset_classifier(*args)
    return model


def compiled_blocks(model):
    for i in range(len(model.blocks)):
        model.blocks[i] = torch.compile(model.blocks[i], backend="eager")
    return model


CHANGES = {
    "other pooling": (lambda m: another_head(m, 5, "avg"), (16, 16)),
    "equal count, other grid": (lambda m: resized(m, img_size=(8, 32)), (8, 32)),
    "other size": (lambda m: resized(m, img_size=(16, 32)), (16, 32)),
    "other patch": (lambda m: resized(m, img_size=(16, 16), patch_size=2), (16, 16)),
    "other classes": (lambda m: another_head(m, 7), (16, 16)),
    "compiled": (lambda m: torch.compile(m, backend="eager"), (16, 16)),
    "compiled blocks": (compiled_blocks, (16, 16)),
    "DataParallel": (nn.DataParallel, (16, 16)),
}


@pytest.mark.slow
@pytest.mark.parametrize("made_by", ["lape", "timm"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_is_saved_as_it_is(change, made_by, tmp_path):
    act, size = CHANGES[change]
    if made_by == "lape":
        model = lape.create_model("vit_tiny_patch16_224", **TINY).eval()
    else:
        model = lape.apply_(timm.create_model("vit_tiny_patch16_224", **TINY)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    model, x = act(model), torch.randn(2, 3, *size)
    loaded = lape.load(lape.save(model, tmp_path / "m"))
    with torch.no_grad():
        assert far(loaded(x), model(x)) == 0
    if change not in ("compiled", "DataParallel"):
        assert lape.describe(loaded).grid == lape.describe(model).grid


def test_an_argument_that_another_one_decides_is_given(tmp_path):
    """timm norms pooled features where it averages: with the token again, that norm has to be asked for."""
    model = another_head(lape.create_model("vit_tiny_patch16_224", **TINY, global_pool="avg").eval(), 5, "token")
    loaded, x = lape.load(lape.save(model, tmp_path / "m")), torch.randn(2, 3, 16, 16)
    assert isinstance(loaded.fc_norm, nn.LayerNorm)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: nn.Sequential(nn.Identity(), m), r"around a model cannot be built again: save the model in it, \.1"),
        (lambda m: setattr(m, "head", nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 5))) or m, "is another model: head"),
        (lambda m: setattr(m.blocks[1], "mlp", nn.Identity()) or m, r"is another model: blocks\.1\.mlp"),
        (lambda m: setattr(m.blocks[0].norm1, "eps", 0.1) or m, r"is another model: blocks\.0\.norm1\.eps"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(spoil, reason, tmp_path):
    model = spoil(lape.create_model("vit_tiny_patch16_224", **TINY))
    with pytest.raises(lape.LapeError, match=reason):
        lape.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_model_as_timm_makes_it_needs_no_name(tmp_path):
    model = lape.apply_(timm.create_model("vit_small_patch16_dinov3", img_size=32, depth=1), "LaPE", "learnable").eval()
    x = torch.randn(1, 3, 32, 32)
    assert far(lape.load(lape.save(model, tmp_path / "m"))(x), model(x)) == 0


def test_a_part_copied_or_pickled_alone_keeps_its_position(x):
    model = converted()
    tokens = torch.randn(2, 17, 32)
    expected = model.blocks[1](tokens)
    block = copy.deepcopy(model.blocks[1])
    assert conversion_of(model).link is block.norm1._lape  # no second model behind it
    assert far(block(tokens), expected) == 0
    with tempfile.TemporaryFile() as file:
        torch.save(model.blocks[1], file)
        file.seek(0)
        assert far(torch.load(file, weights_only=False)(tokens), expected) == 0
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert far(torch.load(buffer, weights_only=False)(x), model(x)) == 0


# ------------------------------------------------------------------------------------------------ what users found


def test_a_copy_that_meets_a_block_before_the_model_is_of_the_copied_model(x):
    class Watcher(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.blocks, self.model = model.blocks, model

        def forward(self, t):
            return self.model(t)

    first = Watcher(converted())
    twin = copy.deepcopy(first)
    expected = twin(x)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    assert far(twin(x), expected) == 0
    twin(x).square().sum().backward()
    assert twin.model.pos_embed.grad is not None
    assert all(p.grad is None for p in first.parameters())


class OwnAddition(timm.models.vision_transformer.VisionTransformer):
    """As papers' code has it: a subclass that adds the table by itself."""

    def forward_features(self, x, *args, **kwargs):
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@pytest.mark.parametrize("join", ["LaPE", "share"])
def test_a_subclass_that_adds_the_table_itself(join, x):
    model, plain = OwnAddition(**TINY).eval(), make()
    plain.load_state_dict(model.state_dict())
    assert far(model(x), plain(x)) <= 1e-6
    lape.apply_(model, join)
    lape.apply_(plain, join)
    assert far(model(x), plain(x)) <= 1e-6


@pytest.mark.parametrize("method", ["_pos_embed", "forward_features"])
def test_a_method_that_was_replaced_before_is_refused(method):
    model = make()
    setattr(model, method, getattr(model, method))
    with pytest.raises(lape.UnsupportedModelError, match=rf"{method} was replaced"):
        lape.apply_(model)


def test_a_method_of_the_class_that_is_replaced_later_is_called(x, monkeypatch):
    model, calls = converted(), []
    cls = timm.models.vision_transformer.VisionTransformer
    original = cls.forward_features
    monkeypatch.setattr(cls, "forward_features", lambda self, *a, **k: calls.append(1) or original(self, *a, **k))
    model(x)
    assert calls == [1]


def test_a_warm_start_needs_a_table():
    model = timm.create_model("vit_relpos_small_patch16_224", **{**TINY, "depth": 1})
    with pytest.raises(lape.LapeError, match="warm_start=True with join="):
        lape.apply_(model, "LaPE", warm_start=True)


@pytest.mark.parametrize(("join", "pe"), [("basic", "none"), ("LaPE", "2D_RPE"), ("LaPE", "2D_sin"), ("LaPE", None)])
@pytest.mark.parametrize("assign", [False, True])
def test_removing_after_the_meta_device_gives_the_host_or_refuses(join, pe, assign, x):
    state = converted("timm", join, pe).state_dict()
    with torch.device("meta"):
        model = lape.apply_(make(), join, pe)
    model = model if assign else model.to_empty(device="cpu")
    model.load_state_dict(state, assign=assign)
    if pe == "2D_sin":
        keys = list(model.state_dict())
        with pytest.raises(lape.LapeError, match="pos_embed never got values"):
            lape.remove_(model)
        assert list(model.state_dict()) == keys
    else:
        lape.remove_(model)
        assert list(model.state_dict()) == list(make().state_dict())
        assert isinstance(model.pos_embed, nn.Parameter)
    assert model(x).isfinite().all()


@pytest.mark.parametrize(("join", "pe"), [("LaPE", None), ("LaPE", "2D_RPE"), ("share", None)])
def test_selective_checkpointing(join, pe, x):
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    model = converted("timm", join, pe).train()
    model(x).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for saved in (
        [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
        [torch.ops.aten.native_layer_norm.default],
    ):
        twin = copy.deepcopy(model)
        twin.zero_grad()
        for block in twin.blocks:
            forward = block.forward
            contexts = partial(create_selective_checkpoint_contexts, saved)
            block.forward = lambda h, *a, f=forward, c=contexts, **k: checkpoint(
                f, h, *a, use_reentrant=False, context_fn=c, **k
            )
        twin(x).square().sum().backward()
        for name, parameter in twin.named_parameters():
            assert far(parameter.grad, expected[name]) <= 1e-5 * expected[name].abs().max().clamp(min=1e-4), name


@pytest.mark.parametrize(("join", "pe"), [("basic", "none"), ("basic", "PEG"), ("LaPE", "2D_RPE")])
def test_what_lies_idle_follows_the_dtype_of_the_living(join, pe, x):
    model = converted("timm", join, pe)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_pruned_and_parametrized_tables(x):
    from torch.nn.utils import parametrize, prune

    model = converted()
    prune.l1_unstructured(model, "pos_embed", 0.5)
    pruned = model(x)
    prune.remove(model, "pos_embed")
    assert far(model(x), pruned) == 0
    replaced = converted("timm", "LaPE", "learnable")
    prune.l1_unstructured(replaced, "pos_embed", 0.5)
    with pytest.raises(lape.LapeError, match="pos_embed became another kind of attribute"):
        lape.remove_(replaced)
    assert replaced(x).isfinite().all()
    parametrized = converted()
    parametrize.register_parametrization(parametrized, "pos_embed", nn.Identity())
    with pytest.raises(lape.LapeError, match="pos_embed is parametrized"):
        parametrized(x)


def test_positions_that_are_batched_alone(x):
    from torch.func import functional_call, vmap

    model = converted()
    tables = torch.randn(2, *model.pos_embed.shape)
    both = vmap(lambda table: functional_call(model, {"pos_embed": table}, (x,)))(tables)
    for table, got in zip(tables, both, strict=True):
        with torch.no_grad():
            model.pos_embed.copy_(table)
        assert far(got, model(x)) <= 1e-5


def test_shared_modules_are_refused():
    tied, shared = make(), make()
    tied.blocks[2] = tied.blocks[0]
    shared.blocks[1].norm1 = shared.blocks[0].norm1
    for model in (tied, shared):
        classes = [type(m) for m in model.modules()]
        with pytest.raises(lape.UnsupportedModelError, match="blocks share a module"):
            lape.apply_(model)
        assert [type(m) for m in model.modules()] == classes


def test_a_model_converted_in_inference_mode_trains(x):
    model = make().train()
    with torch.inference_mode():
        lape.apply_(model)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_forward_inside_a_hook_of_another(x):
    model = converted(dynamic_img_size=True)
    wide = torch.randn(1, 3, 8, 32)
    expected, other, seen = model(x), model(wide), []

    def look(_module, _args, _output):
        if not seen:
            seen.append(None)
            seen[0] = model(wide)

    model.blocks[0].register_forward_hook(look)
    assert far(model(x), expected) == 0
    assert far(seen[0], other) == 0
