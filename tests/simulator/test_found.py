"""What histories found, each as a short life of its own that does not depend on what a seed means."""

from __future__ import annotations

import pytest

from tests.simulator.test_simulator import run

_LIFE = """
import os
import tests.simulator.scale
import asyncio, gc, random
from pathlib import Path
from cached.types import Level, Selection
from tests.simulator import history
from tests.simulator.origin import BUCKET
gc.disable()

class Scripted(history.Life):
    def __init__(self, world, config, loop, *others, **options):
        loop.kill_at = None
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

    def served_bytes(self):
        return sum(self._world.bucket.served_bytes.values())

history.Life = Scripted
for seed in range(1, 16):
    folder = Path(f"/dev/shm/cached-simulator-{{os.getpid()}}") / str(seed)
    made = history.History(seed, folder, unbounded=False)
    made._lives = {lives}
    made.run()
print("all well", flush=True)
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


@pytest.mark.parametrize(
    ("script", "lives"),
    [
        pytest.param(_EMPTY_PART, 1, id="a part of an empty file, then the whole"),
        pytest.param(_TWO_COPIES_TO_L2, 1, id="a load to L2 of what is just copied there from L1"),
        pytest.param(_STOPPED_AT_ONCE, 3, id="stopped while what is in L1 alone is confirmed"),
        pytest.param(_NO_MOVER_STARTS, 3, id="no mover starts to confirm what is in L1 alone"),
    ],
)
def test_found(script, lives):
    assert "all well" in run("-c", _LIFE.format(script=script, lives=lives))
