/* What the generated kernels call: instructions that TIR has no word for. One line each of PTX (PTX
 * ISA 9.0), and the element types of ONNX (1 float32, 10 float16, 16 bfloat16).
 *
 * Whatever an earlier kernel wrote is read by the volatile loads below: plain ones may be moved above
 * the wait that programmatic dependent launch needs. */
#pragma nv_diag_suppress 177
#ifdef __CUDACC_RTC__ /* NVRTC has no headers */
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
#else
#include <cstdint>
#endif
#define uint unsigned int
#define uchar unsigned char
#define BC_INLINE static __device__ __forceinline__

/* ---- order between kernels ------------------------------------------------------------------- */

BC_INLINE void bc_wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
BC_INLINE void bc_let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* ---- activations ----------------------------------------------------------------------------- */

BC_INLINE float bc_widen(uint16_t h, int type) {
  float v;
  if (type == 16) return __uint_as_float((uint)h << 16);
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h));
  return v;
}
BC_INLINE float bc_load(const void* p, int64_t i, int type) {
  float v;
  uint16_t h;
  if (type == 1) {
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"((const float*)p + i) : "memory");
    return v;
  }
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(h) : "l"((const uint16_t*)p + i) : "memory");
  return bc_widen(h, type);
}
/* An element as its bits: what does not convert does not wait. */
BC_INLINE uint bc_load_bits(const void* p, int64_t i, int type) {
  uint v;
  uint16_t h;
  if (type == 1) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"((const float*)p + i) : "memory");
    return v;
  }
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(h) : "l"((const uint16_t*)p + i) : "memory");
  return h;
}
BC_INLINE float bc_from_bits(uint v, int type) {
  return type == 1 ? __uint_as_float(v) : bc_widen((uint16_t)v, type);
}
/* Four elements from an index that is a multiple of 4, of an array that 16 bytes align. */
BC_INLINE void bc_load4(float* out, const void* p, int64_t i, int type) {
  if (type == 1) {
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(out[0]), "=f"(out[1]), "=f"(out[2]), "=f"(out[3])
                 : "l"((const float*)p + i) : "memory");
    return;
  }
  uint16_t h[4];
  asm volatile("ld.global.v4.u16 {%0, %1, %2, %3}, [%4];"
               : "=h"(h[0]), "=h"(h[1]), "=h"(h[2]), "=h"(h[3])
               : "l"((const uint16_t*)p + i) : "memory");
#pragma unroll
  for (int j = 0; j < 4; j++) out[j] = bc_widen(h[j], type);
}
/* COUNT words of four elements `first`, `first + stride`, ... of a row from element `base` on, all
 * loads under way before one is used; zeros from word `words` on. Rows begin at multiples of 4. */
template <int COUNT>
BC_INLINE void bc_load_wide(float* out, const void* p, int64_t base, int first, int stride, int words) {
  float4 wide[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    wide[i] = make_float4(0, 0, 0, 0);
    if (first + i * stride < words)
      asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(wide[i].x), "=f"(wide[i].y), "=f"(wide[i].z), "=f"(wide[i].w)
                   : "l"((const float*)p + base + 4 * (first + i * stride)) : "memory");
  }
