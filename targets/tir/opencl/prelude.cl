/* What every kernel calls: dot products of bytes, and division and square root rounded to nearest
 * even, which OpenCL gives only within 2.5 and 3 units in the last place (OpenCL C, 7.4). */
#pragma OPENCL FP_CONTRACT OFF

/* BC_DOT: 1 cl_khr_integer_dot_product, 2 cl_arm_integer_dot_product_accumulate_int8,
 * 3 cl_qcom_dot_product8, 4 cl_arm_integer_dot_product_int8, 0 plain arithmetic.
 *
 * int bc_dot4(uint w, uint a, int c): c + the sum of four products of signed bytes of w and a.
 * int bc_dot4_code(...): the same for bytes of w from 0 to 127, signed or not. */
#ifndef BC_DOT
#define BC_DOT 0
#endif
inline int bc_dot4_plain(uint w, uint a, int c) {
  int4 p = convert_int4(as_char4(w)) * convert_int4(as_char4(a));
  return c + ((p.s0 + p.s1) + (p.s2 + p.s3));
}
#if BC_DOT == 1
#define bc_dot4(w, a, c) ((c) + dot_4x8packed_ss_int((uint)(w), (uint)(a)))
#define bc_dot4_code(w, a, c) ((c) + dot_4x8packed_us_int((uint)(w), (uint)(a)))
#elif BC_DOT == 2
#pragma OPENCL EXTENSION cl_arm_integer_dot_product_accumulate_int8 : enable
#define bc_dot4(w, a, c) arm_dot_acc(as_char4((uint)(w)), as_char4((uint)(a)), (int)(c))
#define bc_dot4_code bc_dot4
#elif BC_DOT == 3
#pragma OPENCL EXTENSION cl_qcom_dot_product8 : enable
#define bc_dot4 bc_dot4_plain
#define bc_dot4_code(w, a, c) qcom_dot8_acc((uint)(a), (uint)(w), (int)(c))
#elif BC_DOT == 4
#pragma OPENCL EXTENSION cl_arm_integer_dot_product_int8 : enable
#define bc_dot4(w, a, c) ((c) + arm_dot(as_char4((uint)(w)), as_char4((uint)(a))))
#define bc_dot4_code bc_dot4
#else
#define bc_dot4 bc_dot4_plain
#define bc_dot4_code bc_dot4_plain
#endif

/* Four 4-bit codes, each alone in its byte, less 8: as four signed bytes. */
inline uint bc_nibbles(uint codes) {
  uint low = codes ^ 0x08080808u; /* code - 8 in two's complement of 4 bits */
  return low | (low & 0x08080808u) * 0x1eu;
}

/* The device's own division; tests put a bad one in its place. */
#ifndef BC_DIVIDE
#define BC_DIVIDE(a, b) ((a) / (b))
#endif

/* The float of exponent field e and significand m, 2**26 <= m < 2**27 with a sticky last bit: m / 8
 * rounded to nearest even, or less of it where the number is denormal. */
inline uint bc_round(uint m, int e) {
  int shift = e > 0 ? 3 : 4 - e;
  if (shift > 28) return 0;
  uint kept = m >> shift, rest = m & ((1u << shift) - 1u), half_way = 1u << (shift - 1);
  kept += rest > half_way || (rest == half_way && (kept & 1u));
  /* A carry into bit 24, or out of the denormals, steps the exponent by itself. */
  return e > 0 ? kept + ((uint)(e - 1) << 23) : kept;
}

/* The 24-bit significand of a finite number, and its exponent, denormals normalised. */
inline uint bc_significand(uint bits, int *e) {
  uint m = bits & 0x7fffffu;
  *e = (int)(bits >> 23 & 255u);
  if (*e) return m | 0x800000u;
  int k = (int)clz(m) - 8;
  *e = 1 - k;
  return m << k;
}

/* a / b where an operand or the quotient is not a normal number: long division. */
inline float bc_divide_rare(float a, float b) {
  uint ua = as_uint(a) & 0x7fffffffu, ub = as_uint(b) & 0x7fffffffu;
  if (ua == 0 || ub == 0 || ua >= 0x7f800000u || ub >= 0x7f800000u) return a / b;
  int ea, eb;
  uint rest = bc_significand(ua, &ea), divisor = bc_significand(ub, &eb), q = 0;
  int e = ea - eb + 127;
  if (rest < divisor) {
    rest <<= 1;
    e--;
  }
  for (int i = 0; i < 27; i++) {
    uint bit = rest >= divisor;
    q = q << 1 | bit;
    rest = (rest - (bit ? divisor : 0u)) << 1;
  }
  uint bits = e > 254 ? 0x7f800000u : bc_round(q | (rest != 0), e);
  return as_float(bits | ((as_uint(a) ^ as_uint(b)) & 0x80000000u));
}

/* a / b. Significands in [1, 2) keep every step in the normal range; one Newton step brings the
 * device's quotient within one unit, where the residual x - y q is exact in a fused multiply-add
 * (Markstein, IBM J. Res. Dev. 34, 1990), and decides between q and its neighbour: q is the nearer
 * if |x - y q| is at most half of what y times the step to the neighbour is. No quotient lies half
 * way between two floats. */
inline float bc_divide(float a, float b) {
  uint ua = as_uint(a), ub = as_uint(b);
  int ea = (int)(ua >> 23 & 255u), eb = (int)(ub >> 23 & 255u), e = ea - eb;
  if (ea == 0 || eb == 0 || ea == 255 || eb == 255 || e < -125 || e > 127)
    return bc_divide_rare(a, b);
  float x = as_float((ua & 0x7fffffu) | 0x3f800000u), y = as_float((ub & 0x7fffffu) | 0x3f800000u);
  float q = BC_DIVIDE(x, y);
  q = q + BC_DIVIDE(fma(-y, q, x), y);
  float r = fma(-y, q, x);
  float next = as_float(as_int(q) + (r > 0.0f ? 1 : -1));
  if (2.0f * fabs(r) > y * fabs(next - q)) q = next;
  return as_float((as_uint(q) + ((uint)e << 23)) | ((ua ^ ub) & 0x80000000u));
}

/* The square root, digit by digit in integers. It is never half way between two floats. */
inline float bc_sqrt(float a) {
  uint ua = as_uint(a);
  if (ua == 0 || ua >= 0x7f800000u) return sqrt(a); /* 0, Inf, NaN and negative numbers */
  int e;
  uint m = bc_significand(ua, &e) << 7, root = 0, rest = 0; /* m: 1.f at bit 30 */
  if (!(e & 1)) m <<= 1; /* an even exponent of the radicand in [1, 4) */
  for (int i = 0; i < 24; i++) {
    rest = rest << 2 | m >> 30;
    m <<= 2;
    uint trial = root << 2 | 1u, bit = rest >= trial;
    rest -= bit ? trial : 0u;
    root = root << 1 | bit;
  }
  root += rest > root;
  /* root = sqrt * 2**23; a carry to 2**24 steps the exponent. */
  return as_float(root + ((uint)((e + 126 + (e & 1)) / 2 - 1) << 23));
}
