//! libjpeg-turbo's own AVX2 kernels, so that the pixels are libjpeg's to the last bit.

use std::ffi::c_int;

use super::header::{Aligned, ZIGZAG, ZIGZAG_OF_FOUR};
#[cfg(target_arch = "x86_64")]
use super::{avx512, colour};
use crate::simd::Level;

/// Bytes that must be readable and writable behind the samples of a row.
pub const MARGIN: usize = 96;

type Row = *mut u8;

// SAFETY of this block: the declarations mirror libjpeg-turbo's simd/jsimd.h, whose functions
// are in the static library; they may be called where the processor has AVX2.
unsafe extern "C" {
    fn jsimd_idct_islow_avx2(quant: *const i16, block: *const i16, out: *const Row, column: u32);
    fn jsimd_idct_4x4_sse2(quant: *const i16, block: *const i16, out: *const Row, column: u32);
    fn jsimd_idct_2x2_sse2(quant: *const i16, block: *const i16, out: *const Row, column: u32);
    fn jsimd_h2v1_fancy_upsample_avx2(
        rows: c_int,
        width: u32,
        input: *const Row,
        output: *const *const Row,
    );
    fn jsimd_h2v2_fancy_upsample_avx2(
        rows: c_int,
        width: u32,
        input: *const Row,
        output: *const *const Row,
    );
    fn jsimd_ycc_extrgb_convert_avx2(
        width: u32,
        input: *const *const Row,
        row: u32,
        output: *const Row,
        rows: c_int,
    );
}

#[derive(Debug)]
#[repr(align(64))]
struct Blocks([i16; 288]);

/// Blocks of one component on their way to pixels: four together where the processor transforms
/// four at once, else one.
#[derive(Debug)]
pub struct Queue {
    /// Row r of block k of four is `[r * 32 + k * 8..][..8]`, row r of one alone `[r * 8..][..8]`;
    /// with room for 256 numbers from each block's first on.
    blocks: Blocks,
    /// Row and column of each block's first pixel.
    places: [(usize, usize); 4],
    count: usize,
    quant: Aligned,
    quant_of_four: Option<[i16; 256]>,
}

impl Queue {
    /// For blocks that become `side` pixels a side.
    pub fn new(quant: &Aligned, side: usize) -> Queue {
        let four = side == 8 && Level::current() == Level::Avx512;
        let spread = || std::array::from_fn(|i| quant.0[i / 32 * 8 + i % 8]);
        Queue {
            blocks: Blocks([0; 288]),
            places: [(0, 0); 4],
            count: 0,
            quant: *quant,
            quant_of_four: four.then(spread),
        }
    }

    /// Where the next block's coefficients go, which are zero, and their order.
    #[inline(always)]
    pub fn next(&mut self) -> (&'static [u8; 80], &mut [i16; 256]) {
        let order = if self.quant_of_four.is_some() { &ZIGZAG_OF_FOUR } else { &ZIGZAG };
        let at = self.count * 8;
        (order, (&mut self.blocks.0[at..at + 256]).try_into().expect("of that length"))
    }

    /// The quantisation step of the mean.
    pub fn step(&self) -> i32 {
        i32::from(self.quant.0[0])
    }

    /// Drops the next block.
    pub fn clear(&mut self) {
        self.blocks.0 = [0; 288];
    }

    /// Takes the next block, of mean `mean`, for the pixels from `place` (row and column) on.
    #[inline(always)]
    pub fn push(&mut self, mean: i16, place: (usize, usize), side: usize, plane: &mut Plane) {
        self.blocks.0[self.count * 8] = mean;
        if self.quant_of_four.is_none() {
            plane.put_block(place, side, &self.quant, &self.blocks);
            self.blocks.0[..64].fill(0);
            return;
        }
        self.places[self.count] = place;
        self.count += 1;
        if self.count == 4 {
            self.flush(plane);
        }
    }

    /// Makes the pixels of all blocks.
    pub fn flush(&mut self, plane: &mut Plane) {
        let Some(quant) = self.quant_of_four.as_ref().filter(|_| self.count > 0) else { return };
        #[cfg(target_arch = "x86_64")]
        {
            let mut pixels = [0; 256];
            let blocks = self.blocks.0.first_chunk_mut().expect("of more than that length");
            // SAFETY: there is such a table where the processor has what `Level::Avx512` asks for.
            if unsafe { avx512::idct(quant, blocks, &mut pixels) } {
                for (k, place) in self.places[..self.count].iter().enumerate() {
                    plane.put_pixels(*place, &pixels, k);
                }
            } else {
                self.flush_each(plane);
            }
        }
        self.count = 0;
    }

