"""Models that the catalog names no more: what is here of them is mended from where it came."""

from __future__ import annotations

import signal
from pathlib import Path

import cached_client
from cached.units import CHUNK_BYTES
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import DaemonProcess, wait_for
from tests.integration.part_support import content, layered
from tests.integration.support import MB, flip_byte, model_files
from tests.servers import RcloneS3


def test_a_model_that_left_the_catalog_is_mended_from_the_endpoint_it_came_from(
    tmp_path: Path, rclone_s3: RcloneS3
) -> None:
    rclone_s3.create_bucket("dropped")
    rclone_s3.seed_many("dropped", {f"m/{path}": data for path, data in model_files(2 * MB).items()})
    models = {"m": {"source": "s3://dropped/m", "origin": rclone_s3.options()}}
    settings = {"l2": {"enabled": False}, "s3": {"endpoint_url": "http://127.0.0.1:9"}}
    with (
        DaemonProcess(tmp_path, models=models, settings=settings, environment=rclone_s3.env()) as daemon,
        daemon.stub() as stub,
    ):
        for _ in stub.Pull(pb.PullRequest(ref="m")):
            pass
        daemon.write_catalog({})
        daemon.signal(signal.SIGHUP)
        daemon.wait_event("catalog.loaded", lambda event: event["models"] == 0)
        blobs = [path for path in daemon.segments() if ".blob." in path.name]
        weights = max(blobs, key=lambda path: path.stat().st_size)
        flip_byte(weights, MB)
        last = list(stub.Verify(pb.VerifyRequest(ref="m", repair=True)))[-1]
        assert (last.damaged_chunks, last.repaired_chunks) == (1, 1)


def test_a_part_of_a_model_that_left_the_catalog_is_mended_from_the_endpoint_it_came_from(
    tmp_path: Path, rclone_s3: RcloneS3
) -> None:
    files, name = layered(1, 1), "layers.0.weight"
    rclone_s3.create_bucket("dropped-part")
    rclone_s3.seed_many("dropped-part", {f"m/{path}": data for path, data in files.items()})
    models = {"m": {"source": "s3://dropped-part/m", "origin": rclone_s3.options()}}
    settings = {"l2": {"enabled": False}, "s3": {"endpoint_url": "http://127.0.0.1:9"}}
    with (
        DaemonProcess(tmp_path, models=models, settings=settings, environment=rclone_s3.env()) as daemon,
        cached_client.connect(str(daemon.socket)) as cache,
        cache.attach("m", only=[name], wait=True) as model,
    ):
        assert daemon.terminate() == 0
        daemon.write_catalog({})
        [weights] = [path for path in daemon.segments() if ".ingest." in path.name]
        flip_byte(weights, CHUNK_BYTES // 2)
        daemon.start()
        wait_for(lambda: model.lease_lost or daemon.stats().lease_count, "the lease to be taken up again")
        model.wait(60)
        assert model.lease_lost is None
        wait_for(lambda: not daemon.stats().active_load_count, "the chunk to be mended")
        assert bytes(model.raw(name)) == content(files, name)