#pragma unroll
  for (int i = 0; i < COUNT; i++) *(float4*)(out + 4 * i) = wide[i];
}
template <int COUNT>
BC_INLINE void bc_load_narrow(float* out, const void* p, int64_t base, int first, int stride,
                              int words, int type) {
  uint2 narrow[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    narrow[i] = make_uint2(0, 0);
    if (first + i * stride < words)
      asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                   : "=r"(narrow[i].x), "=r"(narrow[i].y)
                   : "l"((const uint16_t*)p + base + 4 * (first + i * stride)) : "memory");
  }
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    out[4 * i] = bc_widen((uint16_t)narrow[i].x, type);
    out[4 * i + 1] = bc_widen((uint16_t)(narrow[i].x >> 16), type);
    out[4 * i + 2] = bc_widen((uint16_t)narrow[i].y, type);
    out[4 * i + 3] = bc_widen((uint16_t)(narrow[i].y >> 16), type);
  }
}
BC_INLINE void bc_load_row4(float* out, const void* p, int64_t base, int first, int stride, int words,
                            int type) {
  if (type == 1)
    bc_load_wide<4>(out, p, base, first, stride, words);
  else
    bc_load_narrow<4>(out, p, base, first, stride, words, type);
}
BC_INLINE uint16_t bc_narrow(float v, int type) {
  uint16_t half, brain;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(v));
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(brain) : "f"(v));
  return type == 16 ? brain : half;
}
BC_INLINE void bc_store(void* p, int64_t i, float v, int type) {
  if (type == 1)
    ((float*)p)[i] = v;
  else
    ((uint16_t*)p)[i] = bc_narrow(v, type);
}
/* Where an element goes, known before its value is; and the value's way there. */
BC_INLINE uint64_t bc_element(const void* p, int64_t i, int type) {
  uint64_t address = (uint64_t)__cvta_generic_to_global(p) + (i << (type == 1 ? 2 : 1));
  asm volatile("" : "+l"(address));
  return address;
}
BC_INLINE void bc_store_to(uint64_t address, float v, int type) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.s32 p, %3, 1;\n@p st.global.f32 [%0], %1;\n@!p st.global.u16 [%0], %2;\n}"
      ::"l"(address), "f"(v), "h"(bc_narrow(v, type)), "r"(type) : "memory");
}
/* Four elements to an index that is a multiple of 4. */
BC_INLINE void bc_store4(void* p, int64_t i, const float* v, int type) {
  if (type == 1) {
    *(float4*)((float*)p + i) = *(const float4*)v;
    return;
  }
  uint16_t h[4];
#pragma unroll
  for (int j = 0; j < 4; j++) h[j] = bc_narrow(v[j], type);
  *(uint2*)((uint16_t*)p + i) = make_uint2(h[0] | (uint)h[1] << 16, h[2] | (uint)h[3] << 16);
}
/* The lower or upper half, e = 0 or 1, of two 16-bit values. */
BC_INLINE float bc_widen_of(uint two, int e, int type) {
  return bc_widen((uint16_t)(two >> 16 * e), type);
}
/* Two values as 16-bit ones, the first in the lower half. */
BC_INLINE uint bc_narrow2(float low, float high, int type) {
  uint half, brain;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(half) : "f"(high), "f"(low));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(brain) : "f"(high), "f"(low));
  return type == 16 ? brain : half;
}
BC_INLINE int bc_load_int(const int* p, int64_t i) {
  int v;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(p + i) : "memory");
  return v;
}
BC_INLINE int bc_load_int_at(const void* p, int64_t byte) {
  return bc_load_int((const int*)((const char*)p + byte), 0);
}
BC_INLINE void bc_put_int(void* p, int64_t byte, int v) { *(int*)((char*)p + byte) = v; }
BC_INLINE void bc_load_int4(int* out, const void* p, int64_t byte) {
  asm volatile("ld.global.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "l"((const char*)p + byte) : "memory");
}

/* ---- shared memory --------------------------------------------------------------------------- */

BC_INLINE void bc_add_shared(int* p, int v) { atomicAdd(p, v); }
BC_INLINE void bc_put4(int* p, const int* v) { *(int4*)p = *(const int4*)v; }
BC_INLINE void bc_clear4(int* p) { *(int4*)p = make_int4(0, 0, 0, 0); }
BC_INLINE int bc_sum_of4(uint address) {
  int4 v;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v.x + v.y + v.z + v.w;
}
BC_INLINE void bc_load_shared4(float* out, const float* p) { *(float4*)out = *(const float4*)p; }
BC_INLINE void bc_store_shared4(float* p, const float* v) { *(float4*)p = *(const float4*)v; }
BC_INLINE uint bc_shared(const void* p) { return (uint)__cvta_generic_to_shared(p); }
/* `v`, worked out where this stands: the compiler would else put it off to where it is needed. */
BC_INLINE uint bc_now(uint v) {
  asm volatile("" : "+r"(v));
  return v;
}
BC_INLINE void bc_load_shared16(uint* out, uint address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
}
/* 16 bytes if `wanted`: no branch, so that many are under way. */
BC_INLINE void bc_store16_if(void* to, int64_t byte, const uint* v, int wanted) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n@p st.global.v4.u32 [%0], {%1, %2, %3, %4};\n}"
      ::"l"((char*)to + byte), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(wanted) : "memory");
}
BC_INLINE void bc_load_shared8(int* out, uint address) {
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[4]), "=r"(out[5]), "=r"(out[6]), "=r"(out[7])
               : "r"(address + 16) : "memory");
}

