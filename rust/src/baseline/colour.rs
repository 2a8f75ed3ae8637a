//! Upsampling and colour conversion in one go, 64 pixels at a time.
//!
//! The numbers are those of `jsimd_h2v2_fancy_upsample`, `jsimd_h2v1_fancy_upsample` and
//! `jsimd_ycc_extrgb_convert`: even and odd pixels apart, as interpolated chroma comes anyway.

use std::arch::x86_64::*;

/// Pixels made at once: rows have to be readable and writable up to a multiple of it.
pub const STEP: usize = 64;

/// For each of the three vectors that 64 pixels take, where each byte's pixel lies.
static PIXELS: [[u8; 64]; 3] = {
    let mut table = [[0; 64]; 3];
    let mut at = 0;
    while at < 192 {
        let pixel = at / 3;
        // Packing leaves, of each 16 pixels, the even ones before the odd ones.
        table[at / 64][at % 64] = (pixel / 16 * 16 + pixel % 2 * 8 + pixel % 16 / 2) as u8;
        at += 1;
    }
    table
};

/// Which bytes of each vector belong to `channel`.
const fn channel_mask(channel: usize) -> [u64; 3] {
    let mut masks = [0; 3];
    let mut at = channel;
    while at < 192 {
        masks[at / 64] |= 1 << (at % 64);
        at += 3;
    }
    masks
}

const GREEN: [u64; 3] = channel_mask(1);
const BLUE: [u64; 3] = channel_mask(2);

/// Sixteen times (as `SHIFT` is 4) or four times (2) the chroma of one row, one number before the
/// first and one behind the last added: those where chroma is halved in width.
#[derive(Debug, Default)]
pub struct Sums(Vec<i16>);

impl Sums {
    fn reserve(&mut self, width: usize) {
        if self.0.len() < width + 2 + STEP {
            self.0.resize(width + 2 + STEP, 0);
        }
    }

    /// Repeats the first and the last number.
    fn close(&mut self, width: usize) {
        self.0[0] = self.0[1];
        self.0[width + 1] = self.0[width];
    }

    /// Of a row nearer and a row farther, where chroma is halved in height too.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn of_two_rows(&mut self, near: &[u8], far: &[u8], width: usize) {
        assert!(near.len().min(far.len()) >= width.next_multiple_of(32));
        self.reserve(width);
        for x in (0..width).step_by(32) {
            // SAFETY: the rows hold 32 bytes from `x` on, the sums 32 numbers from `x + 1` on.
            unsafe {
                let near = _mm512_cvtepu8_epi16(_mm256_loadu_si256(near.as_ptr().add(x).cast()));
                let far = _mm512_cvtepu8_epi16(_mm256_loadu_si256(far.as_ptr().add(x).cast()));
                let twice = _mm512_add_epi16(near, near);
                let sum = _mm512_add_epi16(_mm512_add_epi16(twice, near), far);
                _mm512_storeu_si512(self.0.as_mut_ptr().add(x + 1).cast(), sum);
            }
        }
        self.close(width);
    }

    /// Of one row.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn of_a_row(&mut self, row: &[u8], width: usize) {
        assert!(row.len() >= width.next_multiple_of(32));
        self.reserve(width);
        for x in (0..width).step_by(32) {
            // SAFETY: as above.
            unsafe {
                let row = _mm512_cvtepu8_epi16(_mm256_loadu_si256(row.as_ptr().add(x).cast()));
                _mm512_storeu_si512(self.0.as_mut_ptr().add(x + 1).cast(), row);
            }
        }
        self.close(width);
    }

    /// The chroma of the even and the odd pixels of 64, less 128, from pixel 2 `x` on.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn chroma<const SHIFT: u32>(&self, x: usize) -> [__m512i; 2] {
        let window = &self.0[x..x + 34];
        // SAFETY: 34 numbers hold three windows of 32.
        let [left, middle, right] =
            [0, 1, 2].map(|shift| unsafe { _mm512_loadu_si512(window.as_ptr().add(shift).cast()) });
        let thrice = _mm512_add_epi16(_mm512_add_epi16(middle, middle), middle);
        let (even, odd) = if SHIFT == 4 { (8, 7) } else { (1, 2) };
        let mean: i16 = 128 << SHIFT;
        let round = |sum, half| {
            let sum = _mm512_add_epi16(sum, _mm512_set1_epi16(half - mean));
            _mm512_srai_epi16::<SHIFT>(sum)
        };
        [round(_mm512_add_epi16(thrice, left), even), round(_mm512_add_epi16(thrice, right), odd)]
    }
}

