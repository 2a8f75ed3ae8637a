//! AVX2: two taps of 8 values in one multiply-add a half weight.

use std::arch::x86_64::*;

use super::{Packed, TILE};
use crate::filter::PRECISION;
use crate::resize::GROUP;

/// Sums of the lower and upper halves.
#[derive(Clone, Copy)]
struct Sums {
    low: __m256i,
    high: __m256i,
}

impl Sums {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new() -> Sums {
        Sums { low: _mm256_set1_epi32(1 << (PRECISION - 1)), high: _mm256_setzero_si256() }
    }

    /// Adds taps 0 and 2 (`even`) and taps 1 and 3 (`odd`), pairs of 16-bit samples.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn add(&mut self, even: __m256i, odd: __m256i, weights: [__m256i; 4]) {
        let low = _mm256_add_epi32(
            _mm256_madd_epi16(even, weights[0]),
            _mm256_madd_epi16(odd, weights[1]),
        );
        let high = _mm256_add_epi32(
            _mm256_madd_epi16(even, weights[2]),
            _mm256_madd_epi16(odd, weights[3]),
        );
        self.low = _mm256_add_epi32(self.low, low);
        self.high = _mm256_add_epi32(self.high, high);
    }

    /// The results before clipping, 8 numbers of 32 bits.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn total(self) -> __m256i {
        let sum = _mm256_add_epi32(_mm256_slli_epi32::<15>(self.high), self.low);
        _mm256_srai_epi32::<{ PRECISION as i32 }>(sum)
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(words: &[u32]) -> [__m256i; 4] {
    [words[0], words[1], words[2], words[3]].map(|w| _mm256_set1_epi32(w as i32))
}

/// SAFETY: rows must hold 12 bytes for every tile and 4 more, `tiles` must reach to the end of
/// the taps, and `out` must hold 12 bytes for every output and 4 more (`super::horizontal`
/// checks it).
#[target_feature(enable = "avx2")]
pub unsafe fn horizontal(rows: [&[u8]; GROUP], taps: &Packed, tiles: &mut [u8], out: &mut [u8]) {
    let by_channel = _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1);
    let by_row = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let mask = _mm256_set1_epi16(0xff);
    let rows = rows.map(|row| row.as_ptr());
    for (t, tile) in tiles.chunks_exact_mut(TILE).enumerate() {
        for (row, lane) in rows.iter().zip(tile.chunks_exact_mut(16)) {
            // SAFETY: the caller promises 16 readable bytes here; a lane has 16.
            unsafe {
                let pixels = _mm_loadu_si128(row.add(t * 12).cast());
                let lane = lane.as_mut_ptr().cast();
                _mm_storeu_si128(lane, _mm_shuffle_epi8(pixels, by_channel));
            }
        }
    }
    let all = taps.starts.iter().zip(&taps.counts).zip(taps.words.chunks_exact(taps.stride * 4));
    for (x, ((&start, &count), words)) in all.enumerate() {
        let mut sums = [Sums::new(); 2];
        for (g, words) in words.chunks_exact(4).take(count as usize).enumerate() {
            let weights = broadcast(words);
            for (half, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the caller promises that the taps end within the tiles.
                let samples = unsafe {
                    let at = tiles.as_ptr().add((start as usize + g) * TILE + half * 32);
                    _mm256_loadu_si256(at.cast())
                };
                let even = _mm256_and_si256(samples, mask);
                sum.add(even, _mm256_srli_epi16::<8>(samples), weights);
            }
        }
        // The lanes are rows 0 and 1, and rows 2 and 3; packing puts 0, 2 and 1, 3 together.
        let words = _mm256_packs_epi32(sums[0].total(), sums[1].total());
        let bytes = _mm256_packus_epi16(words, words);
        let rows_02 = _mm256_castsi256_si128(bytes);
        let rows_13 = _mm256_extracti128_si256::<1>(bytes);
        let rows_0213 = _mm_unpacklo_epi64(rows_02, rows_13);
        let rows_0123 = _mm_shuffle_epi32::<0b11_01_10_00>(rows_0213);
        // SAFETY: the caller promises 16 writable bytes here.
        unsafe {
            let at = out.as_mut_ptr().add(x * 3 * GROUP);
            _mm_storeu_si128(at.cast(), _mm_shuffle_epi8(rows_0123, by_row));
        }
    }
}

/// SAFETY: every group of rows that is read must hold `out.len() * 4 + 64` bytes
/// (`super::vertical` checks it).
#[target_feature(enable = "avx2")]
pub unsafe fn vertical(rows: &[u8], stride: usize, taps: &Packed, index: usize, out: &mut [u8]) {
    let first = taps.starts[index] as usize;
    let words = &taps.words[index * taps.stride * 4..][..taps.counts[index] as usize * 4];
    let mask = _mm256_set1_epi16(0xff);
    for (i, out) in out.chunks_mut(16).enumerate() {
        let mut sums = [Sums::new(); 2];
        for (g, words) in words.chunks_exact(4).enumerate() {
            let weights = broadcast(words);
            for (k, sum) in sums.iter_mut().enumerate() {
                // SAFETY: within the group or its padding, by the caller's promise.
                let samples = unsafe {
                    let at = rows.as_ptr().add((first + g) * stride + (16 * i + 8 * k) * GROUP);
                    _mm256_loadu_si256(at.cast())
                };
                let even = _mm256_and_si256(samples, mask);
                sum.add(even, _mm256_srli_epi16::<8>(samples), weights);
            }
        }
        // Packing works within lanes: values 0-3, 8-11 and 4-7, 12-15 come together.
        let words = _mm256_packs_epi32(sums[0].total(), sums[1].total());
        let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
        let bytes = _mm_packus_epi16(
            _mm256_castsi256_si128(ordered),
            _mm256_extracti128_si256::<1>(ordered),
        );
        let mut values = [0u8; 16];
        // SAFETY: `values` has 16 bytes.
        unsafe { _mm_storeu_si128(values.as_mut_ptr().cast(), bytes) };
        let len = out.len();
        out.copy_from_slice(&values[..len]);
    }
}