    /// By libjpeg-turbo's kernel for one.
    #[cold]
    fn flush_each(&mut self, plane: &mut Plane) {
        for (k, place) in self.places[..self.count].iter().enumerate() {
            let mut block = Blocks([0; 288]);
            for (row, out) in block.0[..64].chunks_exact_mut(8).enumerate() {
                out.copy_from_slice(&self.blocks.0[row * 32 + k * 8..][..8]);
            }
            plane.put_block(*place, 8, &self.quant, &block);
        }
        self.clear();
    }
}

/// Rows of one component, `MARGIN` bytes behind each.
#[derive(Debug, Default)]
pub struct Plane {
    samples: Vec<u8>,
    stride: usize,
    rows: usize,
}

impl Plane {
    pub fn resize(&mut self, width: usize, rows: usize) {
        self.stride = (width + MARGIN).next_multiple_of(32);
        self.rows = rows;
        if self.samples.len() < self.stride * rows {
            self.samples.resize(self.stride * rows, 0);
        }
    }

    fn row(&mut self, row: usize) -> Row {
        assert!(row < self.rows);
        self.samples[row * self.stride..][..self.stride].as_mut_ptr()
    }

    pub fn samples(&self, row: usize) -> &[u8] {
        &self.samples[row * self.stride..][..self.stride]
    }

    /// Moves the rows from `from` on to the top.
    pub fn keep(&mut self, from: usize) {
        self.samples.copy_within(from * self.stride..self.rows * self.stride, 0);
    }

    /// Writes the pixels of a block whose coefficients begin `block` to the `side` rows from
    /// `place` on: 8, or 4 or 2 of a picture that is scaled.
    fn put_block(
        &mut self,
        (row, column): (usize, usize),
        side: usize,
        quant: &Aligned,
        block: &Blocks,
    ) {
        let stride = self.stride;
        assert!(column + 8 <= stride);
        let samples = self.samples[row * stride..][..side * stride].as_mut_ptr();
        // SAFETY: the slice holds all rows that are used; the others repeat the last.
        let rows: [Row; 8] =
            std::array::from_fn(|i| unsafe { samples.add(i.min(side - 1) * stride) });
        let kernel = match side {
            8 => jsimd_idct_islow_avx2,
            4 => jsimd_idct_4x4_sse2,
            2 => jsimd_idct_2x2_sse2,
            _ => unreachable!("a block of one pixel has only a mean"),
        };
        // SAFETY: both arrays are aligned, and all rows hold `column + 8` bytes.
        unsafe { kernel(quant.0.as_ptr(), block.0.as_ptr(), rows.as_ptr(), column as u32) };
    }

    /// Writes block `k` of four, in the order that `avx512::idct` leaves.
    #[inline(always)]
    fn put_pixels(&mut self, (row, column): (usize, usize), pixels: &[u8; 256], k: usize) {
        let stride = self.stride;
        let samples = &mut self.samples[row * stride + column..][..7 * stride + 8];
        for i in 0..8 {
            let from = &pixels[i / 2 * 64 + k * 16 + i % 2 * 8..][..8];
            samples[i * stride..][..8].copy_from_slice(from);
        }
    }

    /// Writes a block that has only a mean, given as its product with the quantisation step.
    pub fn put_mean(&mut self, row: usize, column: usize, side: usize, mean: i32) {
        let value = (((mean + 4) >> 3) + 128).clamp(0, 255) as u8;
        for row in self.samples[row * self.stride..].chunks_mut(self.stride).take(side) {
            row[column..column + side].fill(value);
        }
    }

    /// Doubles the width of row `row` of `input` into row 0.
    fn upsample_row(&mut self, input: &mut Plane, row: usize, width: usize) {
        assert!(width + 32 <= input.stride && 2 * width + 64 <= self.stride);
        let (source, target) = ([input.row(row)], [self.row(0)]);
        // SAFETY: the rows are long enough for whole vectors of 32 samples in, 64 out.
        unsafe {
            jsimd_h2v1_fancy_upsample_avx2(1, width as u32, source.as_ptr(), &target.as_ptr());
        }
    }

