"""Images in parquet, arrow and tar files are those of the folder: pixels, classes, batches, trainings; bad files."""

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import write_image
from PIL import Image
from training import STATE, Killed, log_without_times, quiet, read, same, tiny

import lape.data.shards
import lape.data.tables
from lape.cli.app import USER_ERROR, app, run
from lape.data.check import check_data
from lape.data.loaders import eval_loader, train_loader
from lape.data.open import load_data
from lape.errors import DataError, LapeError
from lape.recipe import Recipe
from lape.train.loop import train

CLASSES = ("cat", "dog", "owl")
WORD = {"train": "train", "val": "validation"}
IMAGE = {"_type": "Image"}
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LABEL = {"_type": "ClassLabel", "names": list(CLASSES)}
Paths = dict[str, list[Path]]


def images_of(root: Path) -> Paths:
    """The images of each split in the order of the folder."""
    return {
        split: [path for name in CLASSES for path in sorted((root / split / name).iterdir())]
        for split in ("train", "val")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of several kinds, 24 to train and 12 to evaluate."""
    root = tmp_path_factory.mktemp("folder")
    for split, count in (("train", 8), ("val", 4)):
        for place, name in enumerate(CLASSES):
            for number in range(count):
                path = root / split / name / f"{number}.{('png', 'jpg')[number % 2]}"
                write_image(path, seed=100 * place + 10 * number + (split == "val"))
    deep = np.random.default_rng(0).integers(0, 4096, (16, 20)).astype(np.uint16)
    Image.fromarray(deep).save(root / "train" / "owl" / "0.png")
    turned = Image.Exif()
    turned[274] = 6
    with Image.open(root / "val" / "cat" / "1.jpg") as image:
        image.save(root / "val" / "cat" / "1.jpg", exif=turned)
    with Image.open(root / "val" / "dog" / "0.png") as image:
        image.convert("P").save(root / "val" / "dog" / "0.png")
    return root


def table_of(paths: list[Path], label: dict | None = LABEL, features: bool = True, plain: bool = False) -> pa.Table:
    """As `datasets` has it; `plain`: bytes instead of a struct; `label` None: names of the classes."""
    content = [path.read_bytes() if plain else {"bytes": path.read_bytes(), "path": path.name} for path in paths]
    names = [path.parent.name for path in paths]
    labels = pa.array(names) if label is None else pa.array([CLASSES.index(name) for name in names])
    table = pa.table({"image": pa.array(content, pa.binary() if plain else STRUCT), "label": labels})
    said = {"info": {"features": {"image": IMAGE, "label": label or {"dtype": "string", "_type": "Value"}}}}
    return table.replace_schema_metadata({"huggingface": json.dumps(said)} if features else None)


def parts(paths: list[Path]) -> list[list[Path]]:
    return [paths[: len(paths) // 3], paths[len(paths) // 3 :]]


def as_parquet(images: Paths, root: Path, **how) -> None:
    (root / "data").mkdir(parents=True)
    for split, paths in images.items():
        for number, part in enumerate(parts(paths)):
            name = f"{WORD[split]}-{number:05d}-of-00002.parquet"
            pq.write_table(table_of(part, **how), root / "data" / name, row_group_size=3)


def as_arrow(images: Paths, root: Path, footer: bool = False, **how) -> None:
    """What `DatasetDict.save_to_disk` writes."""
    for split, paths in images.items():
        place = root / WORD[split]
        place.mkdir(parents=True)
        (place / "state.json").write_text("{}")
        for number, part in enumerate(parts(paths)):
            table = table_of(part, **how)
            kind = pa.ipc.new_file if footer else pa.ipc.new_stream
            with kind(place / f"data-{number:05d}-of-00002.arrow", table.schema) as writer:
                writer.write_table(table, max_chunksize=5)
    (root / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def as_class_folders(images: Paths, root: Path) -> None:
    """As `tar cf train.tar train`, in an order of its own."""
    for split, paths in images.items():
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(paths[0].parents[1], split, recursive=False)
            for path in sorted(paths, key=lambda path: path.name):
                tar.add(path, f"./{split}/{path.parent.name}/{path.name}")
            add(tar, f"{split}/._cat", b"of a Mac")


def as_samples(images: Paths, root: Path, form: str = "cls") -> None:
    """Shards of webdataset, each of which counts its samples from 0."""
    for split, paths in images.items():
        for number, part in enumerate(parts(paths)):
            with tarfile.open(root / f"made-up-{split}-{number:06d}.tar", "w") as tar:
                for place, path in enumerate(part):
                    key, label = f"s/{place:04d}", CLASSES.index(path.parent.name)
                    text = json.dumps({"label": label, "more": 0}) if form == "json" else f"{label}\n"
                    if form == "names":
                        text = path.parent.name
                    add(tar, f"{key}.{'json' if form == 'json' else 'cls'}", text.encode())
                    add(tar, f"{key}{path.suffix}", path.read_bytes())
    if form != "names":
        (root / "classnames.txt").write_text("\n".join(CLASSES))


FORMATS: dict[str, Callable[[Paths, Path], None]] = {
    "parquet": as_parquet,
    "parquet, bytes": lambda images, root: as_parquet(images, root, plain=True),
    "parquet, names, no features": lambda images, root: as_parquet(images, root, label=None, features=False),
    "arrow": as_arrow,
    "arrow with a footer": lambda images, root: as_arrow(images, root, footer=True),
    "class folders": as_class_folders,
    "samples": as_samples,
    "samples, json": lambda images, root: as_samples(images, root, form="json"),
    "samples, names": lambda images, root: as_samples(images, root, form="names"),
}


def recipe_of(root: Path, **changes) -> Recipe:
    return Recipe(**{"data_path": str(root), "batch_size": 6, "input_size": 40, "num_workers": 0, **changes})


@pytest.mark.parametrize("form", FORMATS)
def test_the_images_are_those_of_the_folder(folder, tmp_path, form):
    FORMATS[form](images_of(folder), tmp_path)
    wanted, found = load_data(recipe_of(folder)), load_data(recipe_of(tmp_path))
    assert found.classes == wanted.classes == list(CLASSES)
    assert (found.train.targets, found.val.targets) == (wanted.train.targets, wanted.val.targets)
    for index in range(len(wanted.val)):
        assert torch.equal(found.val[index][0], wanted.val[index][0])
    batches = [list(train_loader(data.train, recipe_of(tmp_path), epoch=1)) for data in (wanted, found)]
    assert same(batches[1], batches[0])
    counts = "(3 classes, 24 training images, 12 validation images)"
    kind = "tar" if "folders" in form or "samples" in form else form.split()[0].strip(",")
    words = ("train", "val") if kind == "tar" else ("train", "validation")
    number = 1 if form == "class folders" else 2
    files = ", ".join(f"{word}: {number} {kind} file(s)" for word in words)
    assert found.name == f"{tmp_path}, {files} {counts}"


@pytest.mark.matrix
@pytest.mark.parametrize("form", ["parquet", "arrow", "samples"])
@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_batches_of_processes_and_within_an_epoch_are_those_of_the_folder(folder, tmp_path, form, decode, monkeypatch):
    monkeypatch.setattr(lape.data.tables, "CACHE_BYTES", 0)
    FORMATS[form](images_of(folder), tmp_path)
    recipes = [
        recipe_of(root, batch_size=3, num_workers=2, decode=decode, mixup=0, cutmix=0) for root in (folder, tmp_path)
    ]
    batches = []
    for recipe in recipes:
        data = load_data(recipe)
        parts = [train_loader(data.train, recipe, epoch=3, rank=1, world_size=2, skip_batches=1)]
        parts += [eval_loader(data.val, recipe, rank=rank, world_size=2) for rank in (0, 1)]
        batches.append([batch for part in parts for batch in part])
    assert len(batches[0]) == 3 + 2 * 2
    assert same(batches[1], batches[0])


def kill(now: bool) -> None:
    if now:
        raise Killed


@pytest.mark.parametrize(
    "form", [pytest.param(name, marks=pytest.mark.slow) for name in ("parquet", "arrow", "class folders")]
)
def test_a_training_that_was_stopped_ends_as_one_of_the_folder(folder, tmp_path, form):
    FORMATS[form](images_of(folder), tmp_path)
    settings = {"epochs": 2, "batch_size": 6, "aa": "rand-m9-mstd0.5-inc1", "log_every": 1}
    train(tiny(**settings, data_path=str(folder), output_dir=str(tmp_path / "whole")), say=quiet)
    recipe = tiny(
        **settings,
        data_path=str(tmp_path),
        output_dir=str(tmp_path / "out"),
        save_steps=1,
        resume="auto",
        num_workers=1,
    )
    for epoch, step in ((0, 2), (1, 3)):
        with pytest.raises(Killed):
            train(recipe, say=lambda text, at=f"Epoch: [{epoch}]  [{step}/4]": kill(text.startswith(at)))
    train(recipe, say=quiet)
    found, wanted = (read(tmp_path / name / "checkpoint.pth") for name in ("out", "whole"))
    assert all(same(found[key], wanted[key]) for key in STATE)
    assert log_without_times(tmp_path / "out") == log_without_times(tmp_path / "whole")
    assert found["classes"] == list(CLASSES)
    (tmp_path / "train.tar").unlink(missing_ok=True)  # evaluation opens the validation files alone
    shutil.rmtree(tmp_path / "train", ignore_errors=True)
    assert (
        run(app, ["eval", str(tmp_path / "out" / "checkpoint.pth"), "--data-path", str(tmp_path), "--device=cpu"]) == 0
    )


def test_the_data_that_was_asked_for_is_opened_alone(folder, tmp_path):
    as_samples(images_of(folder), tmp_path)
    for path in tmp_path.glob("*val*"):
        path.write_bytes(b"")
    assert len(load_data(recipe_of(tmp_path), val=False).train) == 24
    (tmp_path / "made-up-test-0.tar").write_bytes((tmp_path / "made-up-train-000001.tar").read_bytes())
    with pytest.raises(DataError, match=r"made-up-val-000000\.tar is not a whole"):  # before any test images
        load_data(recipe_of(tmp_path))
    for path in tmp_path.glob("*val*"):
        path.unlink()
    found = load_data(recipe_of(tmp_path), train=False)
    assert (found.train, len(found.val), found.classes) == (None, 16, list(CLASSES))
    assert "test: 1 tar file(s)" in found.name


def test_a_folder_of_classes_stays_one(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "train.tar").write_bytes(b"what it was unpacked from")
    (tmp_path / "data" / "train" / "train-labels.parquet").write_bytes(b"")
    assert (
        load_data(recipe_of(tmp_path / "data")).name
        == f"{tmp_path}/data (3 classes, 24 training images, 12 validation images)"
    )


def test_numbers_without_names_are_classes(folder, tmp_path):
    as_samples(images_of(folder), tmp_path)
    (tmp_path / "classnames.txt").unlink()
    assert load_data(recipe_of(tmp_path)).classes == ["0", "1", "2"]


def test_names_of_ones_own_count_more_than_those_of_the_files(folder, tmp_path):
    """A checkpoint of a folder is evaluated by names, and the Hub's names are others."""
    as_parquet(images_of(folder), tmp_path)
    (tmp_path / "classnames.txt").write_text("n02\r\nn00\n\nn01\n")
    found = load_data(recipe_of(tmp_path))
    assert found.classes == ["n02", "n00", "n01"]
    assert found.val.targets == load_data(recipe_of(folder)).val.targets
    (tmp_path / "classnames.txt").write_text("n02\nn00\n")
    assert "has 2 names, 2 different ones: give one of the 3 classes" in refused(lambda: load_data(recipe_of(tmp_path)))
    (tmp_path / "classnames.txt").write_bytes(b"\xff")
    assert "it holds a name of a class a line, in UTF-8" in refused(lambda: load_data(recipe_of(tmp_path)))


def test_columns_are_chosen_where_there_are_several(folder, tmp_path, capsys):
    for split, paths in images_of(folder).items():
        table = table_of(paths)
        fine, said = (
            pa.array([index % 2 for index in range(len(paths))]),
            json.loads(table.schema.metadata[b"huggingface"]),
        )
        said["info"]["features"] = {"img": IMAGE, "coarse": LABEL, "fine": {**LABEL, "names": ["even", "odd"]}}
        table = table.rename_columns(["img", "coarse"]).append_column("fine", fine)
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(said)}), tmp_path / f"{split}.parquet")
    expected = (
        f"{tmp_path}/train.parquet has 2 class columns: name both with --columns IMAGE CLASS, of img, coarse, fine"
    )
    assert refused(lambda: load_data(recipe_of(tmp_path))) == expected
    assert run(app, ["check-data", str(tmp_path), "--columns", "img", "fine"]) == 0
    assert "train: 2 classes, 24 images" in capsys.readouterr().out
    assert load_data(recipe_of(tmp_path, columns=("img", "fine"))).classes == ["even", "odd"]
    assert load_data(recipe_of(tmp_path, columns=("img", "coarse"))).classes == list(CLASSES)
    assert "no class column 'rough'" in refused(lambda: load_data(recipe_of(tmp_path, columns=("img", "rough"))))
    assert "no image column 'fine'" in refused(lambda: load_data(recipe_of(tmp_path, columns=("fine", "img"))))
    for root in (folder, ""):
        assert "are of parquet and arrow files" in refused(
            lambda root=root: load_data(recipe_of(root, columns=("a", "b")))
        )
    assert "has 1 value(s), 0 or 2 are needed" in refused(lambda: recipe_of(tmp_path, columns=("img",)))


