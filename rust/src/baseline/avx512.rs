//! libjpeg-turbo's accurate inverse transform for four blocks at a time.
//!
//! A vector holds the same row of four blocks, one in each 128-bit lane, so that nothing crosses
//! lanes. Every step is that of `jsimd_idct_islow_avx2`, wrapping and saturating where that does:
//! the sums are the same modulo 2^32 in whichever order they are taken.

use std::arch::x86_64::*;

const CONST_BITS: u32 = 13;
const PASS1_BITS: u32 = 2;

/// `value` in units of 2^-13, as libjpeg rounds its constants.
const fn fix(value: f64) -> i32 {
    (value * (1 << CONST_BITS) as f64 + 0.5) as i32
}

const F_0_298: i32 = fix(0.298631336);
const F_0_390: i32 = fix(0.390180644);
const F_0_541: i32 = fix(0.541196100);
const F_0_765: i32 = fix(0.765366865);
const F_0_899: i32 = fix(0.899976223);
const F_1_175: i32 = fix(1.175875602);
const F_1_501: i32 = fix(1.501321110);
const F_1_847: i32 = fix(1.847759065);
const F_1_961: i32 = fix(1.961570560);
const F_2_053: i32 = fix(2.053119869);
const F_2_562: i32 = fix(2.562915447);
const F_3_072: i32 = fix(3.072711026);

/// Sums of 32 bits for the lower and the upper four numbers of each lane.
#[derive(Clone, Copy)]
struct Wide {
    low: __m512i,
    high: __m512i,
}

impl Wide {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn pairs(a: __m512i, b: __m512i) -> Wide {
        Wide { low: _mm512_unpacklo_epi16(a, b), high: _mm512_unpackhi_epi16(a, b) }
    }

    /// Adds `x * a + y * b` for pairs of `a` and `b`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn add(self, pairs: Wide, x: i32, y: i32) -> Wide {
        let weights = _mm512_set1_epi32(x & 0xffff | y << 16);
        Wide {
            low: _mm512_dpwssd_epi32(self.low, pairs.low, weights),
            high: _mm512_dpwssd_epi32(self.high, pairs.high, weights),
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn product(pairs: Wide, x: i32, y: i32) -> Wide {
        let weights = _mm512_set1_epi32(x & 0xffff | y << 16);
        Wide {
            low: _mm512_madd_epi16(pairs.low, weights),
            high: _mm512_madd_epi16(pairs.high, weights),
        }
    }

    /// `value` and one half of the last bit that `SHIFT` leaves, in units of 2^-13.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn mean<const SHIFT: u32>(value: __m512i) -> Wide {
        let Wide { low, high } = Wide::pairs(_mm512_setzero_si512(), value);
        let half = _mm512_set1_epi32(1 << (SHIFT - 1));
        let widen = |v| _mm512_add_epi32(_mm512_srai_epi32::<{ 16 - CONST_BITS }>(v), half);
        Wide { low: widen(low), high: widen(high) }
    }

    /// The sum and the difference, shifted down and packed to 16 bits.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn butterfly<const SHIFT: u32>(self, other: Wide) -> (__m512i, __m512i) {
        let low = _mm512_srai_epi32::<SHIFT>(_mm512_add_epi32(self.low, other.low));
        let high = _mm512_srai_epi32::<SHIFT>(_mm512_add_epi32(self.high, other.high));
        let sum = _mm512_packs_epi32(low, high);
        let low = _mm512_srai_epi32::<SHIFT>(_mm512_sub_epi32(self.low, other.low));
        let high = _mm512_srai_epi32::<SHIFT>(_mm512_sub_epi32(self.high, other.high));
        (sum, _mm512_packs_epi32(low, high))
    }
}

