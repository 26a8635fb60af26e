"""The CUDA kernels against the NumPy reference, on fresh random data: bits, not tolerances.

Float16 and bfloat16 results are the float32 reference, rounded once more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from bitcompile import numerics
from bitcompile.packing import CUDA_TILE, PackedTernary
from tests.gpu.jobs import GATES, NO_GATE, TableJob
from tests.gpu.launch import TYPES, VARIANTS, Launcher, Linear

SHAPES = ((1, 1), (16, 128), (17, 129), (70, 100), (129, 257), (200, 640), (333, 1021), (260, 2050))
TOKENS = (1, 2, 3, 5, 8, 9, 16, 17, 40, 129, 300)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def on_gpu(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy on the GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).cuda()
    return tensor if dtype is None else tensor.to(dtype)


def unpack(packed: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """Weights int8 ``[N, K]`` of packed bytes on the GPU, by the axes of the layout."""
    layout = CUDA_TILE
    R, C = packed.shape[:2]
    codes = torch.stack([(packed >> (2 * i)) & 3 for i in range(4)], dim=-1)
    split = codes.reshape(R, C, *layout.sizes(layout.data + layout.field))
    natural = split.permute(*np.argsort(layout.order).tolist())
    whole = natural.reshape(R * layout.tile_n, C * layout.tile_k)[:N, :K]
    return whole.to(torch.int8) - 1


def unpack_tokens(q: torch.Tensor, M: int, K: int, groups: int) -> torch.Tensor:
    """Quantised activations int8 ``[M, K]`` from the order the kernels keep them in."""
    units = -(-K // 128)
    pieces = q[: units * groups * 1024].view(torch.int8).reshape(units, groups, 8, 8, 16)
    row = torch.arange(8, device=q.device)
    places = (row[None, :] ^ row[:, None]).reshape(1, 1, 8, 8, 1).expand(units, groups, 8, 8, 16)
    natural = pieces.gather(3, places).reshape(units, groups * 8, 128).permute(1, 0, 2)
    return natural.reshape(groups * 8, units * 128)[:M, :K]


class Case:
    """Random tensors of one product, and what the reference makes of them."""

    def __init__(
        self,
        rng: np.random.Generator,
        M: int,
        N: int,
        K: int,
        dtype: torch.dtype,
        factor: float = 1.0,
        odd: float | None = None,
    ) -> None:
        """``factor``: of all rows; ``odd``: a value that stands once in each."""
        self.rng, self.M, self.N, self.K, self.dtype = rng, M, N, K, dtype
        rows = self._rows(M, K) * np.float32(factor)
        if odd is not None:
            rows[:, rng.integers(K)] = odd
        self.x = on_gpu(rows, dtype)
        self.gamma = rng.standard_normal(K).astype(np.float32)
        self.bias = rng.standard_normal(N).astype(np.float32)
        self.residual = on_gpu(rng.standard_normal((M, N)).astype(np.float32), dtype)

    def _rows(self, M: int, K: int) -> np.ndarray:
        """Rows of several magnitudes; with three and more, one of zeros and one with a NaN."""
        x = self.rng.standard_normal((M, K)).astype(np.float32)
        x *= np.float32(2.0) ** self.rng.integers(-6, 5, (M, 1)).astype(np.float32)
        if M > 2:
            x[1] = 0
            x[2, self.rng.integers(K)] = np.nan
        return x

    def weights(self, N: int, K: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
        """Ternary weights and scales, and both as the kernels read them."""
        weight = self.rng.integers(-1, 2, (N, K)).astype(np.int8)
        scale = self.rng.random((N, 1)).astype(np.float32) + np.float32(0.01)
        scale *= self.rng.choice(np.array([-1, 1], np.float32), (N, 1))
        packed = PackedTernary.pack(weight, scale, CUDA_TILE)
        return weight, scale, on_gpu(packed.data), on_gpu(packed.scale)

    def wide(self, tensor: torch.Tensor) -> np.ndarray:
        """A tensor in float32 for the reference."""
        return tensor.float().cpu().numpy()

    def narrow(self, array: np.ndarray) -> torch.Tensor:
        """A result of the reference in the case's type."""
        return torch.from_numpy(array).to(self.dtype)


