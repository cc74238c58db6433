"""For a Python that has mosaicml-streaming: `write FOLDER`, or `read FOLDER` of folders that test_mds.py wrote."""

import sys
from pathlib import Path

import numpy as np
from streaming import MDSWriter, StreamingDataset

COLUMNS = {
    "s": "str", "b": "bytes", "i": "int", "j": "json", "u8": "uint8", "f4": "float32", "t": "ndarray:int32",
    "fixed": "ndarray:float64:2,3", "free": "ndarray",
}  # fmt: skip


def sample(k: int) -> dict:
    draw = np.random.default_rng(k)
    return {
        "s": f"text é {k}", "b": bytes(range(k % 7)), "i": -k, "j": {"a": [k, None]}, "u8": k,
        "f4": float(np.float32(k / 3)),
        "t": draw.integers(0, 9, (k % 5 + 1, 2)).astype(np.int32), "fixed": draw.random((2, 3)),
        "free": draw.integers(0, 9, 300).astype([np.int16, np.uint64, np.float32][k % 3]),
    }  # fmt: skip


def equal(found: object, expected: object) -> bool:
    if isinstance(expected, np.ndarray):
        return np.array_equal(found, expected) and found.dtype == expected.dtype
    return found == expected


way, root = sys.argv[1], Path(sys.argv[2])
if way == "write":
    for compression in (None, "zstd", "zstd:7", "gz", "bz2", "br", "snappy"):
        out = str(root / str(compression))
        with MDSWriter(out=out, columns=COLUMNS, compression=compression, hashes=["sha1"], size_limit=3000) as writer:
            for k in range(40):
                writer.write(sample(k))
else:
    for folder in sorted(root.iterdir()):
        data = StreamingDataset(local=str(folder), shuffle=False, batch_size=1, keep_zip=True, validate_hash="sha1")
        assert len(data) == 40
        for k in range(40):
            found, expected = data[k], sample(k)
            assert all(equal(found[name], expected[name]) for name in COLUMNS), (folder, k)
