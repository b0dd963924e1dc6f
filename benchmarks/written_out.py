"""A ViT with LaPE written out from Eq. 8-11 of Yu et al. (ICCV 2023), step by step, as the original computes it.

The baseline of `original_style.py` and `on_gpu.py`: LN_l(x) and LN'_l(P_l) are separate norms, their sum is an addition
of its own, attention is matrix product, softmax, matrix product. Nothing of `lape` runs in it; it gets the weights of a
converted timm model by the names that they have in the authors' files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lape


class WrittenOutBlock(nn.Module):
    """x + MSA(LN(x) + P'), then + MLP(LN(x)); P' = LN'(P) goes to the next block."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.pe_norm, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def attend(self, x_BND: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits_BHNN = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        return self.proj((logits_BHNN.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, x_BND: Tensor, p_1ND: Tensor) -> tuple[Tensor, Tensor]:
        p_1ND = self.pe_norm(p_1ND)
        x_BND = x_BND + self.attend(self.norm1(x_BND) + p_1ND)
        hidden = nn.functional.gelu(self.fc1(self.norm2(x_BND)))
        return x_BND + self.fc2(hidden), p_1ND


class WrittenOut(nn.Module):
    """A ViT with a class token and LaPE; patches by a convolution, logits from the class token."""

    def __init__(self, weights: dict[str, Tensor], heads: int):
        super().__init__()
        patches, table, hidden = (
            weights[name].shape for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
        )
        width, channels, patch = patches[0], patches[1], tuple(patches[2:])
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(table))
        self.blocks = nn.ModuleList(WrittenOutBlock(width, heads, hidden[0]) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, len(weights["head.weight"]))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BND = self.patches(pixels_BCHW).flatten(2).transpose(1, 2)
        x_BND = torch.cat([self.cls_token.expand(len(x_BND), -1, -1), x_BND], dim=1)
        p_1ND = self.pos_embed
        for block in self.blocks:
            x_BND, p_1ND = block(x_BND, p_1ND)
        return self.head(self.norm(x_BND)[:, 0])


def written_out(model: nn.Module) -> WrittenOut:
    """The baseline with the weights of a converted model, on its device."""
    ours = {"patches": "patch_embed.proj", "qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    weights = dict(lape.to_reference_state_dict(model))
    baseline = WrittenOut(weights, model.blocks[0].attn.num_heads)

    def name_there(name: str) -> str:
        *above, module, kind = name.split(".") if "." in name else ("", name)
        return ".".join([*above, ours.get(module, module), kind]).lstrip(".")

    baseline.load_state_dict({name: weights.pop(name_there(name)) for name in baseline.state_dict()})
    assert not weights, f"the baseline has no place for {', '.join(weights)}"
    return baseline.to(next(model.parameters()).device)


def largest_difference(model: nn.Module, baseline: nn.Module, pixels_BCHW: Tensor) -> float:
    """Of the logits, relative to the largest of the baseline."""
    with torch.no_grad():
        expected, got = baseline.eval()(pixels_BCHW), model.eval()(pixels_BCHW)
    return ((got - expected).abs().max() / expected.abs().max()).item()