/* A barrier of the block's first threads. */
BC_INLINE void bc_meet(int threads) { asm volatile("barrier.sync 1, %0;" ::"r"(threads) : "memory"); }
/* The same for the warps that share a row, while others may be on their way to the one above. */
BC_INLINE void bc_meet_some(int threads) { asm volatile("barrier.sync 2, %0;" ::"r"(threads) : "memory"); }
BC_INLINE void bc_store_shared(uint address, int v) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
BC_INLINE void bc_add_at(uint address, int v) {
  asm volatile("red.shared.add.s32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
/* A lane's four words of a unit, which stay as they are if it is not wanted. */
BC_INLINE void bc_load_shared_unit_if(uint* out, uint address, int wanted) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n@p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
               : "+r"(out[0]), "+r"(out[1]), "+r"(out[2]), "+r"(out[3])
               : "r"(address), "r"(wanted) : "memory");
}
/* A unit of one token as operand B, the same in every column: word 2 t + i of lane l is word
 * 8 t + 4 i + l % 4. `address`: that of piece l / 8. */
BC_INLINE void bc_load_token(int* out, uint address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[4]), "=r"(out[5]), "=r"(out[6]), "=r"(out[7])
               : "r"(address + 64) : "memory");
}

/* ---- constants: may be read before the wait -------------------------------------------------- */

BC_INLINE void bc_load_weights(uint* out, const uint* p) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "l"(p) : "memory");
}

BC_INLINE uint64_t bc_pointer(const void* p) { return (uint64_t)__cvta_generic_to_global(p); }
/* The same from an address, if `wanted`: no branch, so that the compiler has nowhere to wait. */
BC_INLINE void bc_load_unit(uint* out, uint64_t address, int wanted) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n"
      "@p ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
      : "l"(address), "r"(wanted) : "memory");
}

/* Weights on their way to shared memory: a barrier of each copy tells, once, when they have landed. */
BC_INLINE void bc_landing(void* barrier) {
  int arrivals = 32;
#if __CUDA_ARCH__ >= 900
  arrivals = 1;
#endif
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"((uint)__cvta_generic_to_shared(barrier)),
               "r"(arrivals) : "memory");
}
BC_INLINE void bc_landing_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
/* By a whole warp; `bytes`: a multiple of 16. */
BC_INLINE void bc_fetch(void* to, const void* from, int64_t byte, int bytes, void* barrier, int lane) {
  uint landing = (uint)__cvta_generic_to_shared(barrier), target = (uint)__cvta_generic_to_shared(to);
  const char* source = (const char*)from + byte;
#if __CUDA_ARCH__ >= 900
  if (lane) return;
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(landing), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          target), "l"(source), "r"(bytes), "r"(landing)
      : "memory");
#else
  for (int at = lane * 16; at < bytes; at += 512)
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(target + at),
                 "l"(source + at) : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(landing) : "memory");
#endif
}
BC_INLINE void bc_landed(uint barrier) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
#if __CUDA_ARCH__ >= 900
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
#else
      "mbarrier.test_wait.parity.shared.b64 done, [%0], 0;\n"
#endif
      "@!done bra again;\n}" ::"r"(barrier) : "memory");
}
BC_INLINE void bc_load_constant4(float* out, const float* p, int i) {
  *(float4*)out = *(const float4*)(p + i);
}

/* ---- arithmetic ------------------------------------------------------------------------------ */

/* rint(x * scale) in the int8 range; 0 for a NaN. */
BC_INLINE int bc_quantized(float x, float scale) {
  int q = __float2int_rn(__fmul_rn(x, scale));
  return q < -128 ? -128 : q > 127 ? 127 : q;
}
BC_INLINE int bc_pack(int a, int b, int c, int d) {
  return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;
}
/* Four values with |x * scale| <= 127 (or NaN) as rint(x * scale), by adding 1.5 * 2**23. */
BC_INLINE int bc_quantized4(const float* x, float scale) {
  int q[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    q[i] = __float_as_int(__fadd_rn(__fmul_rn(x[i], scale), 12582912.0f));
  return __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
}
/* (float)v, |v| < 2**22, on faster units: added to 1.5 * 2**23, v is the last bits. */
BC_INLINE float bc_small_float(int v) { return __fadd_rn(__int_as_float(v + 0x4b400000), -12582912.0f); }
BC_INLINE int bc_sum4(int a) {
  int d;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x01010101), "r"(0));
  return d;
}
BC_INLINE int bc_dot_us(uint w, int a, int c) {
  int d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(w), "r"(a), "r"(c));
  return d;
}
BC_INLINE int bc_dot_ss(int w, int a, int c) {
  int d;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(w), "r"(a), "r"(c));
  return d;
}
/* Four codes of a table less their zero point; 4-bit ones times 16, `part` 1 the upper of a byte. */
BC_INLINE int bc_codes8(uint w, int part) { return (int)(w ^ 0x80808080u); }
BC_INLINE int bc_codes4(uint w, int part) {
  return (int)(((part ? w : w << 4) & 0xf0f0f0f0u) ^ 0x80808080u);
}
/* fl(a / b), given y = fl(1 / b): two Newton steps on the quotient leave it correctly rounded as long
 * as nothing under- or overflows (P. Markstein, IA-64 and Elementary Functions, 2000, ch. 8). */
