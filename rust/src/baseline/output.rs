//! Rows of blocks to rows of pixels.

use std::ops::Range;

use super::header::{Header, Sampling, Scale};
use super::kernels::{Colour, Plane, SLACK};
use crate::resize::{GROUP, PAD, Rect, Sink};

/// Turns each row of minimum coded units into pixels and hands on those of the region.
///
/// Where chroma is halved vertically, a row of chroma gives two rows of pixels only when the row
/// below is known. So the last two rows of luma and chroma of each unit row are kept on top of
/// the next (`lag`).
#[derive(Debug)]
pub struct Output {
    sampling: Sampling,
    /// Rows of pixels that a row of minimum coded units gives.
    unit: usize,
    region: Rect,
    /// Width of the decoded columns that lie in the picture: of luma, and of chroma.
    width: usize,
    chroma_width: usize,
    chroma_height: usize,
    /// Byte offset of the region's first column in a row of pixels.
    offset: usize,
    colour: Colour,
    band: Vec<u8>,
    base: usize,
    stride: usize,
    /// Rows of pixels in the band.
    held: usize,
    first: bool,
}

impl Default for Output {
    fn default() -> Output {
        Output {
            sampling: Sampling::Grey,
            unit: 0,
            region: Rect { x: 0, y: 0, width: 0, height: 0 },
            width: 0,
            chroma_width: 0,
            chroma_height: 0,
            offset: 0,
            colour: Colour::default(),
            band: Vec::new(),
            base: 0,
            stride: 0,
            held: 0,
            first: true,
        }
    }
}

impl Output {
    pub fn start(
        &mut self,
        header: &Header,
        scale: &Scale,
        columns: &Range<usize>,
        region: Rect,
        planes: &mut [Plane],
    ) {
        let (h, v) = header.sampling.luma();
        let across = h * scale.luma;
        let left = columns.start * across;
        self.sampling = scale.sampling;
        self.unit = v * scale.luma;
        self.region = region;
        let width = header.width.div_ceil(scale.denominator);
        self.width = (columns.len() * across).min(width - left);
        let chroma = scale.chroma;
        // Of use where chroma is interpolated only: `h` is 2 then, and so is `v` in 4:2:0.
        let chroma_width = (header.width * scale.luma).div_ceil(16);
        self.chroma_width =
            (columns.len() * chroma).min(chroma_width.saturating_sub(columns.start * chroma));
        self.chroma_height = header.height.div_ceil(v);
        self.offset = (region.x - left) * 3;
        self.first = true;
        self.held = 0;
        for (i, plane) in planes.iter_mut().take(header.components.len()).enumerate() {
            let (w, h) = if i == 0 { (across, self.unit) } else { (chroma, chroma) };
            plane.resize(columns.len() * w, self.lag(i) + h);
        }
        self.colour.start(columns.len() * across);
        // As for libjpeg's rows: 16 bytes off alignment keeps the pixels in the cache.
        self.stride = (self.width * 3).next_multiple_of(32);
        let bytes = GROUP * self.stride + 48 + SLACK.max(PAD);
        if self.band.len() < bytes {
            self.band.resize(bytes, 0);
        }
        self.base = (48 - self.band.as_ptr() as usize % 32) % 32;
    }

    /// Rows kept on top of component `i`.
    pub fn lag(&self, _component: usize) -> usize {
        if self.sampling == Sampling::S420 { 2 } else { 0 }
    }

    /// Hands on the pixels that unit row `row` completes.
    pub fn emit(&mut self, row: usize, last: bool, planes: &mut [Plane], sink: &mut dyn Sink) {
        match self.sampling {
            Sampling::Grey | Sampling::S444 | Sampling::S422 => self.emit_rows(row, planes, sink),
            Sampling::S420 => self.emit_pairs(row, last, planes, sink),
        }
        self.first = false;
    }

    /// Rows of luma that have their own rows of chroma.
    fn emit_rows(&mut self, row: usize, planes: &mut [Plane], sink: &mut dyn Sink) {
        let end = self.region.y + self.region.height;
        let top = row * self.unit;
        for y in top.max(self.region.y)..(top + self.unit).min(end) {
            let at = y - top;
            let slot = self.base + self.held * self.stride;
            let out = &mut self.band[slot..];
            match (self.sampling, &mut *planes) {
                (Sampling::S444, [luma, blue, red, ..]) => {
                    let rows = [luma, blue, red].map(|plane| plane.samples(at));
                    self.colour.convert_full(rows, self.width, out);
                }
                (Sampling::S422, [luma, blue, red, ..]) => {
                    self.colour.take_row([blue, red], at, self.chroma_width);
                    self.colour.convert_row(luma.samples(at), self.width, out);
                }
                (_, planes) => {
                    let grey = &planes[0].samples(at)[..self.width];
                    for (pixel, value) in out.chunks_exact_mut(3).zip(grey) {
                        pixel.fill(*value);
                    }
                }
            }
            self.hold(y, sink);
        }
    }

    /// Pairs of rows, each from a row of chroma and its two neighbours.
    fn emit_pairs(&mut self, row: usize, last: bool, planes: &mut [Plane], sink: &mut dyn Sink) {
        let [luma, blue, red, ..] = planes else { unreachable!("4:2:0 has three components") };
        // Chroma row c lies in slot c + 2 - 8 * row.
        let top = row * 8;
        let bottom = self.chroma_height - 1;
        let start = if self.first { top } else { top - 1 };
        // Behind the last unit row, no row below is needed but for pixels outside the region.
        let end = (top + if last { 8 } else { 7 }).min(bottom + 1);
        for c in start..end {
            let wanted = self.region.y..self.region.y + self.region.height;
            if !wanted.contains(&(2 * c)) && !wanted.contains(&(2 * c + 1)) {
                continue;
            }
            let slot = c + 2 - top;
            let above = if c == 0 { slot } else { slot - 1 };
            let below = if c == bottom || c == top + 7 { slot } else { slot + 1 };
            let rows = [above, slot, below];
            self.colour.take_pair([&mut *blue, &mut *red], rows, self.chroma_width);
            for half in 0..2 {
                let y = 2 * c + half;
                if wanted.contains(&y) {
                    let luma = luma.samples(y + 2 - 2 * top);
                    let out = &mut self.band[self.base + self.held * self.stride..];
                    self.colour.convert_pair(luma, half, self.width, out);
                    self.hold(y, sink);
                }
            }
        }
        luma.keep(16);
        blue.keep(8);
        red.keep(8);
    }

    /// Counts a row of pixels that was written behind the others, and pushes a full group.
    fn hold(&mut self, y: usize, sink: &mut dyn Sink) {
        self.held += 1;
        if self.held == GROUP || y + 1 == self.region.y + self.region.height {
            sink.push(&self.band[self.base + self.offset..], self.stride, self.held);
            self.held = 0;
        }
    }
}
