"""Images in parquet and arrow files, as the `datasets` library writes them: every row by its number.

Arrow files are mapped into memory, so that a row costs what its bytes cost. Of parquet a whole group of rows is read
for one of them; small data is read once and kept. What a file says is checked and never run: the types of its columns,
and the features that `datasets` keeps in the metadata of the schema (which column is an image, the names of classes).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from lape.data.images import PackedImage
from lape.errors import DataError, check_file, needs, reason_of

with needs("data"):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

CACHE_BYTES = 2**30  # bytes of a split's images in parquet files that are read once and kept
MOST = 2**30  # bytes of a group of rows; a larger one is not read for each of its images
END = b"\xff\xff\xff\xff\0\0\0\0"  # of an arrow stream; one that was cut between two batches lacks it


class Table:
    """A parquet or arrow file, in blocks of rows. A copy in another process opens the file anew.

    `columns`: of the image and of the class; () for those that the file tells. Raises DataError for a damaged file, or
    one without these columns.
    """

    keeps = True  # blocks once read

    def __init__(self, path: Path, columns: Sequence[str] = ()) -> None:
        self.path = path
        check_file(path, DataError)
        with self.whole():
            schema = self.schema()
        features = _features(schema, path)
        self.image, self.label = _columns(schema, features, columns, path)
        self.classes = _names(features.get(self.label, {}), path)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("path", "image", "label", "keeps")}

    def schema(self) -> pa.Schema:
        raise NotImplementedError

    @property
    def lengths(self) -> list[int]:
        """Rows of each block."""
        raise NotImplementedError

    def column(self, name: str) -> pa.ChunkedArray:
        """A column as a whole."""
        raise NotImplementedError

    def block(self, number: int) -> pa.Array:
        """The column of images of a block."""
        raise NotImplementedError

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What pyarrow says of a damaged file is one line."""
        try:
            yield
        except (pa.ArrowException, OSError, UnicodeError) as error:
            reason = reason_of(error)[:200]
            raise DataError(
                f"{self.path} is not a whole {self.path.suffix[1:]} file ({reason}): get it again"
            ) from None

    @cached_property
    def _cache(self) -> dict[int, pa.Array]:
        return {}

    def images(self, number: int) -> pa.Array:
        """The encoded images of a block, which lie within the file."""
        if not self.keeps:
            return _recent(self, number)
        if number not in self._cache:
            self._cache[number] = _encoded(self.block(number))
        return self._cache[number]

    def labels(self) -> list[Any]:
        """What the class column says of each row. Raises DataError where it says nothing."""
        with self.whole():
            column = self.column(self.label)
            column.validate(full=True)
            labels: list[Any] = column.to_pylist()
        if None in labels:
            raise DataError(f"{self.path}, row {labels.index(None)} has no class (NULL): leave such rows out")
        return labels


@lru_cache(maxsize=2)
def _recent(table: Table, number: int) -> pa.Array:
    """In evaluation the next image is mostly in the block of the one before."""
    return _encoded(table.block(number))


class Arrow(Table):
    """A stream of record batches, as `datasets` writes it, or a file of them with a footer."""

    @cached_property
    def _content(self) -> tuple[pa.Schema, list[pa.RecordBatch]]:
        """The batches' buffers are parts of the file."""
        memory = pa.memory_map(str(self.path))
        if memory.read(6) == b"ARROW1":
            file = pa.ipc.open_file(memory)
            return file.schema, [file.get_batch(number) for number in range(file.num_record_batches)]
        memory.seek(max(memory.size() - len(END), 0))
        if memory.read() != END:
            raise pa.ArrowInvalid("its end is missing")
        memory.seek(0)
        stream = pa.ipc.open_stream(memory)
        return stream.schema, list(stream)

    def schema(self) -> pa.Schema:
        return self._content[0]

    @property
    def lengths(self) -> list[int]:
        return [batch.num_rows for batch in self._content[1]]

    def column(self, name: str) -> pa.ChunkedArray:
        schema, batches = self._content
        return pa.chunked_array([batch.column(name) for batch in batches], schema.field(name).type)

    def block(self, number: int) -> pa.Array:
        return self._content[1][number].column(self.image)


class Parquet(Table):
    """Groups of rows, each decoded as a whole."""

    @cached_property
    def _metadata(self) -> pq.FileMetaData:
        return pq.read_metadata(self.path, memory_map=True)

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, memory_map=True, metadata=self._metadata)

    def schema(self) -> pa.Schema:
        return self._metadata.schema.to_arrow_schema()

    @property
    def lengths(self) -> list[int]:
        return [self._metadata.row_group(number).num_rows for number in range(self._metadata.num_row_groups)]

    def sizes(self) -> list[int]:
        """Bytes of each group."""
        return [self._metadata.row_group(number).total_byte_size for number in range(self._metadata.num_row_groups)]

    def column(self, name: str) -> pa.ChunkedArray:
        with self._open() as file:
            return file.read([name], use_threads=False).column(0)

    def block(self, number: int) -> pa.Array:
        leaf = f"{self.image}.bytes" if pa.types.is_struct(self.schema().field(self.image).type) else self.image
        with self._open() as file:
            column = file.read_row_group(number, [leaf], use_threads=False).column(0)
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # the latter copies


