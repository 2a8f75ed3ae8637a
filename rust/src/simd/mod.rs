//! The two passes of the resize for each instruction set, chosen at run time.
//!
//! A weight has 23 bits and a sign, too many for one multiply-add instruction. It is split so
//! that exact 32-bit sums come back together: AVX2 takes `hi * 2^15 + lo` as two 16-bit numbers,
//! AVX-512 takes `a * 2^16 + b * 2^8 + c` as three signed bytes. All sums wrap at 32 bits, as
//! their total never leaves them.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::filter::Taps;
use crate::resize::{GROUP, PAD};

/// An instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Portable,
    Avx2,
    Avx512,
}

impl Level {
    pub const ALL: [Level; 3] = [Level::Portable, Level::Avx2, Level::Avx512];

    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
        }
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Level::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The best of this processor, or the one that was chosen.
    pub fn current() -> Level {
        let chosen = CHOSEN.load(Ordering::Relaxed);
        if let Some(level) = Level::ALL.get(usize::from(chosen)) {
            return *level;
        }
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| {
            let mut levels = Level::ALL.into_iter().filter(|level| level.is_available());
            levels.next_back().unwrap_or(Level::Portable)
        })
    }

    /// Chooses the level, or the best with `None`: for tests and benchmarks, the pixels are the
    /// same. `false` if this processor does not have it.
    pub fn choose(level: Option<Level>) -> bool {
        if !level.is_none_or(Level::is_available) {
            return false;
        }
        CHOSEN.store(level.map_or(BEST, |level| level as u8), Ordering::Relaxed);
        true
    }
}

const BEST: u8 = u8::MAX;
static CHOSEN: AtomicU8 = AtomicU8::new(BEST);

/// Weights as a level's instructions want them, in groups of four.
#[derive(Debug, Default)]
pub struct Packed {
    /// Each output's first group of four pixels or rows.
    pub starts: Vec<u32>,
    /// Groups of each output.
    pub counts: Vec<u32>,
    /// Groups reserved for each output.
    pub stride: usize,
    /// The weights, `words_per_group` each.
    pub words: Vec<u32>,
    /// One past the last group that any output reads.
    end: usize,
    level: Option<Level>,
}

fn words_per_group(level: Level) -> usize {
    match level {
        Level::Portable => 4,
        Level::Avx2 => 4,
        Level::Avx512 => 3,
    }
}

impl Packed {
    /// Packs `taps`, whose starts count from `origin`, into groups that begin at multiples of
    /// four behind the origin.
    pub fn fill(&mut self, taps: &Taps, origin: usize, level: Level) {
        let words = words_per_group(level);
        self.level = Some(level);
        self.stride = taps.stride.div_ceil(GROUP) + 1;
        self.end = 0;
        self.starts.clear();
        self.counts.clear();
        self.words.clear();
        self.words.resize(taps.starts.len() * self.stride * words, 0);
        for (i, (&start, &len)) in taps.starts.iter().zip(&taps.lens).enumerate() {
            let start = start as usize - origin;
            let lead = start % GROUP;
            let count = (lead + len as usize).div_ceil(GROUP);
            self.starts.push((start / GROUP) as u32);
            self.counts.push(count as u32);
            self.end = self.end.max(start / GROUP + count);
            let weights = &taps.weights[i * taps.stride..][..len as usize];
            let out = &mut self.words[i * self.stride * words..][..count * words];
            for (g, out) in out.chunks_exact_mut(words).enumerate() {
                let weight = |j: usize| {
                    (g * GROUP + j)
                        .checked_sub(lead)
                        .and_then(|at| weights.get(at))
                        .map_or(0, |w| *w)
                };
                pack(std::array::from_fn(weight), level, out);
            }
        }
    }
}

#[inline(always)]
fn pack(weights: [i32; 4], level: Level, out: &mut [u32]) {
    match level {
        Level::Portable => {
            for (o, w) in out.iter_mut().zip(weights) {
                *o = w as u32;
            }
        }
        Level::Avx2 => {
            let low = |w: i32| (w & 0x7fff) as u32;
            let high = |w: i32| ((w >> 15) as u32) & 0xffff;
            let [a, b, c, d] = weights;
            out.copy_from_slice(&[
                low(a) | low(c) << 16,
                low(b) | low(d) << 16,
                high(a) | high(c) << 16,
                high(b) | high(d) << 16,
            ]);
        }
        Level::Avx512 => {
            out.fill(0);
            for (j, w) in weights.into_iter().enumerate() {
                let c = w as i8;
                let rest = (w - i32::from(c)) >> 8;
                let b = rest as i8;
                let a = (rest - i32::from(b)) >> 8;
                debug_assert!(i8::try_from(a).is_ok(), "weights lie within -2 to 2");
                for (o, digit) in out.iter_mut().zip([a as i8, b, c]) {
                    *o |= u32::from(digit as u8) << (8 * j);
                }
            }
        }
    }
}

/// Bytes of a group of four pixels of four rows: the four pixels' red of a row, then their green,
/// blue and four bytes of nothing, then the next row.
pub const TILE: usize = 64;

/// The horizontal pass over a group of rows, with `PAD` readable bytes behind the last pixel.
/// Output pixel x takes bytes 12x to 12x + 11 of `out`: the four rows' red, then green, then
/// blue; four bytes behind the last may be overwritten. `tiles` is scratch.
pub fn horizontal(rows: [&[u8]; GROUP], taps: &Packed, tiles: &mut Vec<u8>, out: &mut [u8]) {
    assert!(rows.iter().all(|row| row.len() >= taps.end * GROUP * 3 + 4));
    assert!(out.len() >= taps.starts.len() * 3 * GROUP + 4);
    if tiles.len() < taps.end * TILE {
        tiles.resize(taps.end * TILE, 0);
    }
    let tiles = &mut tiles[..taps.end * TILE];
    match taps.level.expect("packed") {
        Level::Portable => portable::horizontal(rows, taps, tiles, out),
        // SAFETY: the level was packed for, so it is available; lengths are checked above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::horizontal(rows, taps, tiles, out) },
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::horizontal(rows, taps, tiles, out) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("not available here"),
    }
}

/// The vertical pass for output row `index`: `rows` holds groups of four interleaved rows, one
/// each `stride` bytes.
pub fn vertical(rows: &[u8], stride: usize, taps: &Packed, index: usize, out: &mut [u8]) {
    let end = taps.starts[index] as usize + taps.counts[index] as usize;
    assert!(out.len() * GROUP + PAD <= stride && end * stride <= rows.len());
    match taps.level.expect("packed") {
        Level::Portable => portable::vertical(rows, stride, taps, index, out),
        // SAFETY: the level was packed for, so it is available; lengths are checked above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::vertical(rows, stride, taps, index, out) },
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::vertical(rows, stride, taps, index, out) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("not available here"),
    }
}
