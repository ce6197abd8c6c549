from __future__ import annotations

import math

from synco_fast.kernels.sizes import cdiv, next_power_of_2


def test_blocks_cover_all_and_none_is_empty():
    for count in range(1, 200):
        for size in range(1, 70):
            assert (cdiv(count, size) - 1) * size < count <= cdiv(count, size) * size


def test_powers_of_two():
    for count in (*range(1, 3000), 2**20 - 1, 2**20, 2**20 + 1):
        assert next_power_of_2(count) == 2 ** math.ceil(math.log2(count))
