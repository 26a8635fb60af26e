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
/* Words of four elements `first`, `first + stride`, ... of a row from element `base` on, all loads
 * under way before one is used; zeros from word `words` on. Rows begin at multiples of 4. */
BC_INLINE void bc_load_row4(float* out, const void* p, int64_t base, int first, int stride, int words,
                            int type) {
  float4 wide[4];
  uint2 narrow[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    wide[i] = make_float4(0, 0, 0, 0);
    narrow[i] = make_uint2(0, 0);
    if (first + i * stride >= words) continue;
    if (type == 1)
      asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(wide[i].x), "=f"(wide[i].y), "=f"(wide[i].z), "=f"(wide[i].w)
                   : "l"((const float*)p + base + 4 * (first + i * stride)) : "memory");
    else
      asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                   : "=r"(narrow[i].x), "=r"(narrow[i].y)
                   : "l"((const uint16_t*)p + base + 4 * (first + i * stride)) : "memory");
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (type != 1)
      wide[i] = make_float4(bc_widen((uint16_t)narrow[i].x, type),
                            bc_widen((uint16_t)(narrow[i].x >> 16), type),
                            bc_widen((uint16_t)narrow[i].y, type),
                            bc_widen((uint16_t)(narrow[i].y >> 16), type));
    *(float4*)(out + 4 * i) = wide[i];
  }
}
BC_INLINE uint16_t bc_narrow(float v, int type) {
  uint16_t h;
  if (type == 16)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
  else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}
BC_INLINE void bc_store(void* p, int64_t i, float v, int type) {
  if (type == 1)
    ((float*)p)[i] = v;
  else
    ((uint16_t*)p)[i] = bc_narrow(v, type);
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
BC_INLINE int bc_load_int(const int* p, int64_t i) {
  int v;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(p + i) : "memory");
  return v;
}
BC_INLINE void bc_put_int(void* p, int64_t byte, int v) { *(int*)((char*)p + byte) = v; }
BC_INLINE void bc_load_int4(int* out, const void* p, int64_t byte) {
  asm volatile("ld.global.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "l"((const char*)p + byte) : "memory");
}

/* ---- shared memory --------------------------------------------------------------------------- */

BC_INLINE void bc_add_shared(int* p, int v) { atomicAdd(p, v); }
BC_INLINE void bc_load_shared4(float* out, const float* p) { *(float4*)out = *(const float4*)p; }
BC_INLINE void bc_store_shared4(float* p, const float* v) { *(float4*)p = *(const float4*)v; }
BC_INLINE uint bc_shared(const void* p) { return (uint)__cvta_generic_to_shared(p); }
BC_INLINE void bc_load_shared8(int* out, uint address) {
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[4]), "=r"(out[5]), "=r"(out[6]), "=r"(out[7])
               : "r"(address + 16) : "memory");
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

/* ---- arithmetic ------------------------------------------------------------------------------ */

/* rint(x * scale) in the int8 range; 0 for a NaN. */
BC_INLINE int bc_quantized(float x, float scale) {
  int q = __float2int_rn(__fmul_rn(x, scale));
  return q < -128 ? -128 : q > 127 ? 127 : q;
}
BC_INLINE int bc_pack(int a, int b, int c, int d) {
  return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;
}
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
/* fl(a / b), given y = fl(1 / b): two Newton steps on the quotient leave it correctly rounded as long
 * as nothing under- or overflows (P. Markstein, IA-64 and Elementary Functions, 2000, ch. 8). */
BC_INLINE float bc_divide(float a, float b, float y) {
  uint ea = (__float_as_uint(a) >> 23 & 255) - 77, eb = (__float_as_uint(b) >> 23 & 255) - 77;
  if (ea > 100 || eb > 100) return __fdiv_rn(a, b);
  float q = __fmul_rn(a, y);
  q = __fmaf_rn(__fmaf_rn(-q, b, a), y, q);
  return __fmaf_rn(__fmaf_rn(-q, b, a), y, q);
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
/* The same without shifts: low += w q[0..15], high += w q[16..31], where rows 8 to 15 of low, and
 * rows of high, count 4, 16 and 64 times. */
BC_INLINE void bc_mma_scaled(int* low, int* high, uint w, int b0, int b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+r"(low[0]), "+r"(low[1]), "+r"(low[2]), "+r"(low[3])
      : "r"(w & 0x03030303u), "r"(w & 0x0c0c0c0cu), "r"(b0));
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+r"(high[0]), "+r"(high[1]), "+r"(high[2]), "+r"(high[3])
      : "r"(w & 0x30303030u), "r"(w & 0xc0c0c0c0u), "r"(b1));
}
BC_INLINE void bc_load_matrix4(int* r, const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(bc_shared(p)) : "memory");
}
BC_INLINE void bc_copy_async16(void* to, const void* from, int64_t byte) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
               ::"r"(bc_shared(to)), "l"((const char*)from + byte) : "memory");
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
/* Copies `bytes` (a multiple of 16) and tells the barrier. */
BC_INLINE void bc_copy_bulk(void* to, const void* from, int64_t byte, int bytes, void* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bc_shared(barrier)),
               "r"(bytes) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          bc_shared(to)), "l"((const char*)from + byte), "r"(bytes), "r"(bc_shared(barrier))
      : "memory");
}
/* Bytes from p to the next multiple of 1024 in shared memory. */
BC_INLINE int bc_to_kilobyte(const void* p) { return (int)(-bc_shared(p) & 1023); }
/* Operand B in shared memory: rows of 128 bytes in the 128-byte swizzle, 8 rows a kilobyte. */
BC_INLINE uint64_t bc_describe(const void* p) {
  return (uint64_t)(bc_shared(p) >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
#endif
