"""Compare every layout of tests/dist/test_matrix.py with one process, as `evomesh doctor CONFIG` does.

    python benchmarks/parity_layouts.py --dtypes float64,bfloat16 --sample 30

Prints each layout that differs with the first tensor that does, and the largest
distance for each dtype.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict

from tests.dist.parity_jobs import compare_small
from tests.dist.test_matrix import ALL
from tests.support.pool import Pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", default="float64")
    parser.add_argument("--sample", type=int, default=len(ALL))
    arguments = parser.parse_args()
    layouts = [layout for layout in ALL if layout.ranks == 4]
    random.Random(0).shuffle(layouts)
    layouts = layouts[: arguments.sample]
    largest: dict[str, float] = defaultdict(float)
    equal: dict[str, int] = defaultdict(int)
    pool = Pool()
    for layout in layouts:
        for dtype in arguments.dtypes.split(","):
            found = pool.run(compare_small, layout, dtype)[0]
            largest[dtype] = max(largest[dtype], found["largest"])
            equal[dtype] += found["is_equal"]
            if not found["is_equal"]:
                print(f"{layout}: {found['text']}", flush=True)
    pool.close()
    for dtype, distance in largest.items():
        print(
            f"{dtype}: {equal[dtype]} of {len(layouts)} layouts agree, at most {distance:.1e} apart"
        )


if __name__ == "__main__":
    main()
