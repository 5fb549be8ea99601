"""Readers of data sets, one per format, all of one protocol (``source.Source``).

    json_files    .json (an array, or one object per line), .jsonl, .ndjson
    parquet       .parquet, as the Hugging Face hub stores it; row_groups limits the memory of its rows
    tfds          TensorFlow Datasets prepared as ArrayRecord or parquet, without TensorFlow
    array_record  payloads that are our records, JSON objects or msgpack maps
    source        records that are in memory already, and the protocol
    easy_vqa      the small real data set of the demo

``open_source`` chooses the reader; ``items`` turns an item of any format into a record, and ``keys`` knows the keys of
other trainers.
"""

import os

# Before Arrow is imported: its own allocator reserves a gigabyte first, which no limit on memory counts.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
