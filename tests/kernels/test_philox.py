from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gose_kernels import philox

ROOT = Path(__file__).parents[2]
LOW32 = 0xFFFFFFFF

# (seed, step) -> the first lanes: pinned, because wire formats and checkpoints depend on them.
GOLDEN = {
    (0, 0): [17624, 61878, 4656, 63708, 51321, 49454, 25616, 25380, 60406, 52429],
    (1, 0): [40681, 27172, 64024, 56657, 57654, 36689, 60203, 39595, 35522, 61832],
    (0, 1): [28910, 60974, 58326, 29773, 57469, 60272, 51855, 38482, 48954, 59791],
    (42, 7): [11052, 54438, 12182, 56996, 45233, 21014, 15562, 64172, 54817, 56632],
    (-1, 3): [53851, 29490, 55920, 1297, 20743, 37081, 1701, 23197, 38522, 2814],
    (2**63 - 1, -5): [36311, 46484, 64513, 14930, 354, 11929, 33208, 27035, 49614, 42426],
}


def philox_oracle(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox-4x32-10 in plain integers."""
    k0, k1 = key
    x = [counter & LOW32, counter >> 32, 0, 0]
    for _ in range(10):
        product0, product1 = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        high0, high1 = product0 >> 32, product1 >> 32
        x = [high1 ^ x[1] ^ k0, product1 & LOW32, high0 ^ x[3] ^ k1, product0 & LOW32]
        k0, k1 = (k0 + 0x9E3779B9) & LOW32, (k1 + 0xBB67AE85) & LOW32
    return x


def lane_oracle(i: int, seed: int, step: int) -> int:
    word = philox_oracle(i // 8, philox.key(seed, step))[i % 8 // 2]
    return word >> 16 if i % 2 else word & 0xFFFF


def test_splitmix64_gives_the_published_sequence():
    # Outputs of the reference generator for seed 1234567, which adds the gamma before each.
    outputs = [philox.splitmix64(1234567 + n * 0x9E3779B97F4A7C15) for n in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_philox_gives_the_known_answer_of_random123():
    got = philox.philox(torch.tensor([0]), (0, 0))
    assert [int(w) for w in got] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@settings(deadline=None)
@given(
    st.integers(0, 2**63 - 1),
    st.tuples(st.integers(0, LOW32), st.integers(0, LOW32)),
)
def test_philox_equals_plain_integers_for_any_counter_and_key(counter, key):
    got = philox.philox(torch.tensor([counter]), key)
    assert [int(w) for w in got] == philox_oracle(counter, key)


@pytest.mark.parametrize(("seed", "step"), GOLDEN)
def test_golden_lanes(seed, step):
    assert philox.lanes(10, seed, step).tolist() == GOLDEN[seed, step]


@settings(deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1), st.integers(0, 40))
def test_lanes_equal_plain_integers_and_do_not_depend_on_their_number(seed, step, num_lanes):
    expected = [lane_oracle(i, seed, step) for i in range(num_lanes)]
    assert philox.lanes(num_lanes, seed, step).tolist() == expected


def test_draws_are_exact_centres_of_65536_steps():
    u = philox.uniform(1000, 3, 4)
    assert u.dtype == torch.float32
    assert torch.equal(u.double(), (philox.lanes(1000, 3, 4).double() + 0.5) / 65536)
    assert float(u.min()) > 0
    assert float(u.max()) < 1


def test_draws_are_uniform_and_independent_of_step():
    num_draws = 200_000
    first, second = philox.uniform(num_draws, 1, 0), philox.uniform(num_draws, 1, 1)
    counts = torch.histc(first, bins=64, min=0, max=1)
    expected = num_draws / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 120  # 63 degrees of freedom: probability above is 2e-5
    correlation = float(torch.corrcoef(torch.stack((first, second)))[0, 1])
    assert abs(correlation) < 5 / num_draws**0.5


def test_the_header_for_host_and_device_gives_the_same_lanes(tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    source = tmp_path / "lanes.cpp"
    source.write_text(
        """
        #include <cstdio>
        #include <cstdlib>
        #include "philox.h"
        int main(int, char** argv) {  // seed step first_element
          const gose::PhiloxKey key = gose::philox_key(atoll(argv[1]), atoll(argv[2]));
          const long long first = atoll(argv[3]);
          for (long long i = first; i < first + 20; ++i) {
            const auto lane = gose::philox_lane(gose::philox(key, uint64_t(i) / 8), i % 8);
            printf("%u %.17g\\n", lane, gose::philox_uniform(lane));
          }
        }
        """
    )
    program = tmp_path / "lanes"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    for seed, step in GOLDEN:
        for first in (0, 5, 8 * 2**32 - 7):
            args = [str(program), str(seed), str(step), str(first)]
            lines = subprocess.run(args, capture_output=True, text=True, check=True).stdout
            got = [(int(a), float(b)) for a, b in map(str.split, lines.splitlines())]
            lanes = [lane_oracle(i, seed, step) for i in range(first, first + 20)]
            assert got == [(lane, (lane + 0.5) / 65536) for lane in lanes]