def test_a_row_group_is_read_for_a_row_and_a_huge_one_is_not(folder, tmp_path, monkeypatch):
    as_parquet(images_of(folder), tmp_path)
    monkeypatch.setattr(lape.data.tables, "CACHE_BYTES", 1000)
    found = load_data(recipe_of(tmp_path))
    assert "train: 2 parquet file(s) (3 rows are read for one image, arrow files are faster in training)" in found.name
    for sources in (found.train.sources, pickle.loads(pickle.dumps(found.train.sources))):
        sources[0].read()
        assert not any(table._cache for table, _ in sources.blocks)
    wanted = load_data(recipe_of(folder))
    assert all(torch.equal(found.val[index][0], wanted.val[index][0]) for index in (11, 3, 4, 0))
    monkeypatch.setattr(lape.data.tables, "MOST", 1000)
    message = refused(lambda: load_data(recipe_of(tmp_path)))
    assert message.endswith("write it again with row groups of 100 rows, or as arrow files by datasets' save_to_disk")


@pytest.mark.parametrize("form", ["parquet", "arrow", "samples"])
def test_a_copy_in_another_process_opens_the_file_itself(folder, tmp_path, form):
    FORMATS[form](images_of(folder), tmp_path)
    sources = load_data(recipe_of(tmp_path)).train.sources
    wanted = [source.read() for source in sources]
    stored = pickle.dumps(sources)
    assert len(stored) < sum(map(len, wanted)) / 4  # no images
    assert [source.read() for source in pickle.loads(stored)] == wanted
    with pytest.raises(IndexError):
        sources[len(sources)]