/// One dimension: from eight coefficients to eight samples, all columns at once.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn pass<const SHIFT: u32>(v: [__m512i; 8]) -> [__m512i; 8] {
    let pairs = Wide::pairs(v[2], v[6]);
    let plus = Wide::mean::<SHIFT>(_mm512_add_epi16(v[0], v[4]));
    let minus = Wide::mean::<SHIFT>(_mm512_sub_epi16(v[0], v[4]));
    let (a, b, c) = (F_0_541 + F_0_765, F_0_541, F_0_541 - F_1_847);
    let even = [
        plus.add(pairs, a, b),
        minus.add(pairs, b, c),
        minus.add(pairs, -b, -c),
        plus.add(pairs, -a, -b),
    ];
    let pairs = Wide::pairs(_mm512_add_epi16(v[7], v[3]), _mm512_add_epi16(v[5], v[1]));
    let z3 = Wide::product(pairs, F_1_175 - F_1_961, F_1_175);
    let z4 = Wide::product(pairs, F_1_175, F_1_175 - F_0_390);
    let outer = Wide::pairs(v[7], v[1]);
    let inner = Wide::pairs(v[5], v[3]);
    let odd = [
        z4.add(outer, -F_0_899, F_1_501 - F_0_899),
        z3.add(inner, -F_2_562, F_3_072 - F_2_562),
        z4.add(inner, F_2_053 - F_2_562, -F_2_562),
        z3.add(outer, F_0_298 - F_0_899, -F_0_899),
    ];
    let (v0, v7) = even[0].butterfly::<SHIFT>(odd[0]);
    let (v1, v6) = even[1].butterfly::<SHIFT>(odd[1]);
    let (v2, v5) = even[2].butterfly::<SHIFT>(odd[2]);
    let (v3, v4) = even[3].butterfly::<SHIFT>(odd[3]);
    [v0, v1, v2, v3, v4, v5, v6, v7]
}

/// Turns the rows of each lane into its columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn transpose(v: [__m512i; 8]) -> [__m512i; 8] {
    let low = |a, b| _mm512_unpacklo_epi16(v[a], v[b]);
    let high = |a, b| _mm512_unpackhi_epi16(v[a], v[b]);
    let v = [
        low(0, 1),
        high(0, 1),
        low(2, 3),
        high(2, 3),
        low(4, 5),
        high(4, 5),
        low(6, 7),
        high(6, 7),
    ];
    let low = |a, b| _mm512_unpacklo_epi32(v[a], v[b]);
    let high = |a, b| _mm512_unpackhi_epi32(v[a], v[b]);
    let v = [
        low(0, 2),
        high(0, 2),
        low(1, 3),
        high(1, 3),
        low(4, 6),
        high(4, 6),
        low(5, 7),
        high(5, 7),
    ];
    let low = |a, b| _mm512_unpacklo_epi64(v[a], v[b]);
    let high = |a, b| _mm512_unpackhi_epi64(v[a], v[b]);
    [low(0, 4), high(0, 4), low(1, 5), high(1, 5), low(2, 6), high(2, 6), low(3, 7), high(3, 7)]
}

/// Transforms four blocks, row r of block k in `[r * 32 + k * 8..][..8]`, and leaves zeros in
/// their place; row r of the pixels of block k is `[r / 2 * 64 + k * 16 + r % 2 * 8..][..8]`.
/// `false`, and nothing done, where libjpeg-turbo takes a short cut that wraps where this would
/// not, as it does in damaged files only.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub fn idct(quant: &[i16; 256], blocks: &mut [i16; 256], out: &mut [u8; 256]) -> bool {
    let blocks = blocks.as_mut_ptr().cast::<__m512i>();
    let quant = quant.as_ptr().cast::<__m512i>();
    // SAFETY: both hold eight vectors.
    let v: [__m512i; 8] = std::array::from_fn(|row| unsafe {
        _mm512_mullo_epi16(_mm512_loadu_si512(blocks.add(row)), _mm512_loadu_si512(quant.add(row)))
    });
    let (lifted, limit) =
        (_mm512_add_epi16(v[0], _mm512_set1_epi16(8192)), _mm512_set1_epi16(16383));
    if _mm512_cmpgt_epu16_mask(lifted, limit) != 0 {
        return false;
    }
    let v = transpose(pass::<{ CONST_BITS - PASS1_BITS }>(v));
    let v = transpose(pass::<{ CONST_BITS + PASS1_BITS + 3 }>(v));
    let centre = _mm512_set1_epi8(-128);
    let out = out.as_mut_ptr().cast::<__m512i>();
    for i in 0..4 {
        let bytes = _mm512_add_epi8(_mm512_packs_epi16(v[2 * i], v[2 * i + 1]), centre);
        // SAFETY: as above; the pixels take four vectors.
        unsafe { _mm512_storeu_si512(out.add(i), bytes) };
    }
    for row in 0..8 {
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(blocks.add(row), _mm512_setzero_si512()) };
    }
    true
}
