"""The machine of `tests/support/ptx_machine` on hand-written PTX: values, and every fault that it must notice."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.support.ptx_machine import Fault, machine
from tests.support.ptx_machine.memory import GlobalMemory

#: Addresses of the thread's own word in shared memory and in both tensors.
HEAD = """
    mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.b32 %r3, smem; add.s32 %r4, %r3, %r2;
    ld.param.b64 %rd1, [k_param_0]; ld.param.b64 %rd2, [k_param_1]; cvt.u64.u32 %rd3, %r2;
    add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
"""


def run(body, *tensors, threads=64, shared=4096, grid=(1,), unwritten=(), most=10_000, error=0):
    """Run instructions after `HEAD` with two tensors, which are x and y of 32-bit numbers by default."""
    given = tensors or (torch.arange(threads, dtype=torch.int32), torch.zeros(threads, dtype=torch.int32))
    memory = GlobalMemory()
    for number in unwritten:
        memory.register(given[number], written=False)
    memory.begin()
    text = f""".version 8.8
    .target sm_90a
    .address_size 64
    .extern .shared .align 16 .b8 smem[];
    .visible .entry k(.param .u64 .ptr .global .align 1 k_param_0, .param .u64 .ptr .global .align 1 k_param_1)
    .reqntid {threads}
    {{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .b64 %rd<9>;
    {HEAD} {body} ret;
    }}"""
    pointers = {f"k_param_{number}": memory.pointer(tensor) for number, tensor in enumerate(given)}
    machine.run(text, grid, pointers, memory=memory, shared=shared, most=most, error=error)
    return given[1]


def test_threads_diverge_and_meet_again():
    found = run("""
        mov.b32 %r5, 0; mov.b32 %r6, 0;
        $L_loop: setp.ge.u32 %p1, %r6, %r1; @%p1 bra $L_done;
        add.s32 %r5, %r5, %r6; add.s32 %r6, %r6, 1; bra.uni $L_loop;
        $L_done: shfl.sync.bfly.b32 %r7, %r5, 1, 31, -1; st.global.b32 [%rd5], %r7;
    """)
    number = np.arange(64) ^ 1
    assert np.array_equal(found.numpy(), number * (number - 1) // 2)


def test_a_shuffle_that_a_part_of_the_warp_reaches_is_a_deadlock():
    body = "setp.eq.s32 %p1, %r1, 5; @%p1 bra $L_end; shfl.sync.idx.b32 %r7, %r1, 0, 31, -1; $L_end: bar.sync 0;"
    with pytest.raises(Fault, match="deadlock"):
        run(body)


def test_a_barrier_that_a_warp_skips_is_a_deadlock_unless_the_warp_has_ended():
    run("setp.ge.s32 %p1, %r1, 32; @%p1 ret; bar.sync 0;")
    with pytest.raises(Fault, match="deadlock"):
        run("setp.eq.s32 %p1, %r1, 40; @%p1 bra $L_end; bar.sync 0; $L_end: bar.sync 0;")


def test_an_endless_loop_ends():
    with pytest.raises(Fault, match="endless"):
        run("$L_loop: bra.uni $L_loop;")


#: Each exchanges words between threads through shared memory: what stands between the store and the load, and whose
#: word a thread loads.
EXCHANGE = (
    "st.shared.b32 [%r4], %r1; {between} xor.b32 %r5, %r2, {other}; add.s32 %r6, %r3, %r5; ld.shared.b32 %r7, [%r6];"
)


@pytest.mark.parametrize(
    ("between", "other", "race"),
    [
        ("", 0, False),
        ("", 4, True),
        ("", 128, True),
        ("bar.warp.sync -1;", 4, False),
        ("bar.warp.sync -1;", 128, True),
        ("bar.sync 0;", 128, False),
    ],
)
def test_reading_what_another_thread_wrote_needs_a_barrier(between, other, race):
    body = EXCHANGE.format(between=between, other=other) + "st.global.b32 [%rd5], %r7;"
    if race:
        with pytest.raises(Fault, match="race in shared memory: reads what thread"):
            run(body)
    else:
        assert np.array_equal(run(body).numpy(), np.arange(64) ^ (other // 4))


@pytest.mark.parametrize("between", ["", "bar.warp.sync -1;", "bar.sync 0;"])
def test_writing_what_another_warp_has_read_needs_a_barrier(between):
    body = EXCHANGE.format(between="bar.sync 0;", other=128) + between + "st.shared.b32 [%r4], %r7;"
    if between == "bar.sync 0;":
        run(body)
    else:
        with pytest.raises(Fault, match="race: writes shared bytes that another warp has read"):
            run(body)


@pytest.mark.parametrize("between", ["", "bar.warp.sync -1;", "bar.sync 0;"])
def test_writing_what_another_lane_has_read_needs_a_barrier(between):
    run(EXCHANGE.format(between="", other=0) + "add.s32 %r7, %r7, 1; st.shared.b32 [%r4], %r7;")
    body = EXCHANGE.format(between="bar.warp.sync -1;", other=4) + between + "st.shared.b32 [%r4], %r7;"
    if between:
        run(body)
    else:
        with pytest.raises(Fault, match="race: writes shared bytes that another lane has read"):
            run(body)


def test_two_threads_may_store_the_same_at_one_place_but_nothing_else():
    run("st.shared.b32 [%r3], 7; st.global.b32 [%rd2], 7;")
    with pytest.raises(Fault, match="two threads of one instruction"):
        run("st.shared.b32 [%r3], %r1;")
    with pytest.raises(Fault, match="writes what another thread writes"):
        run("st.global.b32 [%rd2], %r1;")
    with pytest.raises(Fault, match="race in shared memory: writes what thread"):
        run("st.shared.b32 [%r4], %r1; setp.eq.s32 %p1, %r1, 40; @%p1 st.shared.b32 [%r3], 9;")


def test_unwritten_bytes_are_not_read():
    with pytest.raises(Fault, match=r"nobody has written, CTA 1, thread 33\n.*line \d+: ld.shared"):
        run(
            "setp.lt.s32 %p1, %r1, 33; mov.u32 %r5, %ctaid.x; setp.eq.s32 %p2, %r5, 0; or.pred %p1, %p1, %p2;"
            "@%p1 st.shared.b32 [%r4], %r1; ld.shared.b32 %r7, [%r4];",
            grid=(2,),
        )
    body = "setp.ne.s32 %p1, %r1, 9; @%p1 st.global.b32 [%rd5], %r1; ld.global.b32 %r7, [%rd5];"
    run(body)
    with pytest.raises(Fault, match=r"reads unwritten bytes, CTA 0, thread 9\b"):
        run(body, unwritten=(1,))


def test_accesses_out_of_bounds_and_misaligned_ones():
    short = torch.zeros(63, dtype=torch.int32)
    with pytest.raises(Fault, match=r"out of bounds: 4 bytes at 252 of a storage of 252 .*thread 63\b"):
        run("ld.global.b32 %r7, [%rd5];", torch.zeros(64, dtype=torch.int32), short)
    part = torch.zeros(70, dtype=torch.int32)[3:67]
    run("st.global.b32 [%rd5], %r1;", part.clone(), part)
    with pytest.raises(Fault, match="out of bounds"):
        run("st.global.b32 [%rd5+4], %r1;", part.clone(), part)
    with pytest.raises(Fault, match="out of bounds"):
        run("st.global.b32 [%rd5+-4], %r1;", part.clone(), part)
    with pytest.raises(Fault, match="where no tensor is"):
        run("mov.b64 %rd5, 64; ld.global.b32 %r7, [%rd5];")
    with pytest.raises(Fault, match="misaligned access of 8 bytes"):
        run("setp.lt.s32 %p1, %r1, 2; @%p1 ld.global.v2.b32 {%r7, %r8}, [%rd5];")
    with pytest.raises(Fault, match="out of bounds of shared memory: 4 bytes at 128 of 128"):
        run("st.shared.b32 [%r4], %r1;", shared=128)
    with pytest.raises(Fault, match="misaligned access of 4 bytes to shared"):
        run("st.shared.b32 [%r4+2], %r1;")


def test_global_memory_between_threads_and_ctas():
    exchange = "st.global.b32 [%rd5], %r1; {} xor.b32 %r5, %r2, 128; cvt.u64.u32 %rd6, %r5; add.s64 %rd6, %rd2, %rd6;"
    load = " ld.global.b32 %r7, [%rd6];"
    run(exchange.format("bar.sync 0;") + load)
    with pytest.raises(Fault, match="reads what another thread writes"):
        run(exchange.format("") + load)
    with pytest.raises(Fault, match="reads what another thread writes"):
        run(exchange.format("bar.sync 0;") + load, grid=(2,))


def test_writing_to_global_memory_what_another_thread_has_read():
    load = "xor.b32 %r5, %r2, 128; cvt.u64.u32 %rd6, %r5; add.s64 %rd6, %rd1, %rd6; ld.global.b32 %r7, [%rd6];"
    store = "st.global.b32 [%rd4], 99;"
    run(load + "bar.sync 0;" + store)
    run("ld.global.b32 %r7, [%rd4];" + store)
    every = "ld.global.b32 %r7, [%rd1];"
    run(every + "bar.sync 0;" + store)
    for read, grid in ((load, (1,)), (every, (1,)), (load + "bar.sync 0;", (2,)), (every + "bar.sync 0;", (2,))):
        with pytest.raises(Fault, match="writes what another thread reads"):
            run(read + store, grid=grid)


COPY = "cp.async.ca.shared.global [ %r4 + 0 ], [ %rd4 + 0 ], 0x4; cp.async.commit_group;"


@pytest.mark.parametrize(
    ("after", "fault"),
    [
        ("cp.async.wait_group 0;", None),
        ("cp.async.wait_group 1;", "has not brought yet"),
        ("", "has not brought yet"),
        ("bar.sync 0;", "has not brought yet"),
    ],
)
def test_an_asynchronous_copy_arrives_at_its_wait(after, fault):
    body = COPY + after + "ld.shared.b32 %r7, [%r4]; st.global.b32 [%rd5], %r7;"
    if fault:
        with pytest.raises(Fault, match=fault):
            run(body)
    else:
        assert np.array_equal(run(body).numpy(), np.arange(64))


def test_what_a_copy_brought_is_for_others_after_a_barrier_only():
    other = "xor.b32 %r5, %r2, 128; add.s32 %r6, %r3, %r5; ld.shared.b32 %r7, [%r6];"
    run(COPY + "cp.async.wait_group 0; bar.sync 0;" + other)
    with pytest.raises(Fault, match="race in shared memory"):
        run(COPY + "cp.async.wait_group 0;" + other)
    with pytest.raises(Fault, match="has not brought yet"):
        run(COPY + "bar.sync 0; cp.async.wait_group 0;" + COPY + other)


def test_a_copy_does_not_overtake_a_reader():
    read = (
        "st.shared.b32 [%r4], %r1; bar.sync 0; xor.b32 %r5, %r2, 128; add.s32 %r6, %r3, %r5; ld.shared.b32 %r7, [%r6];"
    )
    run(read + "bar.sync 0;" + COPY)
    with pytest.raises(Fault, match="another warp has read"):
        run(read + COPY)
    with pytest.raises(Fault, match="on its way"):
        run(COPY + "st.shared.b32 [%r4], 1;")


def test_a_copy_of_no_bytes_fills_zeros():
    body = """
        setp.lt.s32 %p1, %r1, 5; selp.b32 %r8, 4, 0, %p1;
        cp.async.ca.shared.global [%r4], [%rd4], 0x4, %r8; cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.b32 %r7, [%r4]; st.global.b32 [%rd5], %r7;
    """
    found = run(body, torch.arange(1, 6, dtype=torch.int32), torch.zeros(64, dtype=torch.int32))
    assert found.tolist() == [1, 2, 3, 4, 5] + [0] * 59


def test_atomic_additions_in_shared_memory_do_not_race():
    found = run("""
        setp.lt.s32 %p1, %r1, 3; @%p1 st.shared.b32 [%r4], 100; bar.sync 0;
        rem.u32 %r5, %r1, 3; shl.b32 %r5, %r5, 2; add.s32 %r5, %r5, %r3; atom.relaxed.sys.shared.add.u32 %r6, [%r5], 2;
        st.global.b32 [%rd5], %r6; bar.sync 0; @%p1 ld.shared.b32 %r7, [%r4]; @%p1 st.global.b32 [%rd4], %r7;
    """)
    assert found.tolist() == [100 + 2 * (number // 3) for number in range(64)]
    with pytest.raises(Fault, match="race"):
        run("st.shared.b32 [%r4], 0; bar.sync 0; atom.shared.add.u32 %r6, [%r3], 2; ld.shared.b32 %r7, [%r4];")


def test_atomic_additions_in_global_memory_do_not_race():
    found = run("red.global.add.u32 [%rd2], 3; atom.global.gpu.relaxed.add.u32 %r7, [%rd2+4], 1;", grid=(2,))
    assert found[:3].tolist() == [3 * 128, 128, 0]
    for other in ("ld.global.b32 %r7, [%rd2];", "st.global.b32 [%rd2], 1;"):
        with pytest.raises(Fault, match="another thread"):
            run("red.global.add.u32 [%rd2], 3;" + other)


@pytest.mark.parametrize(("mode", "by", "clamp"), [("up", 3, 0), ("down", 3, 31), ("bfly", 5, 31), ("idx", 7, 31)])
def test_shuffles(mode, by, clamp):
    found = run(
        f"shfl.sync.{mode}.b32 %r7|%p1, %r1, {by}, {clamp}, -1; @!%p1 mov.b32 %r7, 99; st.global.b32 [%rd5], %r7;"
    )
    lane = np.arange(32)
    other = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": np.full(32, by)}[mode]
    expected = np.where((other >= 0) & (other < 32), other, 99)
    assert found[:32].tolist() == expected.tolist()
    assert found[32:].tolist() == np.where(expected == 99, 99, expected + 32).tolist()


#: Instructions of two words a and b, and what they give for numbers that show every case.
WORDS = {
    "min.s32 %r7, %r5, %r6": lambda a, b: np.minimum(a.view(np.int32), b.view(np.int32)),
    "max.u32 %r7, %r5, %r6": np.maximum,
    "mul.hi.u32 %r7, %r5, %r6": lambda a, b: a.astype(np.uint64) * b >> np.uint64(32),
    "shl.b32 %r7, %r5, %r6": lambda a, b: np.where(b < 32, a << (b & np.uint32(31)), 0),
    "shr.s32 %r7, %r5, %r6": lambda a, b: a.view(np.int32) >> np.minimum(b, 31).astype(np.int32),
    "shf.l.wrap.b32 %r7, %r5, %r6, 8": lambda a, b: b << np.uint32(8) | a >> np.uint32(24),
    "prmt.b32 %r7, %r5, %r6, 0x5410": lambda a, b: a & np.uint32(0xFFFF) | b << np.uint32(16),
    "prmt.b32 %r7, %r5, %r6, 0x7773": lambda a, b: a >> np.uint32(24) | (b >> np.uint32(24)) * np.uint32(0x01010100),
    "lop3.b32 %r7, %r5, %r6, 255, 0x6A": lambda a, b: np.uint32(255) ^ (a & b),
    "bfe.u32 %r7, %r5, 3, 2": lambda a, b: a >> np.uint32(3) & np.uint32(3),
    "bfe.s32 %r7, %r5, 3, 2": lambda a, b: (a << np.uint32(27)).view(np.int32) >> 30,
    "bfi.b32 %r7, %r5, %r6, 8, 4": lambda a, b: b & ~np.uint32(0xF00) | (a & np.uint32(15)) << np.uint32(8),
    "popc.b32 %r7, %r5": lambda a, b: np.bitwise_count(a),
    "clz.b32 %r7, %r5": lambda a, b: np.array([32 - int(one).bit_length() for one in a]),
    "brev.b32 %r7, %r5": lambda a, b: np.array([int(f"{one:032b}"[::-1], 2) for one in a]),
    "cvt.s32.s8 %r7, %r5": lambda a, b: a.astype(np.uint8).view(np.int8),
    "cvt.rn.f32.s32 %r7, %r5": lambda a, b: a.view(np.int32).astype(np.float32).view(np.uint32),
}


@pytest.mark.parametrize("instruction", WORDS)
def test_instructions_on_words(instruction):
    numbers = [0, 1, 2, 31, 32, 0x7F, 0x80, 0xFF, 0x12345678, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
    a, b = (np.array(one, np.uint32) for one in zip(*product(numbers, numbers), strict=True))
    pad = -len(a) % 32
    a, b = np.pad(a, (0, pad)), np.pad(b, (0, pad))
    given = torch.from_numpy(a.view(np.int32).copy()), torch.from_numpy(b.view(np.int32).copy())
    body = f"ld.global.b32 %r5, [%rd4]; ld.global.b32 %r6, [%rd5]; {instruction}; st.global.b32 [%rd5], %r7;"
    found = run(body, *given, threads=len(a)).numpy().view(np.uint32)
    expected = WORDS[instruction](a, b)
    assert np.array_equal(found, np.asarray(expected).astype(np.int64).astype(np.uint32))


NUMBERS = [0.0, -0.0, 1.0, -1.5, 3e-39, 2.5, 65519.0, 65520.0, np.inf, -np.inf, np.nan, 1 + 2.0**-9, 1 + 2.0**-8]


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("max.f32 %r7, %r5, %r6", lambda a, b: np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.maximum(a, b)))),
        ("min.NaN.f32 %r7, %r5, %r6", np.minimum),
        ("div.full.f32 %r7, %r5, %r6", np.divide),
        ("fma.rn.f32 %r7, %r5, %r6, %r5", lambda a, b: (a.astype(np.float64) * b + a)),
        ("add.f32 %r7, %r5, %r6", np.add),
        ("ex2.approx.ftz.f32 %r7, %r5", lambda a, b: np.exp2(np.where(abs(a) < 2.0**-126, 0, a).astype(np.float64))),
        ("cvt.rn.bf16.f32 %rs1, %r5; cvt.f32.bf16 %r7, %rs1",
         lambda a, b: torch.from_numpy(a).bfloat16().float().numpy()),
        ("cvt.rn.f16x2.f32 %r8, %r6, %r5; mov.b32 {%rs1, %rs2}, %r8; cvt.f32.f16 %r7, %rs2",
         lambda a, b: b.astype(np.float16)),
        ("setp.gtu.f32 %p1, %r5, %r6; selp.f32 %r7, 0f3F800000, 0f00000000, %p1", lambda a, b: ~(a <= b)),
        ("cvt.rn.f16x2.f32 %r5, %r6, %r5; setp.lt.f16x2 %p1|%p2, %r5, 0x3E003E00; selp.f32 %r7, 1.0, 0.0, %p1;"
         "@%p2 add.f32 %r7, %r7, 0f40000000", lambda a, b: (a < 1.5) + 2.0 * (b < 1.5)),
        ("setp.num.f32 %p1, %r5, %r6; selp.f32 %r7, 0f3F800000, 0f00000000, %p1", lambda a, b: (a == a) & (b == b)),
        ("setp.ne.f32 %p1, %r5, %r6; selp.f32 %r7, 0f3F800000, 0f00000000, %p1",
         lambda a, b: (a != b) & (a == a) & (b == b)),
    ],
)  # fmt: skip
def test_instructions_on_floats(instruction, expected):
    a, b = (np.array(one, np.float32) for one in zip(*product(NUMBERS, NUMBERS), strict=True))
    pad = -len(a) % 32
    a, b = np.pad(a, (0, pad)), np.pad(b, (0, pad))
    body = f"ld.global.b32 %r5, [%rd4]; ld.global.b32 %r6, [%rd5]; {instruction}; st.global.b32 [%rd5], %r7;"
    found = run(body, torch.from_numpy(a), torch.from_numpy(b.copy()), threads=len(a)).numpy()
    with np.errstate(all="ignore"):
        wanted = np.asarray(expected(a, b)).astype(np.float32)
    assert np.array_equal(found, wanted, equal_nan=True)


def test_the_product_of_a_fused_addition_is_not_rounded():
    a, c = np.float32(1 + 2.0**-12), np.float32(2.0**-60)
    # The exact sum lies 2^-60 above the middle between two float32 numbers.
    words = [hex(int(np.float32(x).view(np.uint32)))[2:].zfill(8) for x in (a, c)]
    found = run(f"fma.rn.f32 %r7, 0f{words[0]}, 0f{words[0]}, 0f{words[1]}; st.global.b32 [%rd5], %r7;")
    assert found.view(torch.float32)[0].item() == 1 + 2.0**-11 + 2.0**-23


@pytest.mark.parametrize(
    ("name", "x", "exact", "allowed"),
    [
        ("ex2", 3.25, 2**3.25, 2**-22 * 2**3.25),
        ("lg2", 1.25, np.log2(1.25), 2**-22),
        ("lg2", 16.0, 4.0, 2**-20),
        ("sin", 3.0, np.sin(3.0), 2**-20.5),
        ("cos", 3.0, np.cos(3.0), 2**-20.5),
        ("rsqrt", 4.0, 0.5, 2**-23.9),
    ],
)
def test_approximate_instructions_are_off_by_what_is_allowed(name, x, exact, allowed):
    word = hex(int(np.float32(x).view(np.uint32)))[2:].zfill(8)
    body = f"{name}.approx.ftz.f32 %r7, 0f{word}; st.global.b32 [%rd5], %r7;"
    for error in (-1, 0, 1):
        found = run(body, error=error).view(torch.float32)[0].item()
        assert found == np.float32(exact + error * allowed)


def test_there_is_one_nan():
    body = "add.f32 %r7, 0fFFC12345, 0f3F800000; setp.ne.b32 %p1, %r7, 0x7FFFFFFF; @%p1 trap;"
    run(body + "mov.b32 %r8, 0fFFC12345; setp.ne.b32 %p1, %r8, 0xFFC12345; @%p1 trap;")


def words_of(values, kind):
    """A matrix as words of 32 bits, row by row."""
    if kind == "tf32":
        return values.float().contiguous().view(torch.int32).numpy()
    return values.to({"bf16": torch.bfloat16, "f16": torch.float16}[kind]).contiguous().view(torch.int32).numpy()


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_products_on_tensor_cores(kind):
    """Fragments are laid out here by the figures of the PTX ISA, element by element."""
    depth = 8 if kind == "tf32" else 16
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-8, 9, shape, generator=generator) / 8.0 for shape in ((16, depth), (8, depth)))
    one, other = words_of(left, kind), words_of(right, kind)
    lane = np.arange(32)
    group, within = lane // 4, lane % 4
    half = 4
    registers = [one[group, within], one[group + 8, within], one[group, within + half], one[group + 8, within + half]]
    registers += [other[group, within], other[group, within + half]]
    given = torch.from_numpy(np.stack(registers, axis=1).reshape(-1).astype(np.int32))
    opcode = "m16n8k8.row.col.f32.tf32.tf32.f32" if kind == "tf32" else f"m16n8k16.row.col.f32.{kind}.{kind}.f32"
    loads = " ".join(f"ld.global.b32 %r1{n}, [%rd6+{4 * n}];" for n in range(6))
    body = f"""
        mul.wide.u32 %rd6, %r1, 24; add.s64 %rd6, %rd6, %rd1; {loads}
        cvt.rn.f32.s32 %r20, %r1;
        mma.sync.aligned.{opcode} {{ %r30, %r31, %r32, %r33 }}, {{ %r10, %r11, %r12, %r13 }}, {{ %r14, %r15 }},
            {{ %r20, %r20, %r20, %r20 }};
        mul.wide.u32 %rd6, %r1, 16; add.s64 %rd6, %rd6, %rd2; st.global.v4.b32 [%rd6], {{ %r30, %r31, %r32, %r33 }};
    """
    found = run(body, given, torch.zeros(128), threads=32).view(32, 4).numpy()
    result = np.zeros((16, 8))
    for number in range(4):
        result[group + 8 * (number // 2), 2 * within + number % 2] = found[:, number] - lane
    assert np.array_equal(result, (left @ right.T).numpy())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_in_shared_memory(count, transposed):
    words = [f"%r{10 + number}" for number in range(count)]
    trans = ".trans" * transposed
    shape = f"sync.aligned.m8n8.x{count}{trans}.shared.b16"
    given = torch.arange(128, dtype=torch.int32) * 0x20002 + 0x10000
    body = f"""
        ld.global.b32 %r7, [%rd4]; st.shared.b32 [%r4], %r7; bar.sync 0;
        setp.ge.u32 %p1, %r1, 32; @%p1 ret;
        shl.b32 %r5, %r1, 4; add.s32 %r5, %r5, %r3; ldmatrix.{shape} {{{", ".join(words)}}}, [%r5];
        bar.warp.sync -1; stmatrix.{shape} [%r5+1024], {{{", ".join(words)}}}; bar.warp.sync -1;
        mul.wide.u32 %rd6, %r1, {4 * count}; add.s64 %rd6, %rd6, %rd2;
        {" ".join(f"st.global.b32 [%rd6+{4 * number}], {word};" for number, word in enumerate(words))}
        ld.shared.b32 %r8, [%r4+1024]; setp.ne.s32 %p2, %r8, %r7; @%p2 trap;
    """
    found = run(body, given, torch.zeros(32 * count, dtype=torch.int32), threads=128, shared=2048)
    matrices = given.view(torch.int16).view(-1, 8, 8)[:count]
    expected = matrices.transpose(1, 2) if transposed else matrices
    got = found.view(torch.int16).view(32, count, 2).transpose(0, 1).reshape(count, 8, 8)
    assert torch.equal(got, expected)


def test_reductions_and_votes():
    found = run("redux.sync.max.s32 %r7, %r1, -1; setp.eq.s32 %p1, %r1, 3; vote.sync.ballot.b32 %r8, %p1, -1;"
                "add.s32 %r7, %r7, %r8; st.global.b32 [%rd5], %r7;")  # fmt: skip
    assert found.tolist() == [31 + 8] * 32 + [63] * 32


def test_inline_assembly_has_registers_of_its_own():
    found = run("""
        mov.b32 %r5, 7;
        { .reg .pred kept; .reg .b32 %r5; mov.b32 %r5, 3; setp.lt.s32 kept, %r1, 2; @kept st.global.b32 [%rd5], %r5; }
        @!%p1 st.global.b32 [%rd4], %r5;
    """)
    assert found.tolist() == [3, 3] + [0] * 62


def test_what_is_not_known_says_so():
    for text in (
        "tcgen05.alloc.sync [%r4], 32;",
        "bar.sync 1, 32;",
        "ld.local.b32 %r7, [%r4];",
        "mov.u32 %r7, %clock;",
    ):
        with pytest.raises(NotImplementedError, match=re.escape(text.split(",")[-1].strip(" ;").split()[-1])):
            run(text)


#: Each copies a word of 128 threads into shared memory.
LINES = 32
FILL = " ".join(f"ld.global.b32 %r7, [%rd4+{512 * n}]; st.shared.b32 [%r4+{512 * n}], %r7;" for n in range(LINES))
ACCUMULATORS = "{" + ", ".join(f"%r{40 + number}" for number in range(16)) + "}"
ZEROS = " ".join(f"mov.b32 %r{40 + number}, 0;" for number in range(16))
ASYNC = FILL + ZEROS + "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
DONE = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
RESULT = """
    mul.wide.u32 %rd6, %r1, 64; add.s64 %rd6, %rd6, %rd2;