BC_INLINE float bc_divide(float a, float b, float y) {
  uint ea = (__float_as_uint(a) >> 23 & 255) - 77, eb = (__float_as_uint(b) >> 23 & 255) - 77;
  if (ea > 100 || eb > 100) return __fdiv_rn(a, b);
  float q = __fmul_rn(a, y);
  q = __fmaf_rn(__fmaf_rn(-q, b, a), y, q);
  return __fmaf_rn(__fmaf_rn(-q, b, a), y, q);
}

/* fl(1 / a), a > 0 and normal: the compiler's own steps, but without a branch before the end (compared with
 * __frcp_rn for every such float on an H100). */
BC_INLINE float bc_reciprocal(float a) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
  y = __fmaf_rn(y, __fmaf_rn(-a, y, 1.0f), y);
  return a < 0x1p126f ? y : __frcp_rn(a);
}

/* fl(1 / fl(sqrt(fl(fl(total / K) + eps)))), inverse = fl(1 / K), without a branch before the end.
 * Quotient, root and reciprocal are Newton steps; the last of each leaves it correctly rounded (Markstein,
 * ch. 8), the reciprocal but for one mantissa, all ones (compared for every mantissa on an H100). */
BC_INLINE float bc_reciprocal_rms(float total, float K, float inverse, float eps) {
  float q = __fmul_rn(total, inverse), r;
  q = __fmaf_rn(__fmaf_rn(-q, K, total), inverse, q);
  q = __fmaf_rn(__fmaf_rn(-q, K, total), inverse, q);
  float mean = __fadd_rn(q, eps);
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(mean));
  float root = __fmul_rn(mean, r);
  root = __fmaf_rn(__fmaf_rn(-root, root, mean), __fmul_rn(0.5f, r), root);
  r = __fmaf_rn(__fmaf_rn(-root, r, 1.0f), r, r);
  r = __fmaf_rn(__fmaf_rn(-root, r, 1.0f), r, r);
  uint bits = __float_as_uint(root);
  if ((bits & 0x7fffff) == 0x7fffff) r = __uint_as_float(0x7e800001 - (bits & 0x7f800000));
  int fast = total > 1e-15f && total < 1e15f && mean > 1e-20f && mean < 1e20f;
  return fast ? r : __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(total, K), eps)));
}

/* ---- tensor cores: 16 weights are a word of four 2-bit codes a byte -------------------------- */

/* d [16 rows, 8 tokens] += w [16, 32] q [32, 8]. */
BC_INLINE void bc_mma(int* d, uint w, int b0, int b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(w & 0x03030303u), "r"(w >> 2 & 0x03030303u), "r"(w >> 4 & 0x03030303u),
        "r"(w >> 6 & 0x03030303u), "r"(b0), "r"(b1));
}
/* d += w q for a lane's 16 weights: two rows, 32 columns. Masks alone: the sums of a code's place
 * count 1, 4, 16 and 64 times. */
BC_INLINE void bc_dot16(int* d, uint w, int b0, int b1) {
  d[0] = bc_dot_us(w & 0x03030303u, b0, d[0]);
  d[1] = bc_dot_us(w & 0x0c0c0c0cu, b0, d[1]);
  d[2] = bc_dot_us(w & 0x30303030u, b1, d[2]);
  d[3] = bc_dot_us(w & 0xc0c0c0c0u, b1, d[3]);
}
BC_INLINE void bc_mma_16(int* d, uint a0, uint a1, int b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}
/* The same without shifts: low += w q[0..15], high += w q[16..31], where rows 8 to 15 of low, and
 * rows of high, count 4, 16 and 64 times. */
