//! A whole decoded frame, converted to RGB row by row as Pillow's `convert("RGB")` does.

use crate::resize::{GROUP, PAD, Rect, Sink};

/// How a frame's samples are stored.
pub enum Layout {
    /// Bytes per pixel, of which the first three are red, green and blue.
    Colour { step: usize },
    /// Bytes per pixel, the first six being three big-endian samples, of which the high byte counts.
    WideColour { step: usize },
    /// Bytes per pixel, of which the first is grey.
    Grey { step: usize },
    /// Sixteen-bit grey alone, big endian: Pillow clips it at 255.
    ClippedGrey,
    /// Indices (or grey levels) of 1, 2, 4 or 8 bits into a table.
    Table { bits: usize, colours: Box<[[u8; 3]; 256]> },
}

/// A frame in memory.
pub struct Raster {
    pub samples: Vec<u8>,
    pub stride: usize,
    pub layout: Layout,
}

impl Raster {
    /// Pushes the rows of `region`.
    pub fn decode(&self, region: Rect, band: &mut Vec<u8>, sink: &mut dyn Sink) {
        let stride = region.width * 3;
        band.clear();
        band.resize(stride * GROUP + PAD, 0);
        for top in (0..region.height).step_by(GROUP) {
            let count = (region.height - top).min(GROUP);
            for row in 0..count {
                let samples = &self.samples[(region.y + top + row) * self.stride..][..self.stride];
                self.layout.convert(samples, region.x, &mut band[row * stride..][..stride]);
            }
            sink.push(band, stride, count);
        }
    }
}

impl Layout {
    fn convert(&self, row: &[u8], x: usize, out: &mut [u8]) {
        let pixels = out.chunks_exact_mut(3);
        match self {
            Layout::Colour { step } => {
                for (p, s) in pixels.zip(row[x * step..].chunks_exact(*step)) {
                    p.copy_from_slice(&s[..3]);
                }
            }
            Layout::WideColour { step } => {
                for (p, s) in pixels.zip(row[x * step..].chunks_exact(*step)) {
                    p.copy_from_slice(&[s[0], s[2], s[4]]);
                }
            }
            Layout::Grey { step } => {
                for (p, s) in pixels.zip(row[x * step..].chunks_exact(*step)) {
                    p.fill(s[0]);
                }
            }
            Layout::ClippedGrey => {
                for (p, s) in pixels.zip(row[x * 2..].chunks_exact(2)) {
                    p.fill(if s[0] == 0 { s[1] } else { 255 });
                }
            }
            Layout::Table { bits, colours } => {
                let per_byte = 8 / bits;
                let mask = ((1usize << bits) - 1) as u8;
                for (p, i) in pixels.zip(x..) {
                    let shift = 8 - bits * (i % per_byte + 1);
                    let index = (row[i / per_byte] >> shift) & mask;
                    p.copy_from_slice(&colours[usize::from(index)]);
                }
            }
        }
    }
}
