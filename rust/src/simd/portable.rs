//! The passes in plain Rust: what the others are tested against.

use super::Packed;
use crate::filter::PRECISION;
use crate::resize::GROUP;

const HALF: i32 = 1 << (PRECISION - 1);

#[inline(always)]
fn clip(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

pub fn horizontal(rows: [&[u8]; GROUP], taps: &Packed, out: &mut [u8]) {
    for (x, out) in out.chunks_exact_mut(3 * GROUP).take(taps.starts.len()).enumerate() {
        let weights = &taps.words[x * taps.stride * GROUP..][..taps.counts[x] as usize * GROUP];
        for (r, row) in rows.iter().enumerate() {
            let pixels = row[taps.starts[x] as usize * 3..].chunks_exact(3);
            let mut sums = [HALF; 3];
            for (w, p) in weights.iter().zip(pixels) {
                for (sum, value) in sums.iter_mut().zip(p) {
                    *sum = sum.wrapping_add((*w as i32).wrapping_mul(i32::from(*value)));
                }
            }
            for (c, sum) in sums.into_iter().enumerate() {
                out[c * GROUP + r] = clip(sum);
            }
        }
    }
}

pub fn vertical(rows: &[u8], stride: usize, taps: &Packed, index: usize, out: &mut [u8]) {
    let first = taps.starts[index] as usize;
    let count = taps.counts[index] as usize;
    let weights = &taps.words[index * taps.stride * GROUP..][..count * GROUP];
    for (i, value) in out.iter_mut().enumerate() {
        let mut sum = HALF;
        for (g, weights) in weights.chunks_exact(GROUP).enumerate() {
            let samples = &rows[(first + g) * stride + i * GROUP..][..GROUP];
            for (w, sample) in weights.iter().zip(samples) {
                sum = sum.wrapping_add((*w as i32).wrapping_mul(i32::from(*sample)));
            }
        }
        *value = clip(sum);
    }
}