def test_large_shards_are_indexed_by_all_processors(folder, tmp_path, monkeypatch):
    as_samples(images_of(folder), tmp_path)
    wanted = load_data(recipe_of(tmp_path))
    used = []
    monkeypatch.setattr(lape.data.shards, "LARGE", 0)
    monkeypatch.setattr(lape.data.shards, "processors", lambda: used.append(2) or 2)
    found = load_data(recipe_of(tmp_path))
    assert used == [2, 2]
    assert found.train.sources.names == wanted.train.sources.names
    assert same(list(eval_loader(found.val, recipe_of(tmp_path))), list(eval_loader(wanted.val, recipe_of(tmp_path))))
    (tmp_path / "made-up-train-000001.tar").write_bytes(b"")
    assert "made-up-train-000001.tar is not a whole, uncompressed tar file" in refused(
        lambda: load_data(recipe_of(tmp_path))
    )


# -- what cannot be trusted --------------------------------------------------------------------------------------------


def refused(call: Callable[[], object]) -> str:
    """The message of the error, which must be one line."""
    with pytest.raises(LapeError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def with_labels(labels: list) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(1, "label", pa.array((labels * len(table))[: len(table)]))


def with_feature(**label) -> Callable[[pa.Table], pa.Table]:
    said = json.dumps({"info": {"features": {"image": IMAGE, "label": {"_type": "ClassLabel", **label}}}})
    return lambda table: table.replace_schema_metadata({"huggingface": said})


BAD_PARQUET = {
    "cut off": (
        lambda p: p.write_bytes(p.read_bytes()[:-100]),
        "train-00000-of-00002.parquet is not a whole parquet file",
    ),
    "empty": (lambda p: p.write_bytes(b""), "is not a whole parquet file"),
    "missing": (lambda p: p.unlink(), "does not have all train files and no others: 1 are there"),
    "no image": (
        lambda p: rewrite(p, lambda t: t.drop_columns("image")),
        "has no image column: name both with --columns",
    ),
    "no class": (
        lambda p: rewrite(p, lambda t: t.drop_columns("label")),
        "has no class column: name both with --columns",
    ),
    "a class too many": (
        lambda p: rewrite(p, with_labels([0, 3])),
        "4 image(s) have a class that is none of the 3, such as 3",
    ),
    "no label": (lambda p: rewrite(p, with_labels([1, -1])), "such as -1 of"),
    "NULL": (lambda p: rewrite(p, with_labels([1, None])), "train-00000-of-00002.parquet, row 1 has no class (NULL)"),
    "other names": (lambda p: rewrite(p, with_feature(names=["a", "b", "c"])), "have other columns or classes"),
    "names twice": (lambda p: rewrite(p, with_feature(names=["a", "a", "c"])), "names of classes that are no list"),
    "names of numbers": (lambda p: rewrite(p, with_feature(names=[1, 2, 3])), "names of classes that are no list"),
    "features": (
        lambda p: rewrite(p, lambda t: t.replace_schema_metadata({"huggingface": "[" * 10**5})),
        "has features that are not those of the datasets library",
    ),
}


@pytest.mark.parametrize("how", BAD_PARQUET)
def test_a_bad_parquet_file_is_one_line(folder, tmp_path, how, capsys):
    as_parquet(images_of(folder), tmp_path)
    change, expected = BAD_PARQUET[how]
    change(tmp_path / "data" / "train-00000-of-00002.parquet")
    assert expected in refused(lambda: load_data(recipe_of(tmp_path)))
    assert run(app, ["check-data", str(tmp_path)]) == USER_ERROR
    assert expected in capsys.readouterr().out


def test_rows_without_bytes_are_named_when_they_are_read(folder, tmp_path, capsys):
    """A path in the place of bytes is not followed: the file may be a stranger's."""
    as_parquet(images_of(folder), tmp_path)
    path = tmp_path / "data" / "train-00001-of-00002.parquet"
    secret = {"bytes": None, "path": str(images_of(folder)["train"][0])}
    rows = pq.read_table(path)["image"].to_pylist()
    rows[4:6] = [secret, None]
    rewrite(path, lambda table: table.set_column(0, "image", pa.array(rows, STRUCT)))
    data = load_data(recipe_of(tmp_path)).train
    for row in (4, 5):
        message = refused(lambda row=row: data[8 + row])
        assert message.startswith(f"cannot read image {path}, row {row} (NULL where its bytes should be")
    loader = train_loader(data, recipe_of(tmp_path, skip_corrupt=True, repeated_aug=False), epoch=0)
    assert len(list(loader)) == 4
    assert any(line.startswith(f"cannot read image {path}, row 5 ") for line in loader.omissions)
    report = check_data(tmp_path, workers=1)
    assert set(report.corrupt) == {f"data/train-00001-of-00002.parquet, row {row}" for row in (4, 5)}


@pytest.mark.parametrize("kept", [0.2, 0.6, 0.9, 1])
def test_an_arrow_file_that_is_cut_off_is_one_line(folder, tmp_path, kept):
    as_arrow(images_of(folder), tmp_path)
    path = tmp_path / "train" / "data-00001-of-00002.arrow"
    content = path.read_bytes()
    path.write_bytes(content[:-8] if kept == 1 else content[: int(kept * len(content))])  # 1: between two batches
    assert "data-00001-of-00002.arrow is not a whole arrow file" in refused(lambda: load_data(recipe_of(tmp_path)))


def test_offsets_outside_of_an_arrow_file_are_found(folder, tmp_path):
    as_arrow(images_of(folder), tmp_path, plain=True)
    path = tmp_path / "train" / "data-00000-of-00002.arrow"
    content = bytearray(path.read_bytes())
    with pa.ipc.open_stream(path) as stream:
        offsets = stream.read_next_batch().column(0).buffers()[1].to_pybytes()[:24]
    place = content.index(offsets)
    content[place + 12 : place + 16] = (2**30).to_bytes(4, "little")
    path.write_bytes(content)
    data = load_data(recipe_of(tmp_path)).train
    assert f"cannot read image {path}, row 0" in refused(lambda: data[0])


def tar_of(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add(tar, name, content)


def linked(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("cat/1.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)


def ended(path: Path) -> None:
    with tarfile.open(path) as tar:
        place = tar.getmembers()[3].offset
    path.write_bytes(path.read_bytes()[:place])


def compressed(path: Path) -> None:
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "cat/0.jpg", b"")


def damaged(path: Path) -> None:
    """One bit of a header."""
    content = bytearray(path.read_bytes())
    content[content.index(b"train/dog/0.png") + 5] = 0x7F
    path.write_bytes(content)


BAD_TAR = {
    "cut off in an image": (
        lambda p: p.write_bytes(p.read_bytes()[:5000]),
        "train.tar is not a whole, uncompressed tar file",
    ),
    "cut off between images": (lambda p: p.write_bytes(p.read_bytes().rstrip(b"\0")[:-1]), "is not a whole"),
    "without an end": (ended, "no end of the archive at byte"),
    "a damaged header": (damaged, "is not a whole, uncompressed tar file (bad checksum)"),
    "two in one": (lambda p: p.write_bytes(2 * p.read_bytes()), "no end of the archive at byte"),
    "compressed": (compressed, "is not a whole, uncompressed tar file"),
    "empty": (lambda p: p.write_bytes(b""), "is not a whole, uncompressed tar file"),
    "no image": (lambda p: tar_of(p, ("cat/a.txt", b"a")), "the train files in"),
    "no class": (
        lambda p: tar_of(p, ("a.jpg", b"a")),
        "train.tar, a.jpg lies in no class folder: pack <class>/<image>",
    ),
    "a link": (linked, "train.tar, cat/1.jpg is a link or has holes, its bytes are not there"),
    "half labelled": (
        lambda p: tar_of(p, ("0.jpg", b""), ("0.cls", b"1"), ("1.jpg", b"")),
        "1.jpg has no .cls or .json beside it",
    ),
    "an empty label": (
        lambda p: tar_of(p, ("0.jpg", b""), ("0.cls", b"\n")),
        "0.cls says no class (neither a number nor a name)",
    ),
    "bytes": (lambda p: tar_of(p, ("0.jpg", b""), ("0.cls", b"\xff")), "0.cls says no class ("),
    "a label too long": (
        lambda p: tar_of(p, ("0.jpg", b""), ("0.cls", b"1" * 70000)),
        "0.cls says no class (it is too large)",
    ),
    "no json": (lambda p: tar_of(p, ("0.jpg", b""), ("0.json", b"[" * 60000)), "0.json says no class ("),
    "json without": (lambda p: tar_of(p, ("0.jpg", b""), ("0.json", b'{"a": 1}')), "0.json says no class ('label')"),
    "a list": (
        lambda p: tar_of(p, ("0.jpg", b""), ("0.json", b'{"label": [1]}')),
        "0.json says no class (neither a number",
    ),
    "numbers and names": (lambda p: tar_of(p, ("0.jpg", b""), ("0.cls", b"1")), "has numbers and names as classes"),
    "a class of its own": (
        lambda p: tar_of(p, ("cat/0.jpg", b"")),
        "validation images of 2 class(es) without a training image: dog, owl",
    ),
}


@pytest.mark.parametrize("how", BAD_TAR)
def test_a_bad_tar_file_is_one_line(folder, tmp_path, how):
    as_class_folders(images_of(folder), tmp_path)
    change, expected = BAD_TAR[how]
    change(tmp_path / "train.tar")
    assert expected in refused(lambda: load_data(recipe_of(tmp_path)))


def test_class_numbers_that_are_none_are_one_line(folder, tmp_path):
    as_samples(images_of(folder), tmp_path)
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    assert "have a class that is none of the 2, such as 2 of" in refused(lambda: load_data(recipe_of(tmp_path)))
    (tmp_path / "classnames.txt").write_text("cat\ndog\ncat\n")
    assert "has 3 names, 2 different ones: give one a line" in refused(lambda: load_data(recipe_of(tmp_path)))
    (tmp_path / "classnames.txt").unlink()
    tar_of(tmp_path / "made-up-val-000001.tar", ("0.jpg", b""), ("0.cls", b"99999999999"))
    assert "class number 99999999999: more than" in refused(lambda: load_data(recipe_of(tmp_path)))
    tar_of(tmp_path / "made-up-val-000001.tar", ("0.jpg", b""), ("0.cls", b"-1"))
    assert "such as -1 of" in refused(lambda: load_data(recipe_of(tmp_path)))


def test_a_class_lies_behind_the_last_folder_that_is_called_as_a_split(folder, tmp_path):
    content, names = images_of(folder)["train"][0].read_bytes(), ("cat", "train", "val")
    for split in ("train", "val"):
        tar_of(tmp_path / f"{split}.tar", *((f"{split}/of/{split}/{name}/a.png", content) for name in names))
    assert load_data(recipe_of(tmp_path, batch_size=2)).classes == list(names)


def test_names_in_a_tar_are_only_names(folder, tmp_path):
    content = images_of(folder)["train"][0].read_bytes()
    for split in ("train", "val"):
        tar_of(
            tmp_path / f"{split}.tar",
            *((f"../../{split}/{name}/a.png", content) for name in ("cat", "dog")),
            ("/x/../dog/b.png", b"no"),
        )
    data = load_data(recipe_of(tmp_path, batch_size=2))
    assert data.classes == ["cat", "dog", "x"]
    assert sorted(path.name for path in tmp_path.parent.iterdir() if path.name in ("cat", "dog")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.tar", "val.tar"]
    message = f"{tmp_path}/train.tar, x/dog/b.png is not an image that can be read: replace or remove it"
    assert refused(lambda: data.train[2]) == message


def test_a_split_that_is_missing_or_there_twice_is_one_line(folder, tmp_path):
    as_parquet(images_of(folder), tmp_path)
    shutil.copy(tmp_path / "data" / "train-00000-of-00002.parquet", tmp_path / "train-00000-of-00002.parquet")
    assert "has train files in several folders or of several kinds" in refused(lambda: load_data(recipe_of(tmp_path)))
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    for path in (tmp_path / "data").glob("validation*"):
        path.unlink()
    assert f"{tmp_path} has no validation files (it has train):" in refused(lambda: load_data(recipe_of(tmp_path)))


@pytest.mark.parametrize("form", ["parquet", "arrow", "class folders", "samples"])
def test_check_data_finds_what_it_finds_in_a_folder(folder, tmp_path, form):
    images = images_of(folder)
    shutil.copytree(folder, tmp_path / "folder")
    bad = tmp_path / "folder" / "train" / "owl" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    shutil.copy(images["train"][0], tmp_path / "folder" / "val" / "dog" / "3.jpg")
    (tmp_path / "made").mkdir()
    FORMATS[form](images_of(tmp_path / "folder"), tmp_path / "made")
    found, wanted = check_data(tmp_path / "made", workers=2), check_data(tmp_path / "folder")
    assert (found.counts, found.sizes) == (wanted.counts, wanted.sizes)
    assert [len(found.corrupt), len(found.duplicates)] == [len(wanted.corrupt), len(wanted.duplicates)] == [1, 1]
    assert {kind: len(files) for kind, files in found.odd.items()} == {
        kind: len(files) for kind, files in wanted.odd.items()
    }
    assert set(found.odd) == {
        "16-bit grayscale, taken for values of 12 bits",
        "a palette, converted to RGB",
        lape.data.check.TURNED,
    }
    assert len(found.warnings) == len(wanted.warnings)
    assert not found.fit


def test_classes_without_an_image_are_said(folder, tmp_path):
    images = {
        split: [path for path in paths if path.parent.name != "owl"] for split, paths in images_of(folder).items()
    }
    as_arrow(images, tmp_path)
    report = check_data(tmp_path, workers=1)
    assert report.fit
    assert report.warnings[0] == "1 of 3 classes have no training image: owl"
