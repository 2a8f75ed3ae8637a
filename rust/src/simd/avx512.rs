//! AVX-512 with VNNI: four taps of 16 values in one instruction a digit.

use std::arch::x86_64::*;

use super::{Packed, TILE};
use crate::filter::PRECISION;
use crate::resize::GROUP;

/// Sums of the three digits.
#[derive(Clone, Copy)]
struct Sums([__m512i; 3]);

impl Sums {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn new() -> Sums {
        Sums([
            _mm512_setzero_si512(),
            _mm512_setzero_si512(),
            _mm512_set1_epi32(1 << (PRECISION - 1)),
        ])
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn add(&mut self, samples: __m512i, weights: [__m512i; 3]) {
        for (sum, weight) in self.0.iter_mut().zip(weights) {
            *sum = _mm512_dpbusd_epi32(*sum, samples, weight);
        }
    }

    /// The clipped results, 16 bytes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn clip(self) -> __m128i {
        let [a, b, c] = self.0;
        let upper = _mm512_add_epi32(_mm512_slli_epi32::<8>(a), b);
        let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(upper), c);
        let value = _mm512_srai_epi32::<PRECISION>(sum);
        _mm512_cvtusepi32_epi8(_mm512_max_epi32(value, _mm512_setzero_si512()))
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn broadcast(words: &[u32]) -> [__m512i; 3] {
    [words[0], words[1], words[2]].map(|w| _mm512_set1_epi32(w as i32))
}

/// SAFETY: rows must hold 12 bytes for every tile and 4 more, `tiles` must reach to the end of
/// the taps, and `out` must hold 12 bytes for every output and 4 more (`super::horizontal`
/// checks it).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn horizontal(rows: [&[u8]; GROUP], taps: &Packed, tiles: &mut [u8], out: &mut [u8]) {
    let by_channel =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
    let by_row = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let rows = rows.map(|row| row.as_ptr());
    for (t, tile) in tiles.chunks_exact_mut(TILE).enumerate() {
        // SAFETY: the caller promises 16 readable bytes here; a tile has 64.
        unsafe {
            let load = |row: *const u8| _mm_loadu_si128(row.add(t * 12).cast());
            let low = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(load(rows[0])), load(rows[1]));
            let mid = _mm512_inserti32x4::<2>(low, load(rows[2]));
            let all = _mm512_inserti32x4::<3>(mid, load(rows[3]));
            _mm512_storeu_si512(tile.as_mut_ptr().cast(), _mm512_shuffle_epi8(all, by_channel));
        }
    }
    let all = taps.starts.iter().zip(&taps.counts).zip(taps.words.chunks_exact(taps.stride * 3));
    for (x, ((&start, &count), words)) in all.enumerate() {
        let mut sums = Sums::new();
        for (g, words) in words.chunks_exact(3).take(count as usize).enumerate() {
            // SAFETY: the caller promises that the taps end within the tiles.
            let tile = unsafe {
                _mm512_loadu_si512(tiles.as_ptr().add((start as usize + g) * TILE).cast())
            };
            sums.add(tile, broadcast(words));
        }
        let values = _mm_shuffle_epi8(sums.clip(), by_row);
        // SAFETY: the caller promises 16 writable bytes here.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().add(x * 3 * GROUP).cast(), values) };
    }
}

/// SAFETY: every group of rows that is read must hold `out.len() * 4 + 64` bytes
/// (`super::vertical` checks it).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn vertical(rows: &[u8], stride: usize, taps: &Packed, index: usize, out: &mut [u8]) {
    const WIDE: usize = 4;
    let first = taps.starts[index] as usize;
    let words = &taps.words[index * taps.stride * 3..][..taps.counts[index] as usize * 3];
    // SAFETY: a pointer into `rows`, at the first group that is read.
    let base = unsafe { rows.as_ptr().add(first * stride) };
    let mut done = 0;
    while done + 16 * WIDE <= out.len() {
        let mut sums = [Sums::new(); WIDE];
        for (g, words) in words.chunks_exact(3).enumerate() {
            let weights = broadcast(words);
            for (k, sum) in sums.iter_mut().enumerate() {
                // SAFETY: within the group, by the caller's promise.
                let at = unsafe { base.add(g * stride + (done + 16 * k) * GROUP) };
                sum.add(unsafe { _mm512_loadu_si512(at.cast()) }, weights);
            }
        }
        for sum in sums {
            // SAFETY: `done` + 16 is at most the length of `out`, by the loop's condition.
            unsafe { _mm_storeu_si128(out.as_mut_ptr().add(done).cast(), sum.clip()) };
            done += 16;
        }
    }
    while done < out.len() {
        let mut sum = Sums::new();
        for (g, words) in words.chunks_exact(3).enumerate() {
            // SAFETY: within the group or its padding, by the caller's promise.
            let at = unsafe { base.add(g * stride + done * GROUP) };
            sum.add(unsafe { _mm512_loadu_si512(at.cast()) }, broadcast(words));
        }
        let rest = (out.len() - done).min(16);
        let mask = (0xffff_u32 >> (16 - rest)) as u16;
        // SAFETY: the mask leaves out what lies behind the end of `out`.
        unsafe { _mm_mask_storeu_epi8(out.as_mut_ptr().add(done).cast(), mask, sum.clip()) };
        done += rest;
    }
}
