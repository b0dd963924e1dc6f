"""Options: typed, frozen, and wrong ones refused in one line. Flags of the command line are made from their fields.

Neither torch nor timm is imported here, so that `lape --help` answers at once.
"""

from typing import Any

from lape.errors import LapeError, needs
from lape.names import nearest

with needs("train"):
    from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Options(BaseModel):
    """What a command or a call can be told.

    Raises:
        LapeError: an unknown name (the nearest is suggested) or a value that is not allowed, in one line.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            if "\0" in str(value):
                raise LapeError(f"{name}={value!r} holds a NUL character, which no path or name can: leave it out")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise LapeError("; ".join(dict.fromkeys(self._one_line(e) for e in error.errors()))) from None

    @classmethod
    def _one_line(cls, error: Any) -> str:
        """Turn one of pydantic's errors into: field, value, what is allowed, the fix."""
        name = str(error["loc"][0]) if error["loc"] else ""
        if error["type"] == "extra_forbidden":
            guess = nearest(name, cls.model_fields)
            return f"unknown key {name!r}: " + (f"did you mean {guess!r}?" if guess else "see lape train --help")
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, LapeError):
            return str(cause)
        rule = error["msg"].removeprefix("Input should be ").replace("Value error, ", "")
        default = cls.model_fields[name].default
        return f"{name}={error['input']!r} is not allowed: must be {rule} (default: {default!r})"


class PredictOptions(Options):
    """How images are classified."""

    checkpoint: str = Field(description=".pth file, folder written by lape.save, or .onnx file of lape export")
    top_k: int = Field(default=5, description="how many classes to show for an image", ge=1)
    device: str = Field(default="auto", description="auto (CUDA when there is one), cpu, cuda, cuda:N")
    described_by: str | None = Field(
        default=None, description="of an .onnx file that says neither transform nor class names: a checkpoint that does"
    )


class ExportOptions(Options):
    """What is exported, to where, and how it is checked."""

    output_dir: str = Field(description="gets folder/, model.pt2, model.onnx and export.json")
    formats: tuple[str, ...] = Field(default=("folder", "torch", "onnx"), description="of folder, torch, onnx")
    fold: bool = Field(default=True, description="positions become constants")
    tolerance: float = Field(default=1e-4, description="largest difference of outputs, relative to the largest")
    data_path: str | None = Field(
        default=None, description="folder with val/ to check on (default: the checkpoint's; '': the packaged digits)"
    )
    images: int = Field(default=64, description="how many images to check on", ge=2)
