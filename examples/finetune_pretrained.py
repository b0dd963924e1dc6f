"""Fine-tuning pretrained weights that lie on this machine: unconverted, LaPE with a warm start, LaPE cold.

    python examples/finetune_pretrained.py FOLDER --data-path IMAGES   # DINOv2, DINOv3 as transformers saves them
    python examples/finetune_pretrained.py deit_tiny.pth --model deit_tiny_patch16_224 --data-path IMAGES   # of timm

IMAGES has train/<class>/* and val/<class>/*; without it the packaged digits are the data. A new linear head is trained
first, then all of the model with a tenth of the learning rate, the same images in the same order for each way. An
encoder that has no table (DINOv3) cannot start warm: LaPE then joins a new table beside its rotation, and `basic` adds
such a table to its tokens, the control. Prints and writes the accuracy on images that were not trained on. Nothing is
downloaded. Needs pip install 'lape[train]', and 'lape[huggingface]' for a folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lape
from lape.data.sets import digits
from lape.errors import LapeError
from lape.study.numbers import mean_std
from lape.train.machine import environment

WITH_TABLE: dict[str, dict[str, Any] | None] = {
    "unconverted": None,
    "LaPE, warm start": {"join": "LaPE", "warm_start": True},
    "LaPE, cold": {"join": "LaPE"},
}
WITHOUT: dict[str, dict[str, Any] | None] = {
    "unconverted": None,
    "basic, new table": {"join": "basic", "pe": "learnable"},
    "LaPE, new table": {"join": "LaPE", "pe": "learnable"},
}


class Classifier(nn.Module):
    """An encoder of transformers with a linear head on its class token and the mean of its patches."""

    def __init__(self, encoder: nn.Module, prefix_tokens: int, classes: int):
        super().__init__()
        self.encoder, self.prefix_tokens = encoder, prefix_tokens
        config: Any = encoder.config
        self.head = nn.Linear(2 * config.hidden_size, classes)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        tokens_BND = self.encoder(pixel_values=pixels_B3HW).last_hidden_state
        seen = torch.cat([tokens_BND[:, 0], tokens_BND[:, self.prefix_tokens :].mean(1)], dim=1)
        logits: Tensor = self.head(seen)
        return logits


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    given = parse(arguments)
    train_set, val_set, classes = data(given)
    has_table = True
    try:
        lape.apply_(load(given, classes), "LaPE")
    except lape.UnsupportedModelError:
        raise
    except LapeError:  # no table of its own
        has_table = False
    ways = WITH_TABLE if has_table else WITHOUT
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for seed in range(given.seeds):
        for way, how in ways.items():
            torch.manual_seed(seed)
            model = load(given, classes)
            if how is not None:
                lape.apply_(model, **how)
            results[way].append(finetune(model, train_set, val_set, given, seed))
            run = results[way][-1]
            print(f"seed {seed}, {way}: head {run['head']:.1f} %, all {run['all']:.1f} %", flush=True)
    found = {
        "config": {name: str(v) if isinstance(v, Path) else v for name, v in vars(given).items() if name != "output"},
        "ways": {way: {"all": mean_std([r["all"] for r in runs]), "runs": runs} for way, runs in results.items()},
        **environment(),
    }
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {given.output}")
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "weights", type=Path, help="a folder of transformers, or a .pth or .safetensors of timm's --model"
    )
    parser.add_argument("--model", help="timm's name of the model that a file is of")
    parser.add_argument("--size", type=int, default=224, help="side of the images, pixels")
    parser.add_argument("--data-path", type=Path, help="train/<class>/* and val/<class>/*")
    parser.add_argument("--head-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10, help="of the whole model, behind those of the head")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the head; the whole model has a tenth")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("finetune_pretrained.json"))
    return parser.parse_args(arguments)


def load(given: argparse.Namespace, classes: int) -> nn.Module:
    """The pretrained model with a new head, unconverted."""
    if not given.weights.exists():
        raise LapeError(f"there is no {given.weights}: name weights on this machine")
    if given.weights.is_dir():
        import transformers

        encoder = transformers.AutoModel.from_pretrained(given.weights, local_files_only=True)
        prefix = 1 + (getattr(encoder.config, "num_register_tokens", 0) or 0)
        return Classifier(encoder, prefix, classes)
    if given.model is None:
        raise LapeError(f"{given.weights} is a file: name timm's model of it, --model")
    import timm

    overlay = {"file": str(given.weights)}
    sizes = {"img_size": given.size, "num_classes": classes}
    model: nn.Module = timm.create_model(given.model, pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
    return model


def data(given: argparse.Namespace) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Images for training, those for validation, and the number of classes."""
    if given.data_path is None:
        sets = []
        for split in ("train", "val"):
            pixels, labels = digits(split)
            images = torch.from_numpy(pixels[:, None] / 127.5 - 1).float().expand(-1, 3, -1, -1)
            images = F.interpolate(images, size=(given.size, given.size), mode="bilinear")
            sets.append(TensorDataset(images, torch.as_tensor(labels)))
        return sets[0], sets[1], 10
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    squared = [transforms.Resize(given.size), transforms.CenterCrop(given.size), transforms.ToTensor()]
    prepare = transforms.Compose([*squared, transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    train_set, val_set = (ImageFolder(str(given.data_path / split), prepare) for split in ("train", "val"))
    if train_set.classes != val_set.classes:
        raise LapeError(f"{given.data_path}: train and val have different classes")
    return train_set, val_set, len(train_set.classes)


def finetune(
    model: nn.Module, train_set: Dataset[Any], val_set: Dataset[Any], given: argparse.Namespace, seed: int
) -> dict[str, float]:
    """Accuracy in percent when the head is trained, and when all is."""
    head = list(model.get_submodule("head").parameters())
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    found = {}
    for name, parameters, epochs, lr in (
        ("head", head, given.head_epochs, given.lr),
        ("all", list(model.parameters()), given.epochs, given.lr / 10),
    ):
        trained = {id(parameter) for parameter in parameters} - {id(parameter) for parameter in frozen}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        order = torch.Generator().manual_seed(seed)
        loader = DataLoader(train_set, given.batch_size, shuffle=True, generator=order)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.05)
        for _ in range(epochs):
            model.train()
            for images, labels in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
        found[name] = accuracy(model, DataLoader(val_set, given.batch_size))
    return found


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[Any]) -> float:
    """Percent of the images whose class is the most likely one."""
    model.eval()
    right = torch.cat([model(images).argmax(1) == labels for images, labels in loader])
    return 100 * right.float().mean().item()


if __name__ == "__main__":
    main()
