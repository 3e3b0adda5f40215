"""Makes the bucket, and in the folder that is given a model of 64 MiB of random weights to upload."""

import json
import os
import struct
import sys
import time
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError

SIZE_BYTES = 64 << 20
TRIES = 120

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
table = {"weight": {"dtype": "U8", "shape": [SIZE_BYTES], "data_offsets": [0, SIZE_BYTES]}}
header = json.dumps(table).encode()
weights = struct.pack("<Q", len(header)) + header + os.urandom(SIZE_BYTES)
(folder / "model.safetensors").write_bytes(weights)
(folder / "config.json").write_text(json.dumps({"model_type": "trial"}))
s3 = boto3.client("s3", endpoint_url=os.environ["CACHED_S3_ENDPOINT_URL"])
for tries_left in reversed(range(TRIES)):  # the store is being started, too
    try:
        if "models" not in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]:
            s3.create_bucket(Bucket="models")
        break
    except (BotoCoreError, ClientError):
        if not tries_left:
            raise
        time.sleep(1)
