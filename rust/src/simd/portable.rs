//! The passes in plain Rust: what the others are tested against.

use super::{Packed, TILE};
use crate::filter::PRECISION;
use crate::resize::GROUP;

const HALF: i32 = 1 << (PRECISION - 1);

#[inline(always)]
fn clip(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

pub fn horizontal(rows: [&[u8]; GROUP], taps: &Packed, tiles: &mut [u8], out: &mut [u8]) {
    for (t, tile) in tiles.chunks_exact_mut(TILE).enumerate() {
        for (lane, row) in tile.chunks_exact_mut(16).zip(rows) {
            for (j, pixel) in row[t * 12..t * 12 + 12].chunks_exact(3).enumerate() {
                for (c, value) in pixel.iter().enumerate() {
                    lane[c * GROUP + j] = *value;
                }
            }
        }
    }
    for (x, out) in out.chunks_exact_mut(3 * GROUP).take(taps.starts.len()).enumerate() {
        let weights = &taps.words[x * taps.stride * GROUP..][..taps.counts[x] as usize * GROUP];
        let tiles = &tiles[taps.starts[x] as usize * TILE..];
        for (at, value) in out.iter_mut().enumerate() {
            let (c, r) = (at / GROUP, at % GROUP);
            let mut sum = HALF;
            for (w, tile) in weights.chunks_exact(GROUP).zip(tiles.chunks_exact(TILE)) {
                let samples = &tile[r * 16 + c * GROUP..][..GROUP];
                for (w, sample) in w.iter().zip(samples) {
                    sum = sum.wrapping_add((*w as i32).wrapping_mul(i32::from(*sample)));
                }
            }
            *value = clip(sum);
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
