//! libjpeg-turbo's own AVX2 kernels, so that the pixels are libjpeg's to the last bit.

use std::ffi::c_int;

use super::header::Aligned;

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

    /// Writes the pixels of a block whose coefficients are `block` to the `side` rows from `row`
    /// on: 8, or 4 or 2 of a picture that is scaled.
    pub fn put_block(
        &mut self,
        row: usize,
        column: usize,
        side: usize,
        quant: &Aligned,
        block: &Aligned,
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

    /// Writes a block that has only a mean, given as its product with the quantisation step.
    pub fn put_mean(&mut self, row: usize, column: usize, side: usize, mean: i32) {
        let value = (((mean + 4) >> 3) + 128).clamp(0, 255) as u8;
        for row in self.samples[row * self.stride..].chunks_mut(self.stride).take(side) {
            row[column..column + side].fill(value);
        }
    }

    /// Doubles the width of row `row` of `input` into row 0.
    pub fn upsample_row(&mut self, input: &mut Plane, row: usize, width: usize) {
        assert!(width + 32 <= input.stride && 2 * width + 64 <= self.stride);
        let (source, target) = ([input.row(row)], [self.row(0)]);
        // SAFETY: the rows are long enough for whole vectors of 32 samples in, 64 out.
        unsafe {
            jsimd_h2v1_fancy_upsample_avx2(1, width as u32, source.as_ptr(), &target.as_ptr());
        }
    }

    /// Doubles row `row` of `input` both ways, into rows 0 and 1, by its neighbours `above` and
    /// `below`.
    pub fn upsample_rows(
        &mut self,
        input: &mut Plane,
        [above, row, below]: [usize; 3],
        width: usize,
    ) {
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

/// Converts a row of `width` samples to RGB.
pub fn to_rgb(planes: [(&Plane, usize); 3], width: usize, out: &mut [u8]) {
    assert!(out.len() >= width * 3);
    let rows = planes.map(|(plane, row)| {
        assert!(width.next_multiple_of(32) <= plane.stride);
        [plane.samples(row).as_ptr().cast_mut()]
    });
    let input = rows.each_ref().map(|row| row.as_ptr());
    let output = [out.as_mut_ptr()];
    // SAFETY: the kernel reads whole vectors of 32 samples, which the rows hold, writes exactly
    // `width` pixels, and does not write to its input.
    unsafe { jsimd_ycc_extrgb_convert_avx2(width as u32, input.as_ptr(), 0, output.as_ptr(), 1) };
}
