"""ViT-MAE, which shuffles and drops the patches of each image: every token keeps the position of its own place."""

import copy
import pickle
from functools import partial
from unittest import mock

import pytest
import torch
from formula import MEANINGFUL, TOLERANCE, assert_same_structure, capture, of_position, plain, received, shake_position
from zoo import SMALL

import lape
from lape.core.joins import JOINS
from lape.core.position import KINDS
from lape.look.probe import attention_distance

transformers = pytest.importorskip("transformers")
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
NEW = transformers.__version__ >= "5"
CASES = [(join, pe) for join, pe in MEANINGFUL if NEW or not KINDS[pe].is_bias]


def make(mask_ratio: float = 0.7, seed: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.ViTMAEConfig(**SMALL, **DECODER, mask_ratio=mask_ratio)
    model = transformers.ViTMAEForPreTraining(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def logits(model: torch.nn.Module, x: torch.Tensor, noise: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(x, noise=noise, **kwargs).logits


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images and their noise: each image is shuffled in its own way."""
    return torch.randn(2, 3, 16, 16), torch.rand(2, 16)


def places(noise: torch.Tensor, mask_ratio: float) -> torch.Tensor:
    """(B, K) rows of the table: the class token's, then the patches with the least noise."""
    keep = int(16 * (1 - mask_ratio))
    return torch.nn.functional.pad(noise.argsort(1)[:, :keep] + 1, (1, 0))


@pytest.mark.matrix
@pytest.mark.parametrize("mask_ratio", [0.7, 0.0])
@pytest.mark.parametrize(("join", "pe"), CASES)
def test_five_equalities(join, pe, mask_ratio, images, tmp_path):
    x, noise = images
    model, original = make(mask_ratio), make(mask_ratio)
    with torch.no_grad():
        before = logits(original, x, noise)
        lape.apply_(model, join, pe)
        shake_position(model)
        expected = logits(model, x, noise)
        check_layers(copy.deepcopy(model), x, noise, join, pe, mask_ratio)
        loaded = lape.load(lape.save(model, tmp_path / "model"))
        folded = lape.fold_(copy.deepcopy(model))
        folded_loaded = lape.load(lape.save(folded, tmp_path / "folded"))
        for other in (loaded, folded, folded_loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert (logits(other, x, noise) - expected).abs().max() <= TOLERANCE * expected.abs().max()
        lape.remove_(model)
        assert_same_structure(model, original)
        model.load_state_dict(original.state_dict())
        assert torch.equal(logits(model, x, noise), before)


def check_layers(model, x, noise, join, pe, mask_ratio) -> None:
    """What each block and each attention is given, with the rows of each image gathered by hand."""
    anatomy, site = lape.convert.converted.conversion_of(model).anatomy, JOINS[join].site
    rows, entered, attended, norms = places(noise, mask_ratio), [], [], []
    for path in anatomy.blocks:
        block = anatomy.root.get_submodule(path)
        capture(block, entered)
        capture(block.attention, attended)
        norms.append(partial(plain, block.layernorm_before))
    attend = torch.nn.functional.scaled_dot_product_attention
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", side_effect=attend) as attending:
        logits(model, x, noise)
    masks = [call.kwargs["attn_mask"] for call in attending.call_args_list]  # of the encoder, then of the decoder
    p = received(model, join, pe) if KINDS[pe].is_table else [torch.zeros(1, 17, 32)] * 2
    for layer, (h, seen, norm) in enumerate(zip(entered, attended, norms, strict=True)):
        own = p[layer][0][rows]
        expected = {"input": norm(h), "block": norm(h + own), "norm": norm(h) + own}[site]
        expected = norm(h) if KINDS[pe].is_bias else expected
        assert (seen - expected).abs().max() <= 1e-5 * expected.abs().max()
        if KINDS[pe].is_bias:
            bias = lape.position_bias(model)[layer]
            for image, row in enumerate(rows[:, 1:] - 1):
                assert torch.equal(masks[layer][image][:, 1:, 1:], bias[:, row][:, :, row])
                assert not masks[layer][image][:, 0].any()


def test_the_order_of_the_patches_does_not_matter_without_dropping(images):
    """All patches kept, in two orders: the decoder puts them back, so the result is the same."""
    x, noise = images
    for pe in (None, "learnable", *(["2D_RPE"] if NEW else [])):
        model = lape.apply_(make(0.0), "LaPE", pe)
        shake_position(model)
        y = logits(model, x, noise)
        assert (logits(model, x, 1 - noise) - y).abs().max() <= 1e-5 * y.abs().max()


def test_the_own_table_is_a_frozen_sine_and_the_decoders_stays():
    model = lape.apply_(make())
    done = lape.describe(model)
    assert (done.pe, done.joined, done.input_addition) == ("2D_sin", 2, False)
    assert not model.vit.embeddings.position_embeddings.requires_grad
    assert torch.equal(model.decoder.decoder_pos_embed, make().decoder.decoder_pos_embed)
    with pytest.raises(lape.LapeError, match="repeat one frozen table in every block"):
        lape.apply_(make(), "unshare")
    thawed = make()
    thawed.vit.embeddings.position_embeddings.requires_grad_(True)
    assert lape.describe(lape.apply_(thawed)).pe == "learnable"


@pytest.mark.parametrize(("join", "pe"), [("LaPE", "learnable"), ("unshare", "learnable"), ("LaPE", "2D_RPE")])
def test_every_new_parameter_gets_a_gradient(join, pe, images):
    if KINDS[pe].is_bias and not NEW:
        pytest.skip("transformers 4 takes no bias per head")
    model = lape.apply_(make().train(), join, pe)
    logits(model, *images).square().sum().backward()
    new = of_position(model).values()
    assert len(new) == {"learnable": {"LaPE": 5, "unshare": 2}[join], "2D_RPE": 6}[pe]
    assert all(p.grad is not None and p.grad.any() for p in new)


def test_other_sizes_and_a_warm_start(images):
    x, noise = images
    assert torch.equal(logits(lape.apply_(make(), warm_start=True), x, noise), logits(make(), x, noise))
    model = lape.apply_(make())
    wide = torch.randn(1, 3, 32, 32)
    seen: list[torch.Tensor] = []
    norm = model.vit.get_submodule(lape.convert.converted.conversion_of(model).anatomy.blocks[1]).layernorm_before
    norm.register_forward_hook(lambda _, args, output: seen.append(output - plain(norm, args[0])))
    noise = torch.rand(1, 64)
    model(wide, noise=noise, interpolate_pos_encoding=True)
    rows = torch.nn.functional.pad(noise.argsort(1)[:, : int(64 * 0.3)] + 1, (1, 0))
    expected = lape.positions(model, 32)[1][rows]
    assert (seen[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def checkpointed(model):
    for path in lape.convert.converted.conversion_of(model).anatomy.blocks:
        block = model.vit.get_submodule(path)
        forward = block.forward
        block.forward = lambda h, *a, f=forward, **k: torch.utils.checkpoint.checkpoint(f, h, *a, use_reentrant=False)
    return model


def test_recomputed_activations_have_the_places_of_their_own_forward(images):
    x, noise = images
    whole, model = (shaken(lape.apply_(make(), "LaPE", "learnable")) for _ in range(2))
    logits(whole, x, noise).square().sum().backward()
    checkpointed(model)
    logits(model, x, 1 - noise)  # its graph is gone when the next one begins
    logits(model, x, noise).square().sum().backward()
    logits(model, x, noise).square().sum().backward()
    for (name, p), (_, q) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
        if p.grad is not None:
            assert (2 * p.grad - q.grad).abs().max() <= 1e-5 * q.grad.abs().max().clamp(min=1e-6), name
    for between in (torch.enable_grad, torch.no_grad):
        first = logits(model, x, noise)
        with between():
            second = logits(model, x, 1 - noise)
        with pytest.raises(lape.LapeError, match="cannot tell of which forward"):
            first.sum().backward()
        del first, second
    logits(model, x, noise).sum().backward()


def shaken(model):
    torch.manual_seed(2)
    shake_position(model)
    return model


@pytest.mark.slow
def test_compiled(images):
    x, noise = images
    model = lape.apply_(make())
    compiled = torch.compile(model.vit, backend="aot_eager")
    with torch.no_grad():
        expected = model.vit(x, noise=noise).last_hidden_state
        assert torch.allclose(compiled(x, noise=noise).last_hidden_state, expected, atol=1e-5)


def test_what_needs_every_patch_in_its_place_is_refused(images):
    with pytest.raises(lape.LapeError, match="no patch has neighbours"):
        lape.apply_(make(), "basic", "PEG")
    model = lape.apply_(make())
    with pytest.raises(lape.LapeError, match="shuffles the patches"):
        attention_distance(model, images[0])
    norm = model.vit.get_submodule(lape.convert.converted.conversion_of(model).anatomy.blocks[0]).layernorm_before
    with pytest.raises(lape.LapeError, match="call the model with images"):
        norm(torch.randn(2, 17, 32))
    assert lape.correlation(model).shape == (2, 16, 16)