/// Red, green and blue less luma.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn differences(blue: __m512i, red: __m512i) -> [__m512i; 3] {
    // 1.402 is 1 + 0.402, 1.772 is 2 - 0.228, 0.714 is 1 - 0.286; 13173 is half of 0.402 in 16
    // bits, rounded up, which makes no difference to numbers of 8 bits.
    let r = _mm512_add_epi16(_mm512_mulhrs_epi16(red, _mm512_set1_epi16(13173)), red);
    let b = _mm512_mulhrs_epi16(blue, _mm512_set1_epi16(-7471));
    let b = _mm512_add_epi16(b, _mm512_add_epi16(blue, blue));
    let weights = _mm512_set1_epi32(-22554 & 0xffff | 18734 << 16);
    let half = _mm512_set1_epi32(1 << 15);
    let sum = |pairs| _mm512_srai_epi32::<16>(_mm512_dpwssd_epi32(half, pairs, weights));
    let low = sum(_mm512_unpacklo_epi16(blue, red));
    let high = sum(_mm512_unpackhi_epi16(blue, red));
    [r, _mm512_sub_epi16(_mm512_packs_epi32(low, high), red), b]
}

/// Writes 64 pixels.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn put(luma: __m512i, blue: [__m512i; 2], red: [__m512i; 2], out: &mut [u8; 192]) {
    let even = _mm512_and_si512(luma, _mm512_set1_epi16(0xff));
    let odd = _mm512_srli_epi16::<8>(luma);
    let evens = differences(blue[0], red[0]).map(|d| _mm512_add_epi16(d, even));
    let odds = differences(blue[1], red[1]).map(|d| _mm512_add_epi16(d, odd));
    let [r, g, b] = [0, 1, 2].map(|i| _mm512_packus_epi16(evens[i], odds[i]));
    for (i, out) in out.chunks_exact_mut(64).enumerate() {
        // SAFETY: both hold 64 bytes.
        unsafe {
            let places = _mm512_loadu_si512(PIXELS[i].as_ptr().cast());
            let pixels = _mm512_permutexvar_epi8(places, r);
            let pixels = _mm512_mask_permutexvar_epi8(pixels, GREEN[i], places, g);
            let pixels = _mm512_mask_permutexvar_epi8(pixels, BLUE[i], places, b);
            _mm512_storeu_si512(out.as_mut_ptr().cast(), pixels);
        }
    }
}

/// Converts a row whose chroma is halved in width; `out` is written up to a multiple of `STEP`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
pub fn to_rgb_halved<const SHIFT: u32>(
    luma: &[u8],
    [blue, red]: &[Sums; 2],
    width: usize,
    out: &mut [u8],
) {
    let steps = width.div_ceil(STEP);
    let out = out[..steps * STEP * 3].as_chunks_mut::<192>().0;
    let luma = luma[..steps * STEP].as_chunks::<64>().0;
    for (i, (out, luma)) in out.iter_mut().zip(luma).enumerate() {
        // SAFETY: 64 bytes.
        let luma = unsafe { _mm512_loadu_si512(luma.as_ptr().cast()) };
        put(luma, blue.chroma::<SHIFT>(32 * i), red.chroma::<SHIFT>(32 * i), out);
    }
}

/// Converts a row that has chroma for each pixel; `out` is written up to a multiple of `STEP`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
pub fn to_rgb(rows: [&[u8]; 3], width: usize, out: &mut [u8]) {
    let steps = width.div_ceil(STEP);
    let out = out[..steps * STEP * 3].as_chunks_mut::<192>().0;
    let [luma, blue, red] = rows.map(|row| row[..steps * STEP].as_chunks::<64>().0);
    let halves = |row| {
        let even = _mm512_and_si512(row, _mm512_set1_epi16(0xff));
        [even, _mm512_srli_epi16::<8>(row)].map(|v| _mm512_sub_epi16(v, _mm512_set1_epi16(128)))
    };
    for (i, out) in out.iter_mut().enumerate() {
        // SAFETY: 64 bytes each.
        let [luma, blue, red] =
            [luma, blue, red].map(|row| unsafe { _mm512_loadu_si512(row[i].as_ptr().cast()) });
        put(luma, halves(blue), halves(red), out);
    }
}
