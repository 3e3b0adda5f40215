"""What histories found, each as a short life of its own that does not depend on what a seed means."""

from __future__ import annotations

import pytest

from tests.simulator.test_simulator import run

_LIFE = """
import os
import tests.simulator.scale
import asyncio, gc, hashlib, random, shutil, sys, traceback
from dataclasses import replace
from pathlib import Path
from cached.cache.recovery import Recovery
from cached.errors import LevelError, NoRoomError
from cached.level import Level
from cached.types import Damage, Peer, Selection, Tier
from tests.simulator import history
from tests.simulator.origin import BUCKET
gc.disable()

class Scripted(history.Life):
    def __init__(self, world, config, loop, *others, **options):
        loop.kill_at = None
        config = replace(
            config, daemon=replace(config.daemon, restart_grace_s=5.0),
            l1=replace(config.l1, capacity="300KiB"), l2=replace(config.l2, capacity="400KiB"),
        )
        super().__init__(world, config, loop, *others, **options)
        world.lives = world.__dict__.get("lives", 0) + 1

    async def live(self):
        self._world.faults.on = False
        await self.cache.start()
{script}
        if self._last:
            await self._settled()
            self.checks.at_rest()
        await self.cache.close()

    def resume_after(self, delay_s):
        self._world.resume = resume = Recovery.resume
        async def later(recovery):
            await asyncio.sleep(delay_s)
            await resume(recovery)
        Recovery.resume = later

    def served_bytes(self):
        return sum(self._world.bucket.served_bytes.values())

history.Life = Scripted
for seed in range(1, 16):
    folder = Path(f"/dev/shm/cached-simulator-{{os.getpid()}}") / str(seed)
    made = history.History(seed, folder, unbounded=False)
    made._lives = {lives}
    try:
        made.run()
    except Exception:
        traceback.print_exc(file=sys.stdout)
        break
else:
    print("all well")
sys.stdout.flush()
shutil.rmtree(folder.parent)
os._exit(0)
"""
_EMPTY_PART = """
        self._world.bucket.put("m0/b.safetensors", b"", vouched=True)
        attachment = await self.cache.attach("m0", source=f"{BUCKET}/m0", selection=Selection(files=("b.*",)))
        self._let_go(attachment, await self._follow("m0", attachment))
        await self._attach("m0")
        await self._release()
"""
_TWO_COPIES_TO_L2 = """
        shared = random.Random(1).randbytes(30000)
        for name in ("m0", "m1"):
            self._world.bucket.put(f"{name}/shared.safetensors", shared, vouched=False)
        for name in ("m0", "m1"):
            await self._pull(name, Level.L1, wait=True)
        for name in ("m0", "m1"):
            await self.cache.evict(name, None)
        first = asyncio.ensure_future(self._pull("m0", Level.L1, wait=True))
        while not self._parts.services.storage.ledger(Level.L2).reserved_bytes:
            await self._clock.sleep(0.001)
        await asyncio.gather(first, self._pull("m1", Level.L2, wait=True))
"""
_IN_L1_ALONE = """
        if self._world.lives == 1:
            await self._pull("m0", Level.L1, wait=True)
            await self.cache.evict("m0", Level.L2)
            self._world.fetched_bytes = self.served_bytes()
"""
_STOPPED_AT_ONCE = (
    _IN_L1_ALONE
    + """
        if self._world.lives == 2:
            await self._clock.sleep(0.01)  # the adoption is under way
        if self._world.lives == 3:
            attachment = await self.cache.attach("m0")
            self._let_go(attachment, await self._follow("m0", attachment))
            assert self.served_bytes() == self._world.fetched_bytes, "it was fetched again"
"""
)
_NO_MOVER_STARTS = (
    _IN_L1_ALONE
    + """
        if self._world.lives == 1:
            await self._follow("m0", await self.cache.attach("m0"))  # a worker that outlives this daemon
        if self._world.lives == 2:
            faults = self._world.faults
            faults.on, faults.left, faults.rate, faults.enabled = True, None, 1.0, {"mover_dies"}
            [holder] = self._world.holders
            await self._take_up(holder)
            assert holder.lost
            faults.on = False
            await self._clock.sleep(60.0)
        if self._world.lives == 3:
            attachment = await self.cache.attach("m0")
            self._let_go(attachment, await self._follow("m0", attachment))
            assert self.served_bytes() == self._world.fetched_bytes, "it was fetched again"
            await self._release()
"""
)
_ANOTHER_COULD_NOT_CONFIRM_IT = """
        if self._world.lives == 1:
            shared = random.Random(1).randbytes(9000)
            for name in ("m0", "m9"):
                self._world.bucket.put(f"{name}/shared.safetensors", shared, vouched=True)
                await self._pull(name, Level.L1, wait=True)
            self.resume_after(600.0)  # as where much has to be confirmed first
        else:
            Recovery.resume = self._world.resume
            registry, pulls = self._parts.services.registry, self._parts.pulls
            plan = pulls._plan_known(registry.models["m9"].current, Level.L1)  # nothing is confirmed yet
            attachment = await self.cache.attach("m0")
            holder = await self._follow("m0", attachment)
            while self._parts.loader.loads:
                await self._clock.sleep(1.0)
            faults = self._world.faults
            faults.on, faults.left, faults.rate, faults.enabled = True, None, 1.0, {"mover_hangs"}
            load = pulls._begin(plan)
            while self._parts.loader.loads:
                await self._clock.sleep(1.0)
            assert load.error
            faults.on = False
            assert not self.checks.left_l1(), self.checks.left_l1()
            self._let_go(attachment, holder)
"""
_DAMAGED_AND_BROUGHT_AGAIN = """
        shared = random.Random(1).randbytes(9000)
        for name in ("m0", "m1"):
            self._world.bucket.put(f"{name}/shared.safetensors", shared, vouched=False)
        await self._pull("m0", Level.L1, wait=True)
        await self.cache.evict("m0", Level.L2)
        path = self._parts.services.storage.l1.blob(hashlib.sha256(shared).hexdigest()).path
        with open(path, "r+b") as file:
            file.write(bytes(100))
        self._world.damaged = True
        self._world.bucket.put("m0/shared.safetensors", bytes(9000), vouched=False)  # so it cannot be mended
        await self._verify()
        attachment = await self.cache.attach("m1", source=f"{BUCKET}/m1")
        self._let_go(attachment, await self._follow("m1", attachment))  # reads it
        await self._settled()
        assert not self._parts.services.registry.quarantined
"""
_TWO_REVISIONS_OF_ONE_CONTENT = """
        content = random.Random(1).randbytes(9000)
        for _ in range(2):
            self._world.bucket.put("m0/a.safetensors", content, vouched=False)
            await self._pull("m0", Level.L1, wait=True)
        assert len(self._parts.services.registry.models["m0"].manifests) == 2
        freed = await self.cache.evict("m0", None)
        assert freed.l1_bytes == freed.l2_bytes > 9000
        assert not self._world.blobs(self._world.l1)
"""
_FORGOTTEN_BUT_SHARED = """
        for path in ("config.json", "shared.safetensors", "a.safetensors", "b.safetensors"):
            for name in ("m0", "m1"):
                self._world.bucket.put(f"{name}/{path}", path.encode(), vouched=False)
        for name in ("m0", "m1"):
            await self._pull(name, Level.L1, wait=True)
        await self.cache.remove("m0")
        await self.cache.evict("m1", None)
        self.checks.inspect()
"""
_COLD_AND_HELD = """
        if self._world.lives == 1:
            await self._follow("m0", await self.cache.attach("m0", source=f"{BUCKET}/m0"))
            await self.cache.set_tier("m0", Tier.COLD)
            await self._settled()
        else:
            self._to_be_back = self._kept_for_workers()
            [holder] = self._world.holders
            assert holder.revision in self._to_be_back
            await self._take_up(holder)  # which takes a while
            assert not holder.lost
            await self._release()
"""

