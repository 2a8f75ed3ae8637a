//! WebP stills, lossy and lossless, through the `image-webp` crate.

use std::io::{Cursor, ErrorKind};

use image_webp::{DecodingError, WebPDecoder};

use crate::error::{Error, Result};
use crate::markers;
use crate::raster::{Layout, Raster};

/// An open WebP file.
pub struct WebP<'a> {
    decoder: WebPDecoder<Cursor<&'a [u8]>>,
}

impl<'a> WebP<'a> {
    pub fn open(data: &'a [u8]) -> Result<WebP<'a>> {
        let decoder = WebPDecoder::new(Cursor::new(data)).map_err(error)?;
        if decoder.is_animated() {
            return Err(Error::Unsupported("an animated WebP".into()));
        }
        Ok(WebP { decoder })
    }

    pub fn size(&self) -> (usize, usize) {
        let (width, height) = self.decoder.dimensions();
        (width as usize, height as usize)
    }

    pub fn orientation(&mut self) -> Option<u8> {
        let exif = self.decoder.exif_metadata().ok()??;
        markers::orientation(exif.strip_prefix(b"Exif\0\0").unwrap_or(&exif))
    }

    /// Decodes the whole picture.
    pub fn raster(mut self) -> Result<Raster> {
        let bytes = self.decoder.output_buffer_size();
        let bytes = bytes.ok_or_else(|| Error::TooLarge("its rows overflow memory".into()))?;
        let step = if self.decoder.has_alpha() { 4 } else { 3 };
        let stride = self.size().0 * step;
        let mut samples = vec![0; bytes];
        self.decoder.set_memory_limit(bytes.saturating_mul(8).max(64 << 20));
        self.decoder.read_image(&mut samples).map_err(error)?;
        Ok(Raster { samples, stride, layout: Layout::Colour { step } })
    }
}

fn error(error: DecodingError) -> Error {
    match error {
        DecodingError::IoError(e) if e.kind() == ErrorKind::UnexpectedEof => {
            Error::Truncated("the WebP data end too early".into())
        }
        DecodingError::MemoryLimitExceeded | DecodingError::ImageTooLarge => {
            Error::TooLarge("it needs more memory than its size allows".into())
        }
        other => Error::Corrupt(other.to_string()),
    }
}
