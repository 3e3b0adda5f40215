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
    async def live(self):
        await self.cache.start()
        self._world.faults.on = False
{script}
        await self._settled()
        self.checks.at_rest()
        await self.cache.close()

history.Life = Scripted
for seed in range(1, 16):
    folder = Path(f"/dev/shm/cached-simulator-{{os.getpid()}}") / str(seed)
    made = history.History(seed, folder, unbounded=False)
    made._lives = 1
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


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(_EMPTY_PART, id="a part of an empty file, then the whole"),
        pytest.param(_TWO_COPIES_TO_L2, id="a load to L2 of what is just copied there from L1"),
    ],
)
def test_found(script):
    assert "all well" in run("-c", _LIFE.format(script=script))