_SYNC_FAILS_ONCE = """
        faults, real = self._world.faults, os.fsync
        def fails_once(fd):
            is_first = os.readlink(f"/proc/self/fd/{fd}").endswith("/data") and "fsync_eio" not in faults.hit
            faults.on, faults.left, faults.rate, faults.enabled = is_first, None, 1.0, {"fsync_eio"}
            try:
                real(fd)
            finally:
                faults.on = False
        os.fsync = fails_once
        self._world.bucket.put("m0/a.safetensors", random.Random(1).randbytes(9000), vouched=False)
        refused = []
        for _ in range(2):
            try:
                await self._pull("m0", Level.L2, wait=True)
            except LevelError as error:
                refused.append(error)
        assert len(refused) == 1
        os.fsync = real
        summary = next(each for each in self.cache.list_models() if each.name == "m0")
        assert summary.l2_bytes > 9000 and not self._parts.services.storage.kept_ingests(Level.L2)
        self._world.kernel.cut_power()
        self._world.check_blobs()
"""
_NOTICE_WHILE_IT_ARRIVES = """
        content = random.Random(1).randbytes(9000)
        self._world.bucket.put("m0/a.safetensors", content, vouched=False)
        await self._pull("m0", Level.L2, wait=True)
        faults = self._world.faults
        faults.on, faults.left, faults.rate, faults.enabled = True, 1, 1.0, {"mover_hangs"}
        attachment = await self.cache.attach("m0")
        following = asyncio.ensure_future(self._follow("m0", attachment))
        await self._clock.sleep(1.0)
        digest = hashlib.sha256(content).hexdigest()
        attachment.tell(Damage("m0", "", "a.safetensors", digest, Level.L1, 0, 0, 4096, True))
        await self._clock.sleep(1.0)  # which never ends where somebody spins
        assert not following.done()
        self._let_go(attachment, await following)
"""
_POOL_ABOVE_A_SMALLER_BUDGET = """
        await self._pull("m0", Level.L1, wait=True)
        await self.cache.evict("m0", None)
        await self._settled()
        ledger, storage = self._parts.services.storage.ledger(Level.L1), self._parts.services.storage
        pooled_bytes = storage.pool_bytes(Level.L1)
        assert pooled_bytes > 5000
        self.cache.set_budgets(replace(self._config, l1=replace(self._config.l1, capacity="5000B")))
        assert ledger.used_bytes <= ledger.capacity_bytes == 5000, (ledger.used_bytes, pooled_bytes)
        await self._settled()
        assert storage.l1.pool_bytes <= 5000
"""
_PART_OF_AN_OLD_REVISION = """
        for path, content in (("config.json", b"{}"), ("a.safetensors", bytes(9000))):
            self._world.bucket.put(f"m0/{path}", content, vouched=False)
        attachment = await self.cache.attach("m0", source=f"{BUCKET}/m0", selection=Selection(files=("c*",)))
        holder = await self._follow("m0", attachment)
        self._world.bucket.put("m0/a.safetensors", random.Random(1).randbytes(9000), vouched=False)
        await self._pull("m0", Level.L1, wait=True)  # takes over what is mapped
        self.cache.set_budgets(replace(self._config, l1=replace(self._config.l1, capacity="1000B")))
        await self._settled()
        summary = next(each for each in self.cache.list_models() if each.name == "m0")
        assert summary.l1_bytes < 9000 and not self.checks.left_l1(), (summary, self.checks.left_l1())
        self.cache.open_descriptors(holder.token, list(holder.fds), Peer(1, 0, 0))
        self._let_go(attachment, holder)
        await self.cache.evict("m0", Level.L1)
        assert not self._world.blobs(self._world.l1)
"""
_FAILED_AT_ITS_END = """
        for path in ("config.json", "a.safetensors", "b.safetensors", "shared.safetensors"):
            self._world.bucket.put(f"m0/{path}", random.Random(path).randbytes(3000), vouched=True)
        attachment = await self.cache.attach("m0", source=f"{BUCKET}/m0")
        holder = await self._follow("m0", attachment)
        faults = self._world.faults  # its SHA-256 is begun only now
        faults.on, faults.left, faults.rate, faults.enabled = True, None, 1.0, {"mover_dies"}
        await self._clock.sleep(60.0)
        faults.on = False
        assert not self._parts.services.registry.models["m0"].manifests
        self._world.bucket.put("m1/a.safetensors", bytes(20000), vouched=True)
        self.cache.set_budgets(replace(self._config, l1=replace(self._config.l1, capacity="24KiB")))
        try:
            await self._pull("m1", Level.L1, wait=True)
        except NoRoomError:
            pass
        assert not self.checks.left_l1(), self.checks.left_l1()
        await self._pull("m0", Level.L1, wait=True)  # goes on with what the worker maps
        assert not self.checks.left_l1(), self.checks.left_l1()
        self._let_go(attachment, holder)
"""
_STOPPED_BEFORE_IT_WAS_RECORDED = """
        if self._world.lives == 1:
            for path in ("config.json", "a.safetensors", "b.safetensors", "shared.safetensors"):
                self._world.bucket.put(f"m0/{path}", random.Random(path).randbytes(9000), vouched=True)
            await self._follow("m0", await self.cache.attach("m0", source=f"{BUCKET}/m0"))
            self._world.fetched_bytes = self.served_bytes()
            assert not self._parts.services.registry.models["m0"].manifests
        else:
            [holder] = self._world.holders
            self._to_be_back = self._kept_for_workers()
            assert holder.revision in self._to_be_back
            faults = self._world.faults  # the pull cannot go on yet
            faults.on, faults.left, faults.rate, faults.enabled = True, None, 1.0, {"origin_5xx"}
            await self._take_up(holder)
            assert not holder.lost
            faults.on = False
            await self._pull("m0", Level.L1, wait=True)
            await self._settled()
            assert self._parts.services.registry.models["m0"].manifests
            assert not self.checks.left_l1() and self.served_bytes() == self._world.fetched_bytes
            await self._release()
"""
_STOPPED_AND_THEN_PULLED_TO_L2 = """
        if self._world.lives == 1:
            for path in ("config.json", "a.safetensors", "b.safetensors", "shared.safetensors"):
                self._world.bucket.put(f"m0/{path}", random.Random(path).randbytes(9000), vouched=True)
            await self._follow("m0", await self.cache.attach("m0", source=f"{BUCKET}/m0"))
            assert not self._parts.services.registry.models["m0"].manifests
            self.resume_after(10.0)  # as where much has to be confirmed first
        else:
            [holder] = self._world.holders
            self._to_be_back = self._kept_for_workers()
            assert holder.revision in self._to_be_back
            Recovery.resume = self._world.resume
            await self._pull("m0", Level.L2, wait=True)  # whose end is recorded
            await self._take_up(holder)
            assert not holder.lost
            await self._settled()
            assert not self.checks.left_l1(), self.checks.left_l1()
            await self._release()
"""