def same(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises AssertionError where elements differ in a bit; all NaNs are alike."""
    got, expected = got.cpu(), expected.cpu()
    alike = (got == expected) & (got.signbit() == expected.signbit())
    differs = ~(alike | (got.isnan() & expected.isnan()))
    if differs.any():
        at = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} differ, first at {at}: "
            f"{got[at].item()} instead of {expected[at].item()}"
        )


def linear(launcher: Launcher, case: Case, norm: bool, extras: bool, alike: bool = False,
           **choice: int) -> None:  # fmt: skip
    """BitLinear or NormBitLinear; ``alike``: rows share a scale and have no bias."""
    weight, scale, w, w_scale = case.weights(case.N, case.K)
    if alike:
        scale[:] = scale[0]
        w_scale[:] = w_scale[0].clone()
    product = Linear(
        case.x, w, w_scale, (case.N, case.K), case.dtype,
        gamma=on_gpu(case.gamma) if norm else None,
        bias=on_gpu(case.bias) if extras and not alike else None,
        residual=case.residual if extras else None,
        **{"early": 1, **choice},
    )  # fmt: skip
    scratch = product.scratch(launcher)
    launcher.linear(product.job(), scratch)
    torch.cuda.synchronize()
    x = case.wide(case.x)
    normed = numerics.rms_norm(x, case.gamma, 1e-5) if norm else x
    y = numerics.ternary_matmul(normed, weight, scale)
    if extras:
        y = (y if alike else y + case.bias) + case.wide(case.residual)
    what = f"linear {case.M}x{case.N}x{case.K} {case.dtype} {norm=} {extras=} {alike=} {choice}"
    assert product.y is not None
    if scratch.numel() > 1:
        groups = -(-case.M // 8) if case.M <= 16 else -(-case.M // 256) * 32
        q, _ = numerics.quantize_activations(normed)
        plain = case.M == 1 and VARIANTS["longest"] >= case.K
        got = (scratch[: case.K].view(torch.int8)[None] if plain
               else unpack_tokens(scratch, case.M, case.K, groups))  # fmt: skip
        same(f"{what}: q", got.float(), torch.from_numpy(q).float())
    same(what, product.y, case.narrow(y.astype(np.float32)))


def glu(launcher: Launcher, case: Case, gate: int, sub_norm: bool, split: int = 0) -> None:
    """The two products of BitGLU, as the plugin plans them."""
    F = case.N
    up_weight, up_scale, up_w, up_s = case.weights(2 * F, case.K)
    down_weight, down_scale, down_w, down_s = case.weights(case.K, F)
    up = Linear(case.x, up_w, up_s, (F, case.K), torch.float32, gamma=on_gpu(case.gamma),
                gate_out=gate, early=True, split=split)  # fmt: skip
    gate_in = NO_GATE
    if not launcher.gates(up.job()):
        up = up.changed(shape=(2 * F, case.K), gate_out=NO_GATE)
        gate_in = gate
    launcher.linear(up.job(), up.scratch(launcher))
    sub = case.rng.standard_normal(F).astype(np.float32)
    assert up.y is not None
    down = Linear(up.y, down_w, down_s, (case.K, F), case.dtype, residual=case.x, gate_in=gate_in,
                  gamma=on_gpu(sub) if sub_norm else None, early=True, split=split)  # fmt: skip
    launcher.linear(down.job(), down.scratch(launcher))
    torch.cuda.synchronize()
    x = case.wide(case.x)
    both = numerics.ternary_matmul(numerics.rms_norm(x, case.gamma, 1e-5), up_weight, up_scale)
    hidden = numerics.ACTIVATIONS[GATES[gate]](both[:, :F]) * both[:, F:]
    if sub_norm:
        hidden = numerics.rms_norm(hidden, sub, 1e-5)
    y = numerics.ternary_matmul(hidden, down_weight, down_scale) + x
    assert down.y is not None
    what = f"glu {case.M}x{F}x{case.K} {case.dtype} {GATES[gate]} sub_norm={sub_norm} split={split}"
    same(what, down.y, case.narrow(y.astype(np.float32)))


def grouped(launcher: Launcher, case: Case, group_size: int) -> None:
    """NormBitLinear with a scale per group of columns."""
    weight = case.rng.integers(-1, 2, (case.N, case.K)).astype(np.int8)
    scale = case.rng.random((case.N, -(-case.K // group_size))).astype(np.float32) + 0.01
    packed = PackedTernary.pack(weight, scale, CUDA_TILE, group_size)
    stored = CUDA_TILE.encode_scale(packed.scale, group_size)
    product = Linear(case.x, on_gpu(packed.data), on_gpu(stored), (case.N, case.K), case.dtype,
                     gamma=on_gpu(case.gamma), bias=on_gpu(case.bias), residual=case.residual,
                     group_size=group_size, early=1)  # fmt: skip
    launcher.linear(product.job(), product.scratch(launcher))
    torch.cuda.synchronize()
    normed = numerics.rms_norm(case.wide(case.x), case.gamma, 1e-5)
    y = numerics.ternary_matmul(normed, weight, packed.scale, group_size)
    y = (y + case.bias) + case.wide(case.residual)
    assert product.y is not None
    same(f"grouped {case.M}x{case.N}x{case.K} {case.dtype} by {group_size}", product.y,
         case.narrow(y.astype(np.float32)))  # fmt: skip


def head(launcher: Launcher, case: Case, bits: int) -> None:
    """HeadLinear."""
    block = 128
    blocks = -(-case.K // block)
    codes = case.rng.integers(0, 256, (case.N, blocks, block * bits // 8)).astype(np.uint8)
    scale = case.rng.random((case.N, blocks)).astype(np.float32)
    table, scales = on_gpu(codes), on_gpu(scale)
    y = torch.full((case.M, case.N), float("nan"), device="cuda")
    job = TableJob(
        x=case.x.data_ptr(), table=table.data_ptr(), scale=scales.data_ptr(), y=y.data_ptr(),
        M=case.M, V=case.N, K=case.K, type_x=TYPES[case.dtype], bits=bits, block=block, early=1,
    )  # fmt: skip
    launcher.head(job, launcher.head_scratch(job))
    torch.cuda.synchronize()
    expected = numerics.head_matmul(case.wide(case.x), codes, scale[:, :, None], bits)
    same(f"head {case.M}x{case.N}x{case.K} {case.dtype} {bits} bits", y, torch.from_numpy(expected))


def large(launcher: Launcher, seed: int, N: int, K: int, M: int, alike: bool = False,
          dtype: torch.dtype = torch.float32, **choice: int) -> None:  # fmt: skip
    """A product of a real model's size against an exact float32 product of integers.

    ``alike``: rows share a scale. A 16-bit type brings a residual, and one row with another scale,
    so that one warpgroup of a block takes the long way out and the other the short one.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator("cuda").manual_seed(seed)
    w = random_weights(generator, N, K)
    x = torch.randn((M, K), device="cuda", generator=generator).to(dtype)
    w_scale = torch.rand((N, 1), device="cuda", generator=generator) + 0.1
    if alike:
        w_scale[:] = w_scale[0].clone()
    residual = None
    if dtype != torch.float32:
        residual = torch.randn((M, N), device="cuda", generator=generator).to(dtype)
        w_scale[70] *= 2
    product = Linear(x, w, w_scale, (N, K), dtype, residual=residual, early=1, **choice)
    scratch = product.scratch(launcher)
    launcher.linear(product.job(), scratch)
    q, s = numerics.quantize_activations(x.float().cpu().numpy())
    acc = on_gpu(q).float() @ unpack(w, N, K).float().T
    expected = acc * (w_scale.reshape(1, -1) / on_gpu(s))
    if residual is not None:
        expected = expected + residual.float()
    assert product.y is not None
    same(f"large {M}x{N}x{K} {dtype} {alike=} {choice}", product.y, expected.to(dtype))


def large_grouped(launcher: Launcher, seed: int, N: int, K: int, M: int, group_size: int) -> None:
    """The same with a scale per group; groups gather in order, each step rounded."""
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator("cuda").manual_seed(seed)
    w = random_weights(generator, N, K)
    x = torch.randn((M, K), device="cuda", generator=generator)
    scale = torch.rand((N, K // group_size), device="cuda", generator=generator) + 0.1
    stored = CUDA_TILE.encode_scale(scale.cpu().numpy(), group_size)
    product = Linear(x, w, on_gpu(stored), (N, K), torch.float32, group_size=group_size, early=1)
    launcher.linear(product.job(), product.scratch(launcher))
    quantised, s = (on_gpu(a) for a in numerics.quantize_activations(x.cpu().numpy()))
    q, weight = quantised.float(), unpack(w, N, K).float()
    total = torch.zeros((M, N), device="cuda")
    for j, begin in enumerate(range(0, K, group_size)):
        acc = q[:, begin : begin + group_size] @ weight[:, begin : begin + group_size].T
        total = total + acc * scale[:, j]
    assert product.y is not None
    same(f"large {M}x{N}x{K} by {group_size}", product.y, total * (1 / s))


def huge(launcher: Launcher, seed: int, group_size: int = 0) -> None:
    """More than 2**31 results of one launch: some rows against the same rows alone."""
    N, K, M = 40960, 128, 1 << 16
    generator = torch.Generator("cuda").manual_seed(seed)
    w = random_weights(generator, N, K)
    x = torch.randn((M, K), device="cuda", generator=generator)
    groups = K // group_size if group_size else 1
    scale = torch.rand((N, groups), device="cuda", generator=generator) + 0.1
    stored = (
        on_gpu(CUDA_TILE.encode_scale(scale.cpu().numpy(), group_size)) if group_size else scale
    )
    rows = slice(M - 40, M)

    def results(some: torch.Tensor) -> torch.Tensor:
        product = Linear(some, w, stored, (N, K), torch.float16, group_size=group_size, early=1)
        launcher.linear(product.job(), product.scratch(launcher))
        assert product.y is not None
        return product.y

    assert M * N > 1 << 31
    same(f"huge {M}x{N}x{K} by {group_size}", results(x)[rows], results(x[rows].contiguous()))
    torch.cuda.empty_cache()


def random_weights(generator: torch.Generator, N: int, K: int) -> torch.Tensor:
    """Packed bytes of random ternary weights; N and K whole tiles."""
    codes = [a | b << 2 | c << 4 | d << 6 for a, b, c, d in itertools.product(range(3), repeat=4)]
    table = torch.tensor(codes, dtype=torch.uint8, device="cuda")
    shape = CUDA_TILE.shape(N, K)
    return table[torch.randint(0, len(codes), shape, device="cuda", generator=generator)]


LONG_ROWS = (1028, 2560, 3072, 3076, 6912, 8192, 9984, 20001)
"""Around the ends of what each kernel that norms one row takes."""


def small_cases(seed: int) -> Iterator[tuple[np.random.Generator, int, int, int, torch.dtype]]:
    """Shapes with tails, every number of tokens, each with its own random numbers."""
    rng = np.random.default_rng(seed)
    for number, ((N, K), M) in enumerate(itertools.product(SHAPES, TOKENS)):
        yield rng, M, N, K, DTYPES[number % 3]


def products(seed: int, quick: bool) -> Iterator[Callable[[Launcher], None]]:
    """Everything to check; ``quick`` is for slow sanitizers."""
    hopper = torch.cuda.get_device_capability() == (9, 0)
    tiles = (-1, *(range(1, len(VARIANTS["tiles"]) + 1) if hopper else ()))
    for number, (rng, M, N, K, dtype) in enumerate(small_cases(seed)):
        if quick and number % 7:
            continue
        case = Case(rng, M, N, K, dtype)
        extras = bool(number // 2 % 2)
        yield partial(linear, case=case, norm=bool(number % 2), extras=extras)
        yield partial(linear, case=case, norm=not number % 2, extras=extras)
        yield partial(glu, case=case, gate=number % 4, sub_norm=bool(number % 3))
        if M in (1, 9, 40, 129, 300):
            yield partial(grouped, case=case, group_size=16 << (number + number // len(TOKENS)) % 5)
        if M in (1, 3, 8, 9, 40):
            yield partial(head, case=case, bits=8 >> number % 2)
        for tile in tiles if M > 16 else ():
            yield partial(linear, case=case, norm=True, extras=True, tile=tile)
            for more in (False, True):
                yield partial(linear, case=case, norm=True, extras=more, alike=True, tile=tile)
        if M == 1:
            most, least = (3e3, 1e-6) if dtype == torch.float16 else (1e36, 1e-41)
            for factor, odd in ((0, None), (most, None), (least, None), (1, np.nan), (1, -np.inf)):
                lone = Case(rng, M, N, K, dtype, factor, odd)
                yield partial(linear, case=lone, norm=True, extras=extras)
                yield partial(linear, case=lone, norm=False, extras=extras)
            for early, more in itertools.product((0, 1), (False, True)):
                yield partial(linear, case=case, norm=True, extras=more, early=early, split=1)
            yield partial(glu, case=case, gate=number % 4, sub_norm=True, split=1)
    if quick:
        return
    for number, (K, M) in enumerate(itertools.product(LONG_ROWS, (1, 3))):
        case = Case(np.random.default_rng((seed, number)), M, 333, K, DTYPES[number % 3])
        yield partial(linear, case=case, norm=True, extras=True)
        for step in (3, 8) if M == 1 else ():  # blocks at the edge, weights that are fetched late
            yield partial(linear, case=case, norm=True, extras=False, step=step)
    for gate in range(len(GATES)):
        case = Case(np.random.default_rng((seed, gate)), 1, 6912, 2560, torch.float16)
        yield partial(glu, case=case, gate=gate, sub_norm=True)
    for N, K in ((2560, 2560), (3840, 2560), (13824, 2560), (2560, 6912)):
        for M in (1, 3, 16, 33, 512):
            for tile in (0, *tiles) if M > 16 else (0,):
                yield partial(large, seed=seed + M, N=N, K=K, M=M, alike=M == 512, tile=tile)
    for tile, dtype in itertools.product(tiles, (torch.float16, torch.bfloat16)):
        yield partial(large, seed=seed, N=3840, K=2560, M=4096, alike=True, dtype=dtype, tile=tile)
    for K in (32640, 32768):  # up to and beyond what the short way out takes
        yield partial(large, seed=seed, N=256, K=K, M=300, alike=True)
    for group_size, M in ((32, 33), (64, 512), (128, 512), (256, 130)):
        yield partial(large_grouped, seed=seed, N=2560, K=6912, M=M, group_size=group_size)
    for group_size in (0, 16, 128):
        yield partial(huge, seed=seed, group_size=group_size)
    yield partial(large, seed=seed, N=2560, K=2560, M=1700)
    yield partial(large, seed=seed, N=512, K=9984, M=1)  # a row too long for the fused kernels


def check(launcher: Launcher, seed: int, quick: bool = False) -> int:
    """The number of products compared; raises AssertionError with every difference."""
    count, wrong = 0, []
    for product in products(seed, quick):
        count += 1
        try:
            product(launcher)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, f"{len(wrong)} of {count} products are wrong:\n" + "\n".join(wrong[:40])
    return count