class Row(PackedImage):
    """The image of one row of a block."""

    def __init__(self, table: Table, block: int, place: int) -> None:
        self.table, self.block, self.place = table, block, place

    def __str__(self) -> str:
        return f"{self.table.path}, row {sum(self.table.lengths[: self.block]) + self.place}"

    def read(self) -> bytes:
        data: bytes | None = self.table.images(self.block)[self.place].as_py()
        if data is None:
            raise ValueError("NULL where its bytes should be; a path beside it is not followed")
        return data


class Rows:
    """The rows of several files, one after the other."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.blocks = [(table, number) for table in tables for number in range(len(table.lengths))]
        self.ends = list(accumulate((length for table in tables for length in table.lengths), initial=0))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        block = bisect_right(self.ends, index) - 1
        return Row(*self.blocks[block], index - self.ends[block])


def read_tables(paths: Sequence[Path], columns: Sequence[str]) -> tuple[Rows, list[Any], list[str] | None, str]:
    """The rows of a split, their labels, the names of the classes where the files hold them, and a note.

    Raises DataError: a file that is damaged, that lacks a column, or is unlike the others; a row without a class.
    """
    tables = [(Arrow if path.suffix == ".arrow" else Parquet)(path, columns) for path in paths]
    for one, other in pairwise(tables):
        if (one.image, one.label, one.classes) != (other.image, other.label, other.classes):
            raise DataError(f"{one.path} and {other.path} have other columns or classes: leave one out")
    return Rows(tables), [label for table in tables for label in table.labels()], tables[0].classes, _read_small(tables)


def _read_small(tables: Sequence[Table]) -> str:
    """Read small data of parquet files, before loader processes start; return what is to be said of larger data."""
    parquet = [table for table in tables if isinstance(table, Parquet)]
    sizes = [size for table in parquet for size in table.sizes()]
    if sum(sizes) <= CACHE_BYTES:
        for table in parquet:
            with table.whole():
                for number in range(len(table.lengths)):
                    table.images(number)
        return ""
    if max(sizes) > MOST:
        raise DataError(
            f"{parquet[0].path.parent} holds a row group of {max(sizes) / 2**30:.1f} GiB, all of it read for each "
            "image: write it again with row groups of 100 rows, or as arrow files by datasets' save_to_disk"
        )
    for table in parquet:
        table.keeps = False
    rows = max(length for table in parquet for length in table.lengths)
    return f" ({rows} rows are read for one image, arrow files are faster in training)"


def _encoded(column: pa.Array) -> pa.Array:
    """The bytes in a column of images, checked to lie within its buffers."""
    column.validate()
    if pa.types.is_struct(column.type):
        column.field("bytes").validate(full=True)
        return pc.struct_field(column, "bytes")
    column.validate(full=True)
    return column


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        kind = kind if place < 0 else kind.field(place).type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_label(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _features(schema: pa.Schema, path: Path) -> dict[str, dict[str, Any]]:
    """What `datasets` says of each column."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(text)["info"]["features"] if text else {}
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{path} has features that are not those of the datasets library: write it again") from None


def _columns(
    schema: pa.Schema, features: dict[str, dict[str, Any]], names: Sequence[str], path: Path
) -> tuple[str, str]:
    """The columns of the image and of the class: those named, or the only ones, or those with the usual names."""
    columns: list[str] = []
    kinds = (("image", "Image", _is_image, "image"), ("class", "ClassLabel", _is_label, "label"))
    for place, (what, feature, fits, usual) in enumerate(kinds):
        fields = [field.name for field in schema if fits(field.type)]
        matches = [name for name in fields if features.get(name, {}).get("_type") == feature] or fields
        candidates = [names[place]] if names else [usual] if usual in matches else matches
        if len(candidates) != 1 or candidates[0] not in fields:
            problem = f"no {what} column" if len(candidates) < 2 else f"{len(candidates)} {what} columns"
            problem += f" {names[place]!r}" if names else ""
            raise DataError(f"{path} has {problem}: name both with --columns IMAGE CLASS, of {', '.join(schema.names)}")
        columns += candidates
    return columns[0], columns[1]


def _names(feature: dict[str, Any], path: Path) -> list[str] | None:
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise DataError(f"{path} has names of classes that are no list of different texts: write it again")
    return names
