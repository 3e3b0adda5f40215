"""Makes the bucket, and in the folder that is given a model of 64 MiB of random weights to upload."""

import json
import os
import struct
import sys
from pathlib import Path

import boto3

SIZE_BYTES = 64 << 20

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
table = {"weight": {"dtype": "U8", "shape": [SIZE_BYTES], "data_offsets": [0, SIZE_BYTES]}}
header = json.dumps(table).encode()
weights = struct.pack("<Q", len(header)) + header + os.urandom(SIZE_BYTES)
(folder / "model.safetensors").write_bytes(weights)
(folder / "config.json").write_text(json.dumps({"model_type": "trial"}))
s3 = boto3.client("s3", endpoint_url=os.environ["CACHED_S3_ENDPOINT_URL"])
if "models" not in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]:
    s3.create_bucket(Bucket="models")
