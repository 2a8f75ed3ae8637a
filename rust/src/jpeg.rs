//! JPEG through libjpeg-turbo: columns cropped, rows skipped, stopped after the last row.

use std::ffi::{CStr, c_char, c_int};

// The static library is linked through this crate.
use turbojpeg_sys as _;

use crate::error::{Error, Result};
use crate::markers::Markers;
use crate::resize::{GROUP, PAD, Rect, Sink};

/// Encoders write about ten scans; each costs a pass over the whole picture.
const MAX_SCANS: c_int = 200;

/// Rows asked of libjpeg at once, a multiple of `GROUP`.
const BAND: usize = 16;

/// The fewest columns asked for: narrower crops make libjpeg choose another upsampler.
const MIN_COLUMNS: usize = 16;

#[repr(C)]
struct Handle {
    _private: [u8; 0],
}

#[repr(C)]
#[derive(Default)]
struct Info {
    width: u32,
    height: u32,
    components: i32,
    out_components: i32,
}

// SAFETY of this block: the declarations mirror shim/jpeg_shim.c.
unsafe extern "C" {
    fn pk_jpeg_open(
        data: *const u8,
        length: usize,
        max_scans: c_int,
        lenient: c_int,
        out: *mut *mut Handle,
        info: *mut Info,
    ) -> c_int;
    fn pk_jpeg_start(
        handle: *mut Handle,
        denominator: c_int,
        x: *mut u32,
        width: *mut u32,
        out_width: *mut u32,
        out_height: *mut u32,
    ) -> c_int;
    fn pk_jpeg_skip(handle: *mut Handle, rows: u32) -> c_int;
    fn pk_jpeg_read(handle: *mut Handle, out: *mut u8, stride: usize, rows: u32) -> c_int;
    fn pk_jpeg_message(handle: *const Handle) -> *const c_char;
    fn pk_jpeg_close(handle: *mut Handle);
}

/// An open JPEG file.
pub struct Jpeg<'a> {
    handle: *mut Handle,
    info: Info,
    markers: Markers<'a>,
    truncated: bool,
}

impl Drop for Jpeg<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle came from pk_jpeg_open (or is null) and is closed once.
        unsafe { pk_jpeg_close(self.handle) }
    }
}