    /// Doubles row `row` of `input` both ways, into rows 0 and 1, by its neighbours `above` and
    /// `below`.
    fn upsample_rows(&mut self, input: &mut Plane, [above, row, below]: [usize; 3], width: usize) {
        assert!(width + 32 <= input.stride && 2 * width + 64 <= self.stride);
        let source = [input.row(above), input.row(row), input.row(below)];
        let target = [self.row(0), self.row(1)];
        // SAFETY: as above; the kernel reads one row before and one behind the pointer.
        unsafe {
            jsimd_h2v2_fancy_upsample_avx2(
                2,
                width as u32,
                source.as_ptr().add(1),
                &target.as_ptr(),
            );
        }
    }
}

/// Bytes that may be written behind a row of RGB.
pub const SLACK: usize = 192;

/// Rows of luma and chroma to RGB: where the processor can, at once.
#[derive(Debug, Default)]
pub struct Colour {
    #[cfg(target_arch = "x86_64")]
    sums: Option<[[colour::Sums; 2]; 2]>,
    upsampled: [Plane; 2],
}

impl Colour {
    /// For rows of up to `width` pixels.
    pub fn start(&mut self, width: usize) {
        #[cfg(target_arch = "x86_64")]
        if Level::current() == Level::Avx512 && is_x86_feature_detected!("avx512vbmi") {
            self.sums.get_or_insert_default();
            return;
        } else {
            self.sums = None;
        }
        for plane in &mut self.upsampled {
            plane.resize(width + MARGIN, 2);
        }
    }

    /// Takes the chroma of two rows of pixels, from row `row` of each plane and its neighbours
    /// `above` and `below`.
    pub fn take_pair(&mut self, planes: [&mut Plane; 2], rows: [usize; 3], width: usize) {
        #[cfg(target_arch = "x86_64")]
        if let Some(sums) = &mut self.sums {
            let [above, row, below] = rows;
            for (half, far) in [above, below].into_iter().enumerate() {
                for (sums, plane) in sums[half].iter_mut().zip(&planes) {
                    // SAFETY: `start` has asked for AVX-512.
                    unsafe { sums.of_two_rows(plane.samples(row), plane.samples(far), width) };
                }
            }
            return;
        }
        for (upsampled, plane) in self.upsampled.iter_mut().zip(planes) {
            upsampled.upsample_rows(plane, rows, width);
        }
    }

    /// Takes the chroma of a row of pixels that is halved in width only.
    pub fn take_row(&mut self, planes: [&mut Plane; 2], row: usize, width: usize) {
        #[cfg(target_arch = "x86_64")]
        if let Some([sums, _]) = &mut self.sums {
            for (sums, plane) in sums.iter_mut().zip(&planes) {
                // SAFETY: as above.
                unsafe { sums.of_a_row(plane.samples(row), width) };
            }
            return;
        }
        for (upsampled, plane) in self.upsampled.iter_mut().zip(planes) {
            upsampled.upsample_row(plane, row, width);
        }
    }

    /// Converts a row of luma with the chroma taken for row `half` of a pair.
    pub fn convert_pair(&self, luma: &[u8], half: usize, width: usize, out: &mut [u8]) {
        #[cfg(target_arch = "x86_64")]
        if let Some(sums) = &self.sums {
            // SAFETY: as above, and for VBMI.
            return unsafe { colour::to_rgb_halved::<4>(luma, &sums[half], width, out) };
        }
        let [blue, red] = self.upsampled.each_ref().map(|plane| plane.samples(half));
        to_rgb([luma, blue, red], width, out);
    }

    /// Converts a row of luma with the chroma taken for it alone.
    pub fn convert_row(&self, luma: &[u8], width: usize, out: &mut [u8]) {
        #[cfg(target_arch = "x86_64")]
        if let Some([sums, _]) = &self.sums {
            // SAFETY: as above.
            return unsafe { colour::to_rgb_halved::<2>(luma, sums, width, out) };
        }
        let [blue, red] = self.upsampled.each_ref().map(|plane| plane.samples(0));
        to_rgb([luma, blue, red], width, out);
    }

    /// Converts a row that has chroma for each pixel.
    pub fn convert_full(&self, rows: [&[u8]; 3], width: usize, out: &mut [u8]) {
        #[cfg(target_arch = "x86_64")]
        if self.sums.is_some() {
            // SAFETY: as above.
            return unsafe { colour::to_rgb(rows, width, out) };
        }
        to_rgb(rows, width, out);
    }
}

