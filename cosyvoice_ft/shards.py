"""Parquet shards: what training reads, packed once. The one writer and the one reader.

    utt, spk        string
    text            string                  the normalised text
    text_token      list<int32>             its ids
    speech_token    list<int16>             S ids at 25 Hz
    utt_embedding   fixed list<float>[192]  raw speaker vectors, of the utterance and the mean of its speaker
    spk_embedding   fixed list<float>[192]
    speech_feat     binary                  log-mel (2S, 80), float16, read without decoding

Row groups hold 64 utterances, shards 16 row groups; a reader of tokens never touches the mel. `data.list` names the
shards, relative to its own folder.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosyvoice_ft.files import BadInput, whole

N_MELS = 80
ROW_GROUP = 64  # utterances
SHARD = 16 * ROW_GROUP
SCHEMA = pa.schema(
    [
        ("utt", pa.string()),
        ("spk", pa.string()),
        ("text", pa.string()),
        ("text_token", pa.list_(pa.int32())),
        ("speech_token", pa.list_(pa.int16())),
        ("utt_embedding", pa.list_(pa.float32(), 192)),
        ("spk_embedding", pa.list_(pa.float32(), 192)),
        ("speech_feat", pa.binary()),
    ]
)


def write_shards(folder: str | Path, rows: Iterable[Mapping], metadata: Mapping[str, str]) -> list[Path]:
    """Write rows as they come to FOLDER/NNNNN.parquet and FOLDER/data.list; return the shards."""
    rows, paths = iter(rows), []
    for first in rows:
        paths.append(Path(folder) / f"{len(paths):05d}.parquet")
        write_shard(paths[-1], chain([first], islice(rows, SHARD - 1)), metadata)
    write_data_list(Path(folder) / "data.list", paths)
    return paths


def write_shard(path: str | Path, rows: Iterable[Mapping], metadata: Mapping[str, str]) -> None:
    """Write rows (keys as in the head of this file, arrays as numpy) as one parquet file, whole or not at all.

    No more than two row groups are in memory.
    """
    rows, schema = iter(rows), SCHEMA.with_metadata(dict(metadata))
    compression = {field.name: "none" if field.name == "speech_feat" else "zstd" for field in SCHEMA}
    with (
        whole(path) as part,
        pq.ParquetWriter(part, schema, compression=compression, use_dictionary=["spk"]) as writer,
    ):
        while group := list(islice(rows, ROW_GROUP)):
            columns = [_column([row[field.name] for row in group], field.type) for field in SCHEMA]
            writer.write_table(pa.table(columns, schema=schema))


def _column(values: list, kind: pa.DataType) -> pa.Array:
    if pa.types.is_string(kind):
        return pa.array(values, kind)
    if pa.types.is_binary(kind):
        return pa.array([np.asarray(value, np.float16).tobytes() for value in values], kind)
    flat = pa.array(np.concatenate([np.asarray(value).reshape(-1) for value in values]), kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    offsets = np.cumsum([0] + [np.size(value) for value in values])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)


def write_data_list(path: str | Path, shards: Sequence[Path]) -> None:
    """Write `data.list`: a shard a line, relative to the list's own folder."""
    with whole(path) as part:
        part.write_text("".join(f"{shard.relative_to(Path(path).parent)}\n" for shard in shards), encoding="utf-8")


class Ragged:
    """Many arrays of one dtype and different lengths, kept flat: value[i] -> (n_i, ...)."""

    def __init__(self, flat: np.ndarray, lengths: np.ndarray) -> None:
        self.flat, self.lengths = flat, lengths
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    def __getitem__(self, i: int) -> np.ndarray:
        return self.flat[self.starts[i] : self.starts[i + 1]]


class Shards:
    """All utterances of a data.list: ids, tokens and vectors in memory, mel read a row group at a time.

    `utt` list of str; `text_token`, `speech_token` Ragged; `utt_embedding`, `spk_embedding` (U, 192) float32;
    `groups`: for each row group (shard number, group in the shard, first utterance, number of utterances).
    """

    def __init__(self, data_list: str | Path, cached_groups: int = 24) -> None:
        data_list = Path(data_list)
        try:
            names = data_list.read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise BadInput(f"{data_list}: cannot be read ({error.strerror}); run stage 3") from error
        self.paths = [data_list.parent / name for name in names if name]
        self.cached_groups, self.cache, self.files = cached_groups, OrderedDict(), {}
        tables, self.groups, count = [], [], 0
        for number in range(len(self.paths)):
            file = self._open(number)
            tables.append(file.read([name for name in SCHEMA.names if name != "speech_feat"]))
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                self.groups.append((number, group, count, rows))
                count += rows
        self.files.clear()  # reader processes open their own
        if not count:
            raise BadInput(f"{data_list}: holds no utterances; look at the summary of stage 3")
        self.metadata = {k.decode(): v.decode() for k, v in (tables[0].schema.metadata or {}).items()}
        table = pa.concat_tables(tables)
        self.utt = table["utt"].to_pylist()
        self.spk = table["spk"].to_pylist()
        self.text_token, self.speech_token = (_ragged(table[name]) for name in ("text_token", "speech_token"))
        self.utt_embedding, self.spk_embedding = (
            _ragged(table[name]).flat.reshape(count, -1) for name in ("utt_embedding", "spk_embedding")
        )
        self.group_of = np.repeat(np.arange(len(self.groups)), [rows for *_, rows in self.groups])

    def __len__(self) -> int:
        return len(self.utt)

    def fingerprint(self) -> str:
        """Return 16 hex digits of ids, tokens and vectors; another recording gives another vector."""
        digest = hashlib.blake2b("\n".join(self.utt).encode(), digest_size=8)
        for part in (self.text_token, self.speech_token):
            digest.update(part.lengths.astype(np.int64).tobytes() + part.flat.tobytes())
        digest.update(self.utt_embedding.tobytes() + self.spk_embedding.tobytes())
        return digest.hexdigest()

    def _open(self, number: int) -> pq.ParquetFile:
        if number not in self.files:
            path = self.paths[number]
            try:
                self.files[number] = pq.ParquetFile(path, memory_map=True)
            except (OSError, pa.ArrowInvalid) as error:
                raise BadInput(f"{path}: not a readable shard ({error}); run stage 3 again") from error
            if not self.files[number].schema_arrow.equals(SCHEMA):
                raise BadInput(f"{path}: holds other columns than this version packs; run stage 3 again")
        return self.files[number]

    def speech_feat(self, i: int) -> np.ndarray:
        """Return the log-mel of utterance i, (T, 80) float16."""
        group = int(self.group_of[i])
        if group not in self.cache:
            number, local, *_ = self.groups[group]
            table = self._open(number).read_row_group(local, ["speech_feat"])
            self.cache[group] = table["speech_feat"].combine_chunks()
            if len(self.cache) > self.cached_groups:
                self.cache.popitem(last=False)
        self.cache.move_to_end(group)
        values = self.cache[group][i - self.groups[group][2]].as_buffer()
        return np.frombuffer(values, np.float16).reshape(-1, N_MELS)


def _ragged(column: pa.ChunkedArray) -> Ragged:
    column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
    if pa.types.is_fixed_size_list(column.type):
        lengths = np.full(len(column), column.type.list_size)
    else:
        lengths = column.value_lengths().to_numpy()
    return Ragged(column.flatten().to_numpy(zero_copy_only=False), lengths)