impl<'a> Jpeg<'a> {
    /// Reads the header; `markers` are those of the same file. With `truncated`, what a cut file
    /// lacks is filled as Pillow fills it under `LOAD_TRUNCATED_IMAGES`.
    pub fn open(markers: Markers<'a>, truncated: bool) -> Result<Jpeg<'a>> {
        let data = markers.data;
        let (handle, info) = (std::ptr::null_mut(), Info::default());
        let mut jpeg = Jpeg { handle, info, markers, truncated };
        // SAFETY: data outlives the handle (both live for 'a), the out pointers are valid.
        let code = unsafe {
            pk_jpeg_open(
                data.as_ptr(),
                data.len(),
                MAX_SCANS,
                c_int::from(truncated),
                &mut jpeg.handle,
                &mut jpeg.info,
            )
        };
        jpeg.check(code)?;
        Ok(jpeg)
    }

    pub fn size(&self) -> (usize, usize) {
        (self.info.width as usize, self.info.height as usize)
    }

    /// Decodes `region` of the picture at 1/`denominator` of its size and pushes its rows.
    pub fn decode(
        &mut self,
        region: Rect,
        denominator: usize,
        band: &mut Vec<u8>,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let grid = self.size();
        let grid = (grid.0.div_ceil(denominator), grid.1.div_ceil(denominator));
        let (mut x, mut width) = self.columns(region, grid.0);
        let wanted = (x, width);
        let (mut out_width, mut out_height) = (0, 0);
        // SAFETY: the handle is open and all pointers are valid.
        let code = unsafe {
            pk_jpeg_start(
                self.handle,
                denominator as c_int,
                &mut x,
                &mut width,
                &mut out_width,
                &mut out_height,
            )
        };
        self.check(code)?;
        if (out_width as usize, out_height as usize) != grid {
            return Err(Error::Corrupt("libjpeg makes another size than was asked".into()));
        }
        let (x, width) = if wanted.1 == 0 { (0, grid.0) } else { (x as usize, width as usize) };
        assert!(x <= region.x && region.x + region.width <= x + width);
        self.skip(region.y)?;
        self.rows(region, x, width, band, sink)?;
        if !self.truncated && !self.markers.has_end() {
            // The file was cut somewhere: whether before the last row decides, as in Pillow.
            let rest = grid.1 - region.y - region.height;
            if rest > 0 {
                self.skip(rest - 1)?;
                self.read(band, 0, width * self.info.out_components as usize, 1)?;
            }
        }
        Ok(())
    }

    /// The columns to ask libjpeg for, as (x, width); a width of 0 asks for all.
    fn columns(&self, region: Rect, grid_width: usize) -> (u32, u32) {
        // libjpeg treats the crop's edges as the picture's when it interpolates chroma: one
        // column more on each side keeps the wanted ones right.
        let left = region.x.saturating_sub(1);
        let right = (region.x + region.width + 1).max(left + MIN_COLUMNS).min(grid_width);
        let left = left.min(right.saturating_sub(MIN_COLUMNS));
        if self.markers.lossless || (left == 0 && right == grid_width) {
            return (0, 0);
        }
        (left as u32, (right - left) as u32)
    }

    fn rows(
        &mut self,
        region: Rect,
        x: usize,
        width: usize,
        band: &mut Vec<u8>,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let samples = self.info.out_components as usize;
        // libjpeg's colour conversion writes past the caches where a row is aligned to 32 bytes,
        // and these rows are read at once: keep them 16 bytes off.
        let stride = (width * samples).next_multiple_of(32);
        band.clear();
        band.resize(BAND * stride + 48 + PAD, 0);
        let base = (48 - band.as_ptr() as usize % 32) % 32;
        let mut left = region.height;
        while left > 0 {
            let count = left.min(BAND);
            self.read(band, base, stride, count)?;
            if samples == 4 {
                cmyk_to_rgb(&mut band[base..], stride, count, width);
            }
            let pixels = &band[base + (region.x - x) * 3..];
            for row in (0..count).step_by(GROUP) {
                sink.push(&pixels[row * stride..], stride, (count - row).min(GROUP));
            }
            left -= count;
        }
        Ok(())
    }

    fn read(&mut self, band: &mut Vec<u8>, base: usize, stride: usize, count: usize) -> Result<()> {
        if band.len() < base + count * stride {
            band.resize(base + count * stride, 0);
        }
        // SAFETY: the handle is started; `count` rows of at most `stride` bytes fit in the band.
        let code =
            unsafe { pk_jpeg_read(self.handle, band.as_mut_ptr().add(base), stride, count as u32) };
        self.check(code)
    }

    fn skip(&mut self, rows: usize) -> Result<()> {
        // SAFETY: the handle is open and started.
        let code = unsafe { pk_jpeg_skip(self.handle, rows as u32) };
        self.check(code)
    }

    fn check(&self, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        if self.handle.is_null() {
            return Err(Error::TooLarge("no memory for the decoder".into()));
        }
        // SAFETY: the message is a terminated string inside the open handle.
        let message = unsafe { CStr::from_ptr(pk_jpeg_message(self.handle)) };
        let message = message.to_string_lossy().into_owned();
        Err(match code {
            2 => Error::Truncated(message),
            3 => Error::Unsupported(message),
            4 => Error::TooLarge(message),
            _ => Error::Corrupt(message),
        })
    }
}

/// Turns rows of inverted CMYK (as Adobe writes it, and as Pillow assumes) into RGB in place.
fn cmyk_to_rgb(rows: &mut [u8], stride: usize, count: usize, width: usize) {
    for row in rows.chunks_mut(stride).take(count) {
        for x in 0..width {
            let [c, m, y, k] = [0, 1, 2, 3].map(|i| 255 - i32::from(row[x * 4 + i]));
            for (i, ink) in [c, m, y].into_iter().enumerate() {
                let t = ink * (255 - k) + 128;
                let share = ((t >> 8) + t) >> 8;
                row[x * 3 + i] = (255 - k - share).clamp(0, 255) as u8;
            }
        }
    }
}