/// Converts a row of `width` samples to RGB.
fn to_rgb(rows: [&[u8]; 3], width: usize, out: &mut [u8]) {
    assert!(out.len() >= width * 3);
    let rows = rows.map(|row| {
        assert!(width.next_multiple_of(32) <= row.len());
        [row.as_ptr().cast_mut()]
    });
    let input = rows.each_ref().map(|row| row.as_ptr());
    let output = [out.as_mut_ptr()];
    // SAFETY: the kernel reads whole vectors of 32 samples, which the rows hold, writes exactly
    // `width` pixels, and does not write to its input.
    unsafe { jsimd_ycc_extrgb_convert_avx2(width as u32, input.as_ptr(), 0, output.as_ptr(), 1) };
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    /// Blocks of damaged files too, whose products wrap.
    #[test]
    fn four_blocks_at_once_equal_one_after_another() {
        if !crate::baseline::is_available() || Level::current() != Level::Avx512 {
            return;
        }
        let mut state = 1u32;
        let mut random = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % below
        };
        let (mut four, mut one) = (Plane::default(), Plane::default());
        four.resize(64, 8);
        one.resize(64, 8);
        for round in 0..4000 {
            let range = [8, 100, 2000, 65536][round % 4];
            let quant = Aligned(std::array::from_fn(|_| random(1 + range / 4) as i16));
            let mut queue = Queue::new(&quant, 8);
            for k in 0..1 + random(4) as usize {
                let mut block = Blocks([0; 288]);
                // Sometimes the first row only, which libjpeg-turbo treats in a way of its own.
                let reach = if random(3) == 0 { 8 } else { 64 };
                for _ in 0..random(20) {
                    let value = random(range) as i32 - range as i32 / 2;
                    block.0[random(reach) as usize] = value as i16;
                }
                let (_, next) = queue.next();
                for i in 1..64 {
                    next[i / 8 * 32 + i % 8] = block.0[i];
                }
                queue.push(block.0[0], (0, 8 * k), 8, &mut four);
                one.put_block((0, 8 * k), 8, &quant, &block);
            }
            queue.flush(&mut four);
            assert!(queue.blocks.0.iter().all(|v| *v == 0));
            for row in 0..8 {
                assert_eq!(four.samples(row)[..32], one.samples(row)[..32], "round {round}");
            }
        }
    }

    /// Every pair of chroma values, and rows of every width up to two steps.
    #[test]
    fn both_ways_to_colour_are_one() {
        let mut at_once = Colour::default();
        at_once.start(256);
        if !crate::baseline::is_available() || at_once.sums.is_none() {
            return;
        }
        let mut apart = Colour::default();
        apart.upsampled.iter_mut().for_each(|plane| plane.resize(256 + MARGIN, 2));
        let mut planes: [Plane; 3] = Default::default();
        planes.iter_mut().for_each(|plane| plane.resize(256, 3));
        for seed in 0..1024usize {
            for (i, plane) in planes.iter_mut().enumerate() {
                for (at, sample) in plane.samples.iter_mut().enumerate() {
                    // All of blue in a row, one red a row, luma that clips at either end.
                    let noise = (at * 2_654_435_761 + seed * 40_503) >> 7;
                    let (column, row) = (at % plane.stride, at / plane.stride);
                    let smooth = [seed % 4 * 85, column, seed / 4 + row * (seed % 4) * 50][i];
                    *sample = if seed % 4 == 3 { noise as u8 } else { smooth as u8 };
                }
            }
            let width = if seed < 128 { seed + 1 } else { 256 };
            let mut outs = [vec![0; 256 * 3 + SLACK], vec![1; 256 * 3 + SLACK]];
            let [luma, blue, red] = &mut planes;
            for (colour, out) in [&mut at_once, &mut apart].into_iter().zip(&mut outs) {
                let row = |plane: &Plane| plane.samples(1)[..320].to_vec();
                let rows = [row(luma), row(blue), row(red)];
                colour.convert_full(rows.each_ref().map(|row| row.as_slice()), width, out);
                let mut all = out[..width * 3].to_vec();
                let half = width.div_ceil(2);
                if half > 2 {
                    colour.take_pair([&mut *blue, &mut *red], [0, 1, 2], half);
                    for which in 0..2 {
                        colour.convert_pair(luma.samples(which), which, width, out);
                        all.extend(&out[..width * 3]);
                    }
                    colour.take_row([&mut *blue, &mut *red], 1, half);
                    colour.convert_row(luma.samples(1), width, out);
                    all.extend(&out[..width * 3]);
                }
                *out = all;
            }
            assert_eq!(outs[0], outs[1], "seed {seed}, width {width}");
        }
    }
}
