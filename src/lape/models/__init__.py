"""Models of our own, registered with timm when this package is imported: `timm.create_model("cct_7_3x1_32")`.

`lape.create_model`, recipes and `lape.load` find them without this import; it loads timm, so `import lape` does not.
"""

from lape.models.ceit import CeiT
from lape.models.compact import CompactTransformer
from lape.models.t2t import T2TViT

__all__ = ["CeiT", "CompactTransformer", "T2TViT"]