@pytest.mark.parametrize(
    ("script", "lives"),
    [
        pytest.param(_EMPTY_PART, 1, id="a part of an empty file, then the whole"),
        pytest.param(_TWO_COPIES_TO_L2, 1, id="a load to L2 of what is just copied there from L1"),
        pytest.param(_STOPPED_AT_ONCE, 3, id="stopped while what is in L1 alone is confirmed"),
        pytest.param(_NO_MOVER_STARTS, 3, id="no mover starts to confirm what is in L1 alone"),
        pytest.param(
            _ANOTHER_COULD_NOT_CONFIRM_IT, 2, id="confirmed, and then not by another load that was planned before"
        ),
        pytest.param(_DAMAGED_AND_BROUGHT_AGAIN, 1, id="damaged in L1, and brought again by another model"),
        pytest.param(_TWO_REVISIONS_OF_ONE_CONTENT, 1, id="two revisions of one content, evicted"),
        pytest.param(_FORGOTTEN_BUT_SHARED, 1, id="a model is forgotten whose files another has, too"),
        pytest.param(_COLD_AND_HELD, 2, id="a cold model that is held over a restart"),
        pytest.param(_SYNC_FAILS_ONCE, 1, id="a failed sync of a pull to L2, another try, a power cut"),
        pytest.param(_NOTICE_WHILE_IT_ARRIVES, 1, id="a notice of damage while a load arrives"),
        pytest.param(_POOL_ABOVE_A_SMALLER_BUDGET, 1, id="a pool, and a budget that is smaller"),
        pytest.param(_PART_OF_AN_OLD_REVISION, 1, id="a part of an old revision that a new one takes over"),
        pytest.param(_STOPPED_BEFORE_IT_WAS_RECORDED, 2, id="stopped after the worker had all, before it was recorded"),
        pytest.param(_STOPPED_AND_THEN_PULLED_TO_L2, 2, id="stopped before it was recorded, then pulled to L2 alone"),
        pytest.param(_FAILED_AT_ITS_END, 1, id="a load that fails after its workers had all of it"),
    ],
)
def test_found(script, lives):
    told = run("-c", _LIFE.format(script=script, lives=lives))
    assert "all well" in told, told
