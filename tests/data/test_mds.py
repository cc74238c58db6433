"""MDS: our reader and writer against files and code of mosaicml-streaming."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from llmfoundry.config import ConfigError
from llmfoundry.data.mds import MDSFolder, MDSWriter, Sample

COLUMNS = {
    "s": "str", "b": "bytes", "i": "int", "j": "json", "u8": "uint8", "f4": "float32", "t": "ndarray:int32",
    "fixed": "ndarray:float64:2,3", "free": "ndarray",
}  # fmt: skip
COMPRESSIONS = (None, "zstd", "zstd:7", "gz", "bz2", "br", "snappy")
N = 40

# A folder that mosaicml-streaming 0.13 has written (zlib, base 85): columns s, i, t, fixed and free, three samples.
GOLDEN = {
    "index.json": (
        "c-mD^(T;;45d0OxbJJ8fEcz>##w>y-iJ$?zyVm&c$D$@Z9+ur<XLg5`gaNz?q$xgE(oN%HU8`L;DdWB}N}K}k;n^(4MbS`lDNYE}"
        "1mYE<e|u;W$|!jx<dAe=^)A<&U#+mW_gZI#%*PPl8Ns}E2E7z+8OKW@&IIG$X=krPFq2D-`y1&eZy~0dSd~==2*WWuc`fq{4?nGf"
        "2nk(@grIRh<mBJD-tb%xzI?_^FDa+*a_cUaNOvtMXPu~IedB@w?=+K8LoK=LwdA~Fg4K6QwhgU<oyV-euu3-D(O82kSNHNJMD>yI"
        "Z|x6XIP_)ab6>Q%J^puWe;-DQpa"
    ),
    "shard.00000.mds": (
        "c-rk!%}T^D5T3MMT<{=0dJszXx(ByPExr2`B1_n&HqfM!wBipQJ^CO%hp*yus55E1?7@ro&M=e7H{X1LFd+b}7{E2gTLADC0le^C"
        "+w|IOrP;NmGIx#_$qhH9uvR=3y)s>1q<o!B5S0kh;W~TJC=k6!`7I)&q!C&Ua+P|NC2=b&rC0Ftl)A$Sr=Ew2be)*KY1T<T6_f|2"
        "zPHjj)fyxYJzlj|iw^HxmtM6Nt{&fZwb=MKNPOEUt%#UiZO-#NyF~m!+EFciUBF;Rlvo@w*xQo%%Nb_;J2)mn5J&F}X8+rNM*I9&"
        "vcP{RMurvc9h_hUVZ1oS*6g$Y$G`WBMXMD~t3^BZ3;RoMo&"
    ),
}


def sample(k: int) -> Sample:
    draw = np.random.default_rng(k)
    return {
        "s": f"text é {k}", "b": bytes(range(k % 7)), "i": -k, "j": {"a": [k, None]}, "u8": k,
        "f4": float(np.float32(k / 3)),
        "t": draw.integers(0, 9, (k % 5 + 1, 2)).astype(np.int32), "fixed": draw.random((2, 3)),
        "free": draw.integers(0, 9, 300).astype([np.int16, np.uint64, np.float32][k % 3]),
    }  # fmt: skip


def write(folder: Path, compression: str | None = None) -> Path:
    with MDSWriter(folder, COLUMNS, compression, hashes=["sha1", "xxh64"], size_limit=3000) as writer:
        for k in range(N):
            writer.write(sample(k))
    return folder


def check(folder: MDSFolder) -> None:
    assert len(folder) == N
    for k in (*range(N), 0, N - 1):  # also out of order
        found, expected = folder.sample(k), sample(k)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, np.ndarray):
                assert np.array_equal(found[name], value) and found[name].dtype == value.dtype, name
            else:
                assert found[name] == value, name


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_there_and_back(tmp_path: Path, compression: str | None) -> None:
    folder = MDSFolder(write(tmp_path / "data", compression), tmp_path / "cache", check_hashes=True)
    assert len(folder.shards) > 16, "more than are kept open"
    check(folder)


def test_a_folder_of_theirs_is_read(tmp_path: Path) -> None:
    for name, content in GOLDEN.items():
        (tmp_path / name).write_bytes(zlib.decompress(base64.b85decode(content)))
    folder = MDSFolder(tmp_path, tmp_path / "cache", check_hashes=True)
    assert folder.columns == {
        "s": "str", "i": "int", "t": "ndarray:int32", "fixed": "ndarray:uint8:2", "free": "ndarray"
    }  # fmt: skip
    for k in range(3):
        found = folder.sample(k)
        assert (found["s"], found["i"], found["fixed"].tolist()) == ("é" * k, -k, [k, k + 1])
        assert found["t"].tolist() == [list(range(k + 1))] and found["t"].dtype == np.int32
        assert found["free"].tolist() == [k] * (140 * k + 1) and found["free"].dtype == np.int16


@pytest.mark.skipif("STREAMING_PYTHON" not in os.environ, reason="set STREAMING_PYTHON to one with mosaicml-streaming")
def test_mosaicml_streaming_reads_what_we_write_and_we_what_it_writes(tmp_path: Path) -> None:
    """Every encoding and compression, sample for sample, in both directions."""
    script = Path(__file__).with_name("mds_by_streaming.py")
    for compression in COMPRESSIONS:
        write(tmp_path / "ours" / str(compression), compression)
    run = [os.environ["STREAMING_PYTHON"], str(script)]
    subprocess.run([*run, "read", str(tmp_path / "ours")], check=True)
    subprocess.run([*run, "write", str(tmp_path / "theirs")], check=True)
    for folder in (tmp_path / "theirs").iterdir():
        check(MDSFolder(folder, tmp_path / "cache", check_hashes=True))


def damaged(folder: Path, file: str, at: int, byte: int) -> None:
    content = bytearray((folder / file).read_bytes())
    content[at] = byte
    (folder / file).write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: (d / "index.json").unlink(), "index.json: cannot be read"),
        (lambda d: (d / "index.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "index.json").write_text("[]"), "lists no shards"),
        (lambda d: (d / "shard.00000.mds").unlink(), "shard.00000.mds: is missing"),
        (lambda d: (d / "shard.00000.mds").write_bytes(b""), "is damaged: 0 bytes"),
        (lambda d: (d / "shard.00000.mds").write_bytes(b"x" * 99), "is damaged: 99 bytes"),
        (lambda d: damaged(d, "shard.00000.mds", 0, 255), "samples, where the index has"),
        (lambda d: damaged(d, "shard.00000.mds", 5, 255), "its offsets do not fit"),
        (lambda d: damaged(d, "shard.00000.mds", -1, 77), "its sha1 is not the one in index.json"),
    ],
)
def test_damage_is_one_clear_line(tmp_path: Path, spoil: object, says: str) -> None:
    folder = write(tmp_path / "data")
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=says):
        MDSFolder(folder, tmp_path / "cache", check_hashes="sha1" in says).sample(0)


@pytest.mark.parametrize("compression", ["zstd", "gz", "bz2", "br", "snappy"])
def test_a_compressed_shard_cut_short_is_named(tmp_path: Path, compression: str) -> None:
    folder = write(tmp_path / "data", compression)
    file = next(folder.glob("shard.00000.mds.*"))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=f"shard.00000.mds.{compression}.*(is not whole|unpacks to)"):
        MDSFolder(folder, tmp_path / "cache").sample(0)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "", ".."])
def test_an_index_may_not_point_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "data")
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = name
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="is malformed"):
        MDSFolder(folder, tmp_path / "cache")


@pytest.mark.parametrize("encoding", ["pkl", "jpeg", "pil"])
def test_columns_of_code_and_images_are_refused(tmp_path: Path, encoding: str) -> None:
    folder = write(tmp_path / "data")
    text = (folder / "index.json").read_text().replace('"bytes", "int"', f'"{encoding}", "int"')
    (folder / "index.json").write_text(text)
    with pytest.raises(ConfigError, match=f"column 'b' is {encoding}"):
        MDSFolder(folder, tmp_path / "cache")


def test_the_writer_takes_only_an_empty_folder(tmp_path: Path) -> None:
    write(tmp_path / "data")
    with pytest.raises(ConfigError, match="is not empty"):
        MDSWriter(tmp_path / "data", COLUMNS)
    with pytest.raises(ConfigError, match="compression 'lz4' is not known"):
        MDSWriter(tmp_path / "new", COLUMNS, "lz4")


def test_two_folders_of_one_index_are_told_apart_by_their_shards(tmp_path: Path) -> None:
    for name, value in (("one", 1), ("two", 2), ("again", 1)):
        with MDSWriter(tmp_path / name, {"t": "ndarray:int32"}) as writer:
            writer.write({"t": np.full(100_000, value, dtype=np.int32)})
    assert (tmp_path / "one/index.json").read_bytes() == (tmp_path / "two/index.json").read_bytes()
    one, two, again = (MDSFolder(tmp_path / name, tmp_path / "cache").fingerprint for name in ("one", "two", "again"))
    assert one != two and one == again
