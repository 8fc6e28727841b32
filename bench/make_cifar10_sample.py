"""Makes the embedded CIFAR-10 sample: `python bench/make_cifar10_sample.py CIFAR_DIR`.

CIFAR_DIR holds train.parquet and test.parquet in the Hugging Face layout. Rows are drawn without
replacement with a fixed seed, the same number from each class, and each part from its own rows: 0
to 44,999 for training, 45,000 to 49,999 for the search, and the test file.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SEED = 2021
SPLITS = {
    "train": ("train.parquet", 0, 45_000, 2_500),
    "search": ("train.parquet", 45_000, 50_000, 1_500),
    "test": ("test.parquet", 0, 10_000, 1_000),
}


def main(source: Path) -> None:
    out = Path(__file__).parents[1] / "cacp_ray" / "data" / "cifar10_sample"
    out.mkdir(exist_ok=True)
    rng = np.random.default_rng(SEED)
    for name, (file, start, stop, rows) in SPLITS.items():
        table = pq.read_table(source / file).slice(start, stop - start)
        labels = table["label"].to_numpy()
        chosen = [
            rng.choice(np.flatnonzero(labels == label), rows // 10, replace=False)
            for label in range(10)
        ]
        order = rng.permutation(np.concatenate(chosen))
        sample = table.take(pa.array(order)).replace_schema_metadata(table.schema.metadata)
        # Images are PNG already: compressing them again gains nothing.
        pq.write_table(sample, out / f"{name}.parquet", compression="none", write_statistics=False)
        print(f"{name}: {rows} rows, {(out / f'{name}.parquet').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