BC_INLINE void bc_mma_low(int* d, uint w, int b) {
  bc_mma_16(d, w & 0x03030303u, w & 0x0c0c0c0cu, b);
}
BC_INLINE void bc_mma_high(int* d, uint w, int b) {
  bc_mma_16(d, w & 0x30303030u, w & 0xc0c0c0c0u, b);
}
BC_INLINE void bc_mma_scaled(int* low, int* high, uint w, int b0, int b1) {
  bc_mma_low(low, w, b0);
  bc_mma_high(high, w, b1);
}
/* d += the sums of the tokens, in every row. */
BC_INLINE void bc_mma_ones(int* d, int b) { bc_mma_16(d, 0x01010101u, 0x01010101u, b); }
BC_INLINE void bc_load_matrix4(int* r, const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(bc_shared(p)) : "memory");
}
/* Four 8x8 matrices of 16-bit values: a lane's two of a row become one of each of two columns. */
BC_INLINE void bc_store_matrix4(uint address, const uint* r) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
#endif
}
/* The way back. */
BC_INLINE void bc_load_matrix4_turned(uint* r, uint address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
BC_INLINE int bc_grid() { return (int)gridDim.x; }
BC_INLINE void bc_copy_async16(void* to, const void* from, int64_t byte) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
               ::"r"(bc_shared(to)), "l"((const char*)from + byte) : "memory");
}
BC_INLINE void bc_copy_async16_if(uint to, const void* from, int64_t byte, int wanted) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p cp.async.cg.shared.global [%0], [%1], 16;\n}"
      ::"r"(to), "l"((const char*)from + byte), "r"(wanted) : "memory");
}
BC_INLINE void bc_copy_async4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(bc_shared(to)), "l"(from) : "memory");
}
BC_INLINE void bc_copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
BC_INLINE void bc_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
BC_INLINE void bc_copy_wait2() { asm volatile("cp.async.wait_group 2;" ::: "memory"); }

/* ---- Hopper: bulk copies, barriers in shared memory, warpgroup products ---------------------- */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
BC_INLINE void bc_barrier_init(void* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bc_shared(barrier)), "r"(arrivals)
               : "memory");
}
BC_INLINE void bc_barrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
BC_INLINE void bc_barrier_arrive(void* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bc_shared(barrier)) : "memory");
}
BC_INLINE void bc_barrier_wait(void* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(bc_shared(barrier)), "r"(parity) : "memory");
}
/* Registers of a thread, for a whole warpgroup. */
template <int N>
BC_INLINE void bc_more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
BC_INLINE void bc_fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
BC_INLINE void bc_barrier_expect(void* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bc_shared(barrier)),
               "r"(bytes) : "memory");
}
/* Copies `bytes` (a multiple of 16), of those that the barrier expects. */
BC_INLINE void bc_copy_bulk(void* to, const void* from, int64_t byte, int bytes, void* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          bc_shared(to)), "l"((const char*)from + byte), "r"(bytes), "r"(bc_shared(barrier))
      : "memory");
}
/* A barrier of the two warpgroups, one of one of them, and one that tells whether something holds for
 * all of its threads. */
BC_INLINE void bc_workers() { asm volatile("barrier.sync 1, 256;" ::: "memory"); }
BC_INLINE void bc_group(int group) {
  asm volatile("barrier.sync %0, 128;" ::"r"(2 + group) : "memory");
}
BC_INLINE int bc_agree(int group, int holds) {
  int all;
  asm volatile(
      "{\n.reg .pred p, r;\nsetp.ne.s32 p, %1, 0;\n"
      "barrier.red.and.pred r, %2, 128, p;\nselp.s32 %0, 1, 0, r;\n}"
      : "=r"(all) : "r"(holds), "r"(2 + group) : "memory");
  return all;
}
/* Bytes from p to the next multiple of 1024 in shared memory. */
BC_INLINE int bc_to_kilobyte(const void* p) { return (int)(-bc_shared(p) & 1023); }
/* Ends all steps but the last. */
BC_INLINE void bc_wgmma_wait_before() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }
/* Products may read these registers up to here. */
BC_INLINE void bc_keep(uint* a) {
  asm volatile(""
               : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]), "+r"(a[4]), "+r"(a[5]), "+r"(a[6]),
                 "+r"(a[7]), "+r"(a[8]), "+r"(a[9]), "+r"(a[10]), "+r"(a[11]), "+r"(a[12]),
                 "+r"(a[13]), "+r"(a[14]), "+r"(a[15]) :: "memory");
}
BC_INLINE void bc_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* Operand B in shared memory: rows of 128 bytes in the 128-byte swizzle, 8 rows a kilobyte. */
BC_INLINE uint64_t bc_describe(const void* p) {
  return (uint64_t)(bc_shared(p) >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
#endif
