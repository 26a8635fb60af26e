"""Times of the CUDA kernels beside cuBLAS, cublasLt, Triton and the read floor, under CUDA graphs.

Every launch of a graph reads other weights, more of them than the L2 cache holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tests.gpu.exact import random_weights
from tests.gpu.jobs import NO_GATE, TableJob
from tests.gpu.launch import TYPES, VARIANTS, Launcher, Linear

SHAPES = ((2560, 2560), (6912, 2560), (2560, 6912), (3840, 2560), (13824, 2560))
"""The products of BitNet b1.58 2B-4T, ``(N, K)``."""
PREFILL = (128, 512, 1024, 2048, 4096)
COLD_BYTES = 256 << 20
REPEATS = 5
LAYERS, HIDDEN, FFN, QKV = 30, 2560, 6912, 3840
LAYER = ("qkv", "o", "up", "down")


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """``work`` as a CUDA graph, after a warm-up.

    All is launched from one stream, as in a model: launches from another put the card in a state
    where kernels that overlap begin later (docs/performance.md).
    """
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def seconds(run: Callable[[], None], least: float = 0.01) -> float:
    """Median time of one call, over calls that take ``least`` seconds together."""
    run()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(count: int) -> float:
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    count = max(1, int(least / once(1)))
    return statistics.median(once(count) for _ in range(REPEATS))


def buffers(size: int) -> int:
    """How many weights of ``size`` bytes are more than the cache holds."""
    return max(2, min(256, COLD_BYTES // size))


Timer = Callable[[], float]
"""Seconds of one launch, measured anew at each call."""


def rotated(launch: Sequence[Callable[[], None]]) -> Timer:
    """Times one launch of a graph of all."""

    def work() -> None:
        for one in launch:
            one()

    run = captured(work)
    return lambda: seconds(run) / len(launch)


def attempt(prepare: Callable[[], Timer]) -> Timer:
    """A timer, or one of NaN where a competitor does not run here."""
    try:
        return prepare()
    except Exception as error:  # its own kind for every library
        print(f"   (not measured: {type(error).__name__}: {str(error)[:100]})")
        return lambda: float("nan")


def in_turn(timers: Sequence[Timer], rounds: int = 5) -> list[float]:
    """Medians of measurements that take turns, so that a warm card slows all of them alike."""
    rows = [[timer() for timer in timers] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*rows, strict=True)]


# --- one product ----------------------------------------------------------------------------------


@dataclass
class Weights:
    """Random weights of one shape, as many as the cache cannot hold."""

    N: int
    K: int
    packed: list[torch.Tensor]
    scale: torch.Tensor

    @classmethod
    def make(cls, N: int, K: int) -> Weights:
        """Different random bytes each."""
        generator = torch.Generator("cuda").manual_seed(N + K)
        count = buffers(N * K // 4)
        packed = [random_weights(generator, N, K) for _ in range(count)]
        return cls(N, K, packed, torch.full((N, 1), 0.02, device="cuda"))

    def linears(self, M: int, **fields: object) -> list[Linear]:
        """One product a weight, all of the same rows."""
        x = torch.randn((M, self.K), device="cuda").half()
        y = torch.empty((M, self.N), device="cuda", dtype=torch.float16)
        shape = (self.N, self.K)
        return [
            Linear(x, w, self.scale, shape, torch.float16, y=y, **fields)  # type: ignore[arg-type]
            for w in self.packed
        ]


def ours(launcher: Launcher, linears: Sequence[Linear]) -> Timer:
    """Of one product."""
    scratch = linears[0].scratch(launcher)
    first = linears[0].changed(quantised=False)
    launcher.linear(first.job(), scratch)  # leaves quantised rows for those that want them
    # Each holds its product's tensors: their memory would else be others' while the graph runs.
    return rotated([lambda one=one: launcher.linear(one.job(), scratch) for one in linears])


def read_floor(launcher: Launcher, weights: Weights) -> Timer:
    """Of reading the packed weights and nothing else."""
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    return rotated([lambda w=w: launcher.read(w, out) for w in weights.packed])


def cublas_bf16(N: int, K: int, M: int) -> Timer:
    """Of torch's bfloat16 product."""
    count = buffers(2 * N * K)
    x = torch.randn((M, K), device="cuda", dtype=torch.bfloat16)
    ws = [torch.randn((N, K), device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    y = torch.empty((M, N), device="cuda", dtype=torch.bfloat16)
    return rotated([lambda w=w: torch.mm(x, w.T, out=y) for w in ws])


def cublaslt_int8(N: int, K: int, M: int) -> Timer:
    """Of torch's int8 product (cublasLt), int32 results, no scaling."""
    count = buffers(N * K)
    x = torch.randint(-127, 128, (M, K), device="cuda", dtype=torch.int8)
    ws = [torch.randint(-1, 2, (N, K), device="cuda", dtype=torch.int8) for _ in range(count)]
    return rotated([lambda w=w: torch._int_mm(x, w.T) for w in ws])


def triton_w2a8(N: int, K: int) -> Timer:
    """Of a plain Triton W2A8 product of one quantised row."""
    from tests.gpu.triton_gemv import launch

    count = buffers(N * K // 4)
    q = torch.randint(-127, 128, (K,), device="cuda", dtype=torch.int8)
    ws = [torch.randint(0, 256, (N, K // 4), device="cuda", dtype=torch.uint8) & 0xAA
          for _ in range(count)]  # fmt: skip
    y = torch.empty(N, device="cuda", dtype=torch.float32)
    return rotated([lambda w=w: launch(w, q, y) for w in ws])


def decode_table(launcher: Launcher) -> None:
    """One token: microseconds, and shares of the read floor."""
    print("== one token, us a call (x float16 to y float16; weights rotated through more than L2)")
    heads = ("read floor", "product", "product+PDL", "op", "op+PDL", "floor/product", "GB/s op+PDL",
             "Triton W2A8", "cuBLAS bf16")  # fmt: skip
    print("N x K".ljust(13) + "".join(head.rjust(15) for head in heads))
    for N, K in SHAPES:
        weights = Weights.make(N, K)
        gamma = torch.ones(K, device="cuda")
        floor, product, op, triton, bf16 = in_turn([
            read_floor(launcher, weights),
            ours(launcher, weights.linears(1, quantised=True)),
            ours(launcher, weights.linears(1, gamma=gamma)),
            attempt(partial(triton_w2a8, N, K)),
            attempt(partial(cublas_bf16, N, K, 1)),
        ])  # fmt: skip
        # Apart, for the others put the card in the state where these begin later (see `captured`).
        early, op_early = in_turn([
            ours(launcher, weights.linears(1, quantised=True, early=True)),
            ours(launcher, weights.linears(1, gamma=gamma, early=True)),
        ])  # fmt: skip
        cells = [f"{t * 1e6:.2f}" for t in (floor, product, early, op, op_early)]
        cells += [f"{floor / product:.2f}", f"{N * K / 4 / op_early / 1e9:.0f}"]
        cells += [f"{t * 1e6:.2f}" for t in (triton, bf16)]
        print(f"{N}x{K}".ljust(13) + "".join(cell.rjust(15) for cell in cells))


def tune_stack(launcher: Launcher) -> None:
    """Row tiles a block of each of the stack's products: one after the other, the best is kept."""
    stack = Stack(launcher, 1)
    chosen = [0] * len(LAYER)
    best = seconds(captured(stack.run), 0.05)
    for turn in range(8):
        product = turn % 4
        for step in (1, 2, 3, 4, 5, 6):
            steps = [step if i == product else chosen[i] for i in range(4)]
            work = [one.changed(step=steps[i % 4], y=one.y) for i, one in enumerate(stack.work)]
            stack.jobs = [one.job() for one in work]
            try:
                t = seconds(captured(stack.run), 0.05)
            except RuntimeError:
                continue  # more than a block can have
            if t < best:
                best, chosen = t, steps
        print(f"   row tiles a block {chosen}: {best * 1e6:.0f} us", flush=True)


def tune_prefill(launcher: Launcher) -> None:
    """Many tokens by every tile, TOPS; 0 is what the library chooses."""
    for N, K in SHAPES:
        weights = Weights.make(N, K)
        for M in PREFILL:
            tiles = range(len(VARIANTS["tiles"]) + 1)
            times = in_turn(
                [ours(launcher, weights.linears(M, quantised=True, early=True, tile=tile))
                 for tile in tiles], 3)  # fmt: skip
            names = ["chosen", *VARIANTS["tiles"]]
            cells = [f"{n}: {2 * N * K * M / t / 1e12:.0f}"
                     for n, t in zip(names, times, strict=True)]  # fmt: skip
            print(f"{N}x{K}".ljust(13) + str(M).rjust(6) + "  " + "  ".join(cells), flush=True)


def batch_table(launcher: Launcher) -> None:
    """Small batches."""
    print("== small batches, us an op (norm and product, PDL)")
    batches = (1, 2, 4, 8, 16, 32)
    print("N x K".ljust(13) + "".join(f"M={M}".rjust(9) for M in batches) + "   cuBLAS bf16 M=8")
    for N, K in SHAPES:
        weights = Weights.make(N, K)
        gamma = torch.ones(K, device="cuda")
        cells = [f"{ours(launcher, weights.linears(M, gamma=gamma, early=True))() * 1e6:.2f}"
                 for M in batches]  # fmt: skip
        other = attempt(partial(cublas_bf16, N, K, 8))()
        print(f"{N}x{K}".ljust(13) + "".join(c.rjust(9) for c in cells) + f"{other * 1e6:12.2f}")


def prefill_table(launcher: Launcher) -> None:
    """Many tokens: TOPS of the product alone and with its quantisation."""
    print("== many tokens, TOPS (2 N K M / time); product: of quantised rows; op: norm included")
    heads = ("product", "op", "cublasLt int8", "cuBLAS bf16", "x int8", "x bf16")
    print("N x K".ljust(13) + "M".rjust(6) + "".join(head.rjust(15) for head in heads))
    for N, K in SHAPES:
        weights = Weights.make(N, K)
        gamma = torch.ones(K, device="cuda")
        for M in PREFILL:
            product, op, int8, bf16 = in_turn([
                ours(launcher, weights.linears(M, quantised=True, early=True)),
                ours(launcher, weights.linears(M, gamma=gamma, early=True)),
                attempt(partial(cublaslt_int8, N, K, M)),
                attempt(partial(cublas_bf16, N, K, M)),
            ])  # fmt: skip
            tops = [f"{2 * N * K * M / t / 1e12:.0f}" for t in (product, op, int8, bf16)]
            tops += [f"{int8 / product:.2f}", f"{bf16 / product:.2f}"]
            line = f"{N}x{K}".ljust(13) + str(M).rjust(6) + "".join(c.rjust(15) for c in tops)
            print(line, flush=True)


def grouped_table(launcher: Launcher) -> None:
    """Weights with a scale per group of columns beside those with one a row: TOPS."""
    sizes = (0, 256, 128, 64, 32, 16)
    print(
        "== scales per group of columns, TOPS of the product of quantised rows (0: a scale a row)"
    )
    print("N x K".ljust(13) + "M".rjust(6) + "".join(str(size).rjust(8) for size in sizes))
    for N, K in ((2560, 2560), (2560, 6912), (13824, 2560)):
        weights = Weights.make(N, K)
        scales = {
            size: torch.full((N // 16, K // size, 16), 0.02, device="cuda") for size in sizes[1:]
        }
        for M in (1, 16, 64, 512, 2048):
            times = in_turn([
                ours(launcher, [
                    one.changed(y=one.y, w_scale=scales.get(size, weights.scale), group_size=size)
                    for one in weights.linears(M, quantised=True, early=True)
                ])
                for size in sizes
            ])  # fmt: skip
            tops = "".join(f"{2 * N * K * M / t / 1e12:8.2f}" for t in times)
            print(f"{N}x{K}".ljust(13) + str(M).rjust(6) + tops, flush=True)


def head_table(launcher: Launcher) -> None:
    """The language-model head of 2B-4T, logits of some rows; its table is more than L2 holds."""
    V, K, block = 128256, 2560, 128
    print("== head, us a call (x bfloat16): tables of 8 and 4 bits, cuBLAS bf16 of 16")
    print("M".rjust(4) + "".join(name.rjust(14) for name in ("q8", "q4", "cuBLAS bf16")))
    scale = torch.full((V, K // block), 0.01, device="cuda")
    tables = {bits: torch.randint(0, 256, (V, K * bits // 8), device="cuda", dtype=torch.uint8)
              for bits in (8, 4)}  # fmt: skip
    weight = torch.randn((V, K), device="cuda", dtype=torch.bfloat16)
    for M in (1, 2, 4, 8, 16):
        x = torch.randn((M, K), device="cuda", dtype=torch.bfloat16)
        y = torch.empty((M, V), device="cuda")
        out = torch.empty((M, V), device="cuda", dtype=torch.bfloat16)

        def timer(work: Callable[[], None]) -> Timer:
            run = captured(work)
            return lambda: seconds(run)

        jobs = [TableJob(
            x=x.data_ptr(), table=table.data_ptr(), scale=scale.data_ptr(), y=y.data_ptr(),
            M=M, V=V, K=K, type_x=TYPES[x.dtype], bits=bits, block=block, early=1,
        ) for bits, table in tables.items()]  # fmt: skip
        times = in_turn([
            *(timer(partial(launcher.head, job, launcher.head_scratch(job))) for job in jobs),
            timer(partial(torch.mm, x, weight.T, out=out)),
        ])  # fmt: skip
        print(str(M).rjust(4) + "".join(f"{t * 1e6:.0f}".rjust(14) for t in times), flush=True)


# --- the stack ------------------------------------------------------------------------------------


class Stack:
    """The ternary operators of every layer of a 2B-4T-shaped model, each with its own weights."""

    def __init__(self, launcher: Launcher, M: int, early: bool = True, split: int = 0) -> None:
        self.launcher, self.M = launcher, M
        generator = torch.Generator("cuda").manual_seed(1)
        self.bytes = 0

        def weights(N: int, K: int) -> torch.Tensor:
            self.bytes += N * K // 4
            return random_weights(generator, N, K)

        def like(N: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return torch.zeros((M, N), device="cuda", dtype=dtype)

        ones, wide = (torch.ones(n, device="cuda") for n in (HIDDEN, FFN))
        small = {n: torch.full((n, 1), 0.01, device="cuda") for n in (QKV, HIDDEN, 2 * FFN)}
        self.x = torch.randn((M, HIDDEN), device="cuda").half()
        hidden, qkv, attended = self.x, like(QKV), like(HIDDEN)
        both = like(2 * FFN, torch.float32)
        self.work: list[Linear] = []
        for _ in range(LAYERS):
            made = {"early": early, "split": split}
            self.work.append(Linear(hidden, weights(QKV, HIDDEN), small[QKV], (QKV, HIDDEN),
                                    torch.float16, gamma=ones, y=qkv, **made))  # fmt: skip
            query = qkv.reshape(-1)[: M * HIDDEN].reshape(M, HIDDEN)  # stands for attention
            after = like(HIDDEN)
            self.work.append(Linear(query, weights(HIDDEN, HIDDEN), small[HIDDEN], (HIDDEN, HIDDEN),
                                    torch.float16, gamma=ones, residual=hidden, y=after,
                                    **made))  # fmt: skip
            up = Linear(after, weights(2 * FFN, HIDDEN), small[2 * FFN], (FFN, HIDDEN),
                        torch.float32, gamma=ones, gate_out=0, y=both, **made)  # fmt: skip
            gate_in = NO_GATE
            if not launcher.gates(up.job()):
                up = up.changed(shape=(2 * FFN, HIDDEN), gate_out=NO_GATE, y=both)
                gate_in = 0
            self.work.append(up)
            nexts = like(HIDDEN)
            self.work.append(Linear(both, weights(HIDDEN, FFN), small[HIDDEN], (HIDDEN, FFN),
                                    torch.float16, gamma=wide, gate_in=gate_in, residual=after,
                                    y=nexts, **made))  # fmt: skip
            hidden = nexts
        del attended
        self.jobs = [one.job() for one in self.work]
        size = max(launcher.scratch_bytes(job) for job in self.jobs)
        self.scratch = torch.empty(max(1, size), dtype=torch.uint8, device="cuda")

    def run(self) -> None:
        """Every operator once."""
        for job in self.jobs:
            self.launcher.linear(job, self.scratch)

    @property
    def operations(self) -> int:
        """Multiplications and additions of one run."""
        return 2 * 4 * self.bytes * self.M


def stack_table(launcher: Launcher, bandwidth: float) -> None:
    """A whole token, and prefill."""
    for early in (False, True):
        stack = Stack(launcher, 1, early)
        t = seconds(captured(stack.run), 0.05)
        share = stack.bytes / t / bandwidth
        print(
            f"stack, one token, PDL {early}: {t * 1e6:.0f} us, {1 / t:.0f} tokens/s, "
            f"{stack.bytes / t / 1e9:.0f} GB/s = {share:.0%} of the read bandwidth"
        )
    joules = attempt(lambda: partial(energy, captured(Stack(launcher, 1).run)))()
    print(f"stack, energy a token: {joules * 1e3:.1f} mJ (NVML, whole card)")
    for M in (512, 1024, 2048, 4096):
        stack = Stack(launcher, M)
        t = seconds(captured(stack.run), 0.05)
        print(
            f"stack, prefill of {M}: {t * 1e3:.2f} ms, {M / t:.0f} tokens/s, "
            f"{stack.operations / t / 1e12:.0f} TOPS"
        )


def energy(run: Callable[[], None]) -> float:
    """Joules of one call, by the card's counter over about two seconds."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    count = int(2 / seconds(run))
    before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    for _ in range(count):
        run()
    torch.cuda.synchronize()
    return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3 / count


def read_bandwidth(launcher: Launcher) -> float:
    """Bytes a second of one long read."""
    data = torch.randint(0, 1 << 30, (1 << 28,), device="cuda", dtype=torch.int32)
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    return data.numel() * 4 / seconds(captured(lambda: launcher.read(data, out)), 0.05)
