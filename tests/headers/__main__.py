"""``python -m tests.headers --seed 1 --count 100000``: fuzzes the header parser beside the reference library.

A header that we and the reference disagree on is printed with its own seed; ``--seed THAT --count 1 --show`` makes it
again. The last line is JSON for programs: how many there were of each outcome, and how much memory grew.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections import Counter

from tests.headers.fuzz import header_file
from tests.headers.judge import DisagreementError, judge

_WARM_UP = 500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the first header; the next have the numbers after it")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--show", action="store_true", help="print each header")
    options = parser.parse_args()
    print(f"headers of the seeds {options.seed} to {options.seed + options.count - 1}", flush=True)
    outcomes: Counter[str] = Counter()
    failed: list[int] = []
    before_kib = 0
    for number in range(options.count):
        if number == _WARM_UP:
            before_kib = _peak_kib()
        content = header_file(options.seed + number)
        if options.show:
            print(options.seed + number, content)
        try:
            outcomes[judge(content)] += 1
        except Exception as error:
            failed.append(options.seed + number)
            kind = "" if isinstance(error, DisagreementError) else f"{type(error).__name__}: "
            print(f"seed {options.seed + number}: {kind}{error}\n  {content[:400]!r}", flush=True)
    grown_kib = _peak_kib() - before_kib if before_kib else 0
    print(json.dumps({"outcomes": dict(outcomes.most_common()), "failed": failed, "grown_kib": grown_kib}))
    return 1 if failed else 0


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
