"""Images a second and core from parquet, arrow and tar files, beside the folder's, on whole photographs.

    python benchmarks/stored.py --data FOLDER [--rounds 15] [--images 64] [--copies 10]

FOLDER holds <class>/*.JPEG. They are written, each several times, into the other layouts: an arrow file as `datasets`
saves it, parquet with row groups of 100 rows (read for a row, as of large data), a tar file of class folders. Three
kinds of work: reading the encoded bytes in a shuffled order; a training batch in a shuffled order; evaluation in the
order of the files. Each round runs every layout once, in turn, on the same images; ratios are taken within a round, of
processor time, one thread. Besides: the time to index a tar file, an image of it.
Written: benchmarks/results/stored_cpu<cores>.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from input_pipeline import RESULTS, _processor, measure

import lape
import lape.data.tables
from lape.data.images import open_source
from lape.data.loaders import Samples
from lape.data.open import load_data
from lape.data.shards import read_shards
from lape.recipe import Recipe

INDEXED = 20_000  # members of the tar file whose index is timed
NAMES = {"plain": "folder", "arrow": "arrow", "tar": "tar", "parquet": "parquet"}


def write(source: Path, root: Path, copies: int) -> dict[str, Path]:
    """The layouts by name."""
    classes = sorted(path.name for path in source.iterdir())
    photographs = [path for name in classes for path in sorted((source / name).iterdir())] * copies
    feature = {"_type": "ClassLabel", "names": classes}
    said = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
    table = pa.table(
        {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in photographs],
            "label": [classes.index(path.parent.name) for path in photographs],
        }
    ).replace_schema_metadata({"huggingface": json.dumps(said)})
    places = {name: root / name for name in NAMES}
    for name, place in places.items():
        for split in ("train", "val"):
            (place / split if name in ("plain", "arrow") else place).mkdir(parents=True, exist_ok=True)
        if name == "plain":
            for split in ("train", "val"):
                (place / split).rmdir()
                (place / split).symlink_to(source.resolve())
    pq.write_table(table, places["parquet"] / "train.parquet", row_group_size=100)
    with pa.ipc.new_stream(places["arrow"] / "train" / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    with tarfile.open(places["tar"] / "train.tar", "w") as tar:
        for number, path in enumerate(photographs):
            tar.add(path, f"{path.parent.name}/{number:06d}{path.suffix}")
    for name, file in (("parquet", "{}.parquet"), ("arrow", "{}/data-00000-of-00001.arrow"), ("tar", "{}.tar")):
        os.link(places[name] / file.format("train"), places[name] / file.format("val"))
    return places


def speeds(places: dict[str, Path], n: int, rounds: int, images: int) -> dict[str, dict]:
    """By kind of work and layout, `measure`'s rows. `n`: images of the larger layouts; the folder has each once."""
    kinds: dict[str, dict] = {}
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    for kind in ("reading", "train", "eval"):
        runs = {}
        for name, root in places.items():
            data = load_data(Recipe(data_path=str(root), eval_crop_ratio=0.875, batch_size=2, device="cpu"))
            chosen = data.val if kind == "eval" else data.train
            samples = Samples(chosen, (0, 0) if kind == "train" else None)

            def run(indices: list[int], samples: Samples = samples, kind: str = kind) -> None:
                keys = indices if kind == "eval" else [order[index] for index in indices]
                keys = [key % len(samples) for key in keys]
                if kind == "reading":
                    for key in keys:
                        with open_source(samples.dataset.sources[key]) as file:
                            file.read()
                else:
                    samples.__getitems__([(key, 0) for key in keys])

            runs[name] = run
        kinds[kind] = measure(runs, n, rounds, images)
    return kinds


def index_seconds(folder: Path) -> float:
    """Processor time of a tar file's index, an image."""
    with tarfile.open(folder / "train.tar", "w") as tar:
        for number in range(INDEXED):
            member = tarfile.TarInfo(f"n{number % 1000:08d}/{number:06d}.JPEG")
            member.size = 1000
            tar.addfile(member, io.BytesIO(bytes(1000)))
    start = time.process_time()
    read_shards([folder / "train.tar"], ["train"])
    return (time.process_time() - start) / INDEXED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--copies", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lape.data.tables.CACHE_BYTES = 0  # as for data that is too large to be held
    with tempfile.TemporaryDirectory() as folder:
        places = write(Path(arguments.data), Path(folder), arguments.copies)
        n = arguments.copies * sum(len(list(path.iterdir())) for path in Path(arguments.data).iterdir())
        kinds = speeds(places, n, arguments.rounds, arguments.images)
        result = {"speed": kinds, "index_seconds_an_image": index_seconds(Path(folder))}
    result["config"] = vars(arguments) | {"data": Path(arguments.data).name, "row_group": 100, "input_size": 224}
    result["machine"] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "pyarrow": pa.__version__,
        "lape": lape.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    path = RESULTS / f"stored_cpu{os.cpu_count()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for kind, rows in kinds.items():
        for name, row in rows.items():
            low, high = row["speed_quartiles"]
            speed = f"x {row['speed_median']:.3f} [{low:.3f}, {high:.3f}]"
            print(f"{kind:8} {NAMES[name]:8} {row['cpu_ms_an_image']:7.3f} ms {speed}")
    print(f"index of a tar file: {1e6 * result['index_seconds_an_image']:.1f} microseconds an image")


if __name__ == "__main__":
    main()