""" + " ".join(f"st.global.b32 [%rd6+{4 * number}], %r{40 + number};" for number in range(16))  # fmt: skip


def placed(values, begin, row_bytes, turned, leading, stride):
    """Bytes and descriptor of a matrix (rows, depth of 16) of 16-bit numbers, element by element.

    ``row_bytes`` is that of the swizzle, 0 for none; ``turned`` has consecutive rows next to each other.
    """
    room = np.zeros(LINES * 256, np.int16)
    for (row, depth), value in np.ndenumerate(values.view(torch.int16).numpy()):
        across, along = (depth, row) if turned else (row, depth)
        # Eight lines of a pattern, each of row_bytes of consecutive numbers.
        per_line = (row_bytes or 16) // 2
        line, pattern = divmod(along, per_line)[::-1], across // 8
        place = begin + across % 8 * 2 * per_line + line[0] * 2
        if row_bytes:
            place += pattern * stride + line[1] * leading
        else:
            place += pattern * (leading if turned else stride) + line[1] * (stride if turned else leading)
        address = place + 1024
        address ^= (address >> 7 & {0: 0, 32: 1, 64: 3, 128: 7}[row_bytes]) << 4
        room[(address - 1024) // 2] = value
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[row_bytes]
    return room, (begin + 1024) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def factors(kind="bf16"):
    generator = torch.Generator().manual_seed(1)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    return [(torch.randint(-8, 9, (rows, 16), generator=generator) / 8).to(dtype) for rows in (64, 32)]


def result_of(found):
    """The (64, 32) product from what each thread stored."""
    got = found.view(128, 16).numpy()
    thread = np.arange(128)
    result = np.zeros((64, 32), np.float32)
    for number in range(16):
        row = thread // 32 * 16 + thread % 32 // 4 + 8 * (number // 2 % 2)
        result[row, number // 4 * 8 + thread % 4 * 2 + number % 2] = got[:, number]
    return result


def layout(rows, row_bytes, turned):
    """Strides of a matrix (leading, stride) without gaps, and its bytes."""
    along, across = (rows, 16) if turned else (16, rows)
    pattern = 8 * (row_bytes or 16)
    # Patterns that follow each other along the lines, then across them.
    repeats = -(-2 * along // (row_bytes or 16))
    leading, stride = pattern, pattern * repeats
    if turned and not row_bytes:
        leading, stride = stride, leading
    return (leading, stride), pattern * repeats * (across // 8)


@pytest.mark.parametrize("turned", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("row_bytes", [0, 32, 64, 128])
def test_products_of_four_warps(row_bytes, turned):
    left, right = factors()
    strides, size = layout(64, row_bytes, turned[0])
    begin = -(-size // 1024) * 1024
    rooms = [
        placed(left, 0, row_bytes, turned[0], *strides),
        placed(right, begin, row_bytes, turned[1], *layout(32, row_bytes, turned[1])[0]),
    ]
    x = torch.from_numpy(rooms[0][0] | rooms[1][0]).view(torch.int32)
    (_, one), (_, other) = rooms
    flags = f"0, 1, 1, {turned[0]}, {turned[1]}"
    body = f"""
        {ASYNC} mov.u64 %rd7, {one:#x}; mov.u64 %rd8, {other:#x};
        wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {ACCUMULATORS}, %rd7, %rd8, {flags};
        {DONE} {RESULT}
    """
    found = run(body, x, torch.zeros(2048), threads=128, shared=LINES * 512)
    assert np.array_equal(result_of(found), (left.double() @ right.double().T).float().numpy())


def in_registers(after, before="", kind="bf16"):
    """A product with its first factor in registers, all ones, twice into the same accumulators."""
    _, right = factors(kind)
    room, descriptor = placed(right, 0, 32, 0, 0, 256)
    one = {"bf16": 0x3F803F80, "f16": 0x3C003C00}[kind]
    product = f"wgmma.mma_async.sync.aligned.m64n32k16.f32.{kind}.{kind} {ACCUMULATORS}, {{%r8, %r8, %r8, %r8}}, %rd8,"
    body = f"""
        mov.b32 %r8, {one:#x}; {ASYNC} setp.eq.s32 %p1, %r3, %r3; mov.u64 %rd8, {descriptor:#x}; {before}
        {product} 0, 1, 1, 0; {product} %p1, 1, 1, 0; {after} {RESULT}
    """
    found = run(body, torch.from_numpy(room).view(torch.int32), torch.zeros(2048), threads=128, shared=LINES * 512)
    return result_of(found), np.broadcast_to(2 * right.float().sum(dim=1).numpy(), (64, 32))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_a_factor_in_registers(kind):
    found, expected = in_registers(DONE, kind=kind)
    assert np.array_equal(found, expected)


COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned {};"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("", "", "has not been waited for"),
        ("", COMMIT + WAIT.format(1), "has not been waited for"),
        ("", WAIT.format(0), "has not been waited for"),
        ("", COMMIT + "mov.b32 %r8, 0;" + WAIT.format(0), "has not been waited for"),
        ("", COMMIT + "st.shared.b32 [%r4], 0;" + WAIT.format(0), "a product reads"),
        ("", COMMIT + WAIT.format(0) + "xor.b32 %r5, %r4, 128; st.shared.b32 [%r5], 1;", "has read, without"),
        ("mov.b32 %r8, 0;", DONE, "changes its registers"),
        ("bar.sync 0; st.shared.b32 [%r4], 9; bar.sync 0; wgmma.fence.sync.aligned;", DONE, "no proxy fence"),
        ("st.shared.b32 [%r4], 9; fence.proxy.async; wgmma.fence.sync.aligned;", DONE, "race in shared memory"),
    ],
)
def test_products_are_waited_for_and_fenced(before, after, message):
    with pytest.raises(Fault, match=message):
        in_registers(after, before)


def test_what_an_asynchronous_copy_brought_needs_a_proxy_fence_too():
    copy = "bar.sync 0; cp.async.ca.shared.global [%r4], [%rd4], 0x4; cp.async.commit_group; cp.async.wait_group 0;"
    in_registers(DONE, copy + "bar.sync 0; fence.proxy.async.shared::cta; wgmma.fence.sync.aligned;")
    with pytest.raises(Fault, match="no proxy fence"):
        in_registers(DONE, copy + "bar.sync 0; wgmma.fence.sync.aligned;")


def test_a_proxy_fence_may_come_before_the_barrier_or_after_it():
    for between in ("bar.sync 0; fence.proxy.async.shared::cta;", "fence.proxy.async.shared::cta; bar.sync 0;"):
        in_registers(DONE, f"bar.sync 0; st.shared.b32 [%r4], 9; {between} wgmma.fence.sync.aligned;")
