//! PNG: every kind, through the `png` crate.

use std::io::{Cursor, ErrorKind};

use png::{BitDepth, ColorType, DecodingError, Limits, Reader, Transformations};

use crate::error::{Error, Result};
use crate::markers;
use crate::raster::{Layout, Raster};

/// Deflate never makes more than this many bytes out of one.
const MAX_EXPANSION: usize = 1032;

/// An open PNG file.
pub struct Png<'a> {
    reader: Reader<Cursor<&'a [u8]>>,
    length: usize,
}

impl<'a> Png<'a> {
    pub fn open(data: &'a [u8]) -> Result<Png<'a>> {
        let limits = Limits { bytes: 64 << 20 };
        let mut decoder = png::Decoder::new_with_limits(Cursor::new(data), limits);
        decoder.set_transformations(Transformations::IDENTITY);
        decoder.set_ignore_text_chunk(true);
        decoder.set_ignore_iccp_chunk(true);
        let reader = decoder.read_info().map_err(error)?;
        Ok(Png { reader, length: data.len() })
    }

    pub fn size(&self) -> (usize, usize) {
        let info = self.reader.info();
        (info.width as usize, info.height as usize)
    }

    pub fn orientation(&self) -> Option<u8> {
        let exif = self.reader.info().exif_metadata.as_deref()?;
        markers::orientation(exif.strip_prefix(b"Exif\0\0").unwrap_or(exif))
    }

    /// Decodes the whole frame.
    pub fn raster(mut self) -> Result<Raster> {
        let bytes = self.reader.output_buffer_size();
        let bytes = bytes.ok_or_else(|| Error::TooLarge("its rows overflow memory".into()))?;
        if bytes / MAX_EXPANSION > self.length {
            let message = format!("{} bytes can't hold {bytes} bytes of pixels", self.length);
            return Err(Error::Truncated(message));
        }
        let mut samples = vec![0; bytes];
        let output = self.reader.next_frame(&mut samples).map_err(error)?;
        if (output.width as usize, output.height as usize) != self.size() {
            return Err(Error::Corrupt("its first frame has another size than the picture".into()));
        }
        Ok(Raster { samples, stride: output.line_size, layout: self.layout() })
    }

    fn layout(&self) -> Layout {
        let info = self.reader.info();
        let bits = info.bit_depth as usize;
        let wide = if info.bit_depth == BitDepth::Sixteen { 2 } else { 1 };
        match info.color_type {
            ColorType::Grayscale if wide == 2 => Layout::ClippedGrey,
            ColorType::Grayscale if bits == 8 => Layout::Grey { step: 1 },
            ColorType::Grayscale => {
                let top = (1 << bits) - 1;
                Layout::Table { bits, colours: table(|i| [(i.min(top) * 255 / top) as u8; 3]) }
            }
            ColorType::GrayscaleAlpha => Layout::Grey { step: 2 * wide },
            ColorType::Rgb if wide == 1 => Layout::Colour { step: 3 },
            ColorType::Rgba if wide == 1 => Layout::Colour { step: 4 },
            ColorType::Rgb => Layout::WideColour { step: 6 },
            ColorType::Rgba => Layout::WideColour { step: 8 },
            ColorType::Indexed => {
                let palette = info.palette.as_deref().unwrap_or(&[]);
                let entry = |i: usize| palette.get(i * 3..i * 3 + 3);
                let colour = |i: usize| entry(i).map_or([0; 3], |c| [c[0], c[1], c[2]]);
                Layout::Table { bits, colours: table(colour) }
            }
        }
    }
}

fn table(colour: impl Fn(usize) -> [u8; 3]) -> Box<[[u8; 3]; 256]> {
    Box::new(std::array::from_fn(colour))
}

fn error(error: DecodingError) -> Error {
    match error {
        DecodingError::IoError(e) if e.kind() == ErrorKind::UnexpectedEof => {
            Error::Truncated("the PNG data end too early".into())
        }
        DecodingError::LimitsExceeded => Error::TooLarge("its PNG chunks exceed 64 MiB".into()),
        other => Error::Corrupt(other.to_string()),
    }
}
