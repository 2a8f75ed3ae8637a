//! One picture of any format: its size, its orientation, and the pixels of a region.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::baseline;
use crate::error::{Error, Result};
use crate::jpeg::Jpeg;
use crate::markers::Markers;
use crate::orient::Orientation;
use crate::png::Png;
use crate::resize::{Rect, Sink};
use crate::webp::WebP;

enum Format<'a> {
    Jpeg(Markers<'a>),
    Png(Box<Png<'a>>),
    WebP(Box<WebP<'a>>),
}

/// Buffers kept between pictures.
#[derive(Debug, Default)]
pub struct Buffers {
    band: Vec<u8>,
    baseline: baseline::Scratch,
}

/// Set where libjpeg is to decode every JPEG file.
static LIBJPEG_ONLY: AtomicBool = AtomicBool::new(false);

/// Chooses whether libjpeg decodes every JPEG file: for tests and benchmarks, the pixels are the
/// same.
pub fn set_libjpeg_only(only: bool) {
    LIBJPEG_ONLY.store(only, Ordering::Relaxed);
}

/// Set where JPEG files are only read, for the benchmark's bound.
static ENTROPY_ONLY: AtomicBool = AtomicBool::new(false);

/// Chooses whether plain JPEG files are only entropy-decoded, for benchmarks: their pixels mean
/// nothing.
pub fn set_entropy_only(only: bool) {
    ENTROPY_ONLY.store(only, Ordering::Relaxed);
}

fn own_decoder() -> bool {
    !LIBJPEG_ONLY.load(Ordering::Relaxed) && baseline::is_available()
}

/// A file whose header has been read.
pub struct Picture<'a> {
    format: Format<'a>,
    /// Size as stored, before the orientation is applied.
    pub stored: (usize, usize),
    pub orientation: Orientation,
}

impl<'a> Picture<'a> {
    /// Reads the header; without `orient` the orientation is left as stored.
    pub fn open(data: &'a [u8], orient: bool) -> Result<Picture<'a>> {
        let (format, stored, orientation) = match data {
            [] => return Err(Error::Empty),
            [0xff, 0xd8, 0xff, ..] => {
                let markers = Markers::read(data)?;
                let (size, orientation) = ((markers.width, markers.height), markers.orientation());
                (Format::Jpeg(markers), size, orientation)
            }
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => {
                let png = Png::open(data)?;
                let (size, orientation) = (png.size(), png.orientation());
                (Format::Png(Box::new(png)), size, orientation)
            }
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => {
                let mut webp = WebP::open(data)?;
                let (size, orientation) = (webp.size(), webp.orientation());
                (Format::WebP(Box::new(webp)), size, orientation)
            }
            _ => return Err(unknown(data)),
        };
        let orientation = Orientation::new(orientation.filter(|_| orient).unwrap_or(1));
        Ok(Picture { format, stored, orientation })
    }

    /// Width and height after the orientation is applied.
    pub fn size(&self) -> (usize, usize) {
        self.orientation.size(self.stored)
    }

    /// Refuses pictures of more than `max_pixels`.
    pub fn check_pixels(&self, max_pixels: u64) -> Result<()> {
        let (width, height) = self.stored;
        if width as u64 * height as u64 <= max_pixels {
            return Ok(());
        }
        let message = format!("{width} x {height} pixels, more than the limit of {max_pixels}");
        Err(Error::TooLarge(message))
    }

    /// Whether it can be decoded at a fraction of its size.
    pub fn scales(&self) -> bool {
        matches!(&self.format, Format::Jpeg(markers) if !markers.lossless)
    }

    /// Decodes a region of the stored picture at 1/`denominator` of its size; with `truncated`,
    /// also that of a JPEG file that was cut.
    pub fn decode(
        self,
        region: Rect,
        denominator: usize,
        truncated: bool,
        buffers: &mut Buffers,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        match self.format {
            Format::Jpeg(markers) => {
                if !truncated {
                    markers.check_length()?;
                }
                if own_decoder() {
                    let (scratch, pixels) =
                        (&mut buffers.baseline, !ENTROPY_ONLY.load(Ordering::Relaxed));
                    if baseline::decode(&markers, region, denominator, pixels, scratch, sink)
                        .is_some()
                    {
                        return Ok(());
                    }
                    sink.restart();
                }
                let mut jpeg = Jpeg::open(markers, truncated)?;
                if jpeg.size() != self.stored {
                    return Err(Error::Corrupt("it has several frame headers".into()));
                }
                jpeg.decode(region, denominator, &mut buffers.band, sink)
            }
            Format::Png(png) => {
                png.raster()?.decode(region, &mut buffers.band, sink);
                Ok(())
            }
            Format::WebP(webp) => {
                webp.raster()?.decode(region, &mut buffers.band, sink);
                Ok(())
            }
        }
    }
}

/// Tells other image formats from what is no image at all.
fn unknown(data: &[u8]) -> Error {
    const NAMES: [(&str, &[u8]); 13] = [
        ("a BMP file", b"BM"),
        ("a GIF file", b"GIF8"),
        ("a TIFF file", b"II*\0"),
        ("a TIFF file", b"MM\0*"),
        ("a BigTIFF file", b"II+\0"),
        ("a JPEG 2000 file", b"\0\0\0\x0cjP  "),
        ("a JPEG 2000 codestream", b"\xff\x4f\xff\x51"),
        ("an icon", b"\0\0\x01\0"),
        ("a Photoshop file", b"8BPS"),
        ("a QOI file", b"qoif"),
        ("a DDS file", b"DDS "),
        ("a JPEG XL file", b"\0\0\0\x0cJXL "),
        ("a JPEG XL codestream", b"\xff\x0a"),
    ];
    if let Some((name, _)) = NAMES.iter().find(|(_, magic)| data.starts_with(magic)) {
        return Error::Unsupported((*name).into());
    }
    match data.get(4..12) {
        Some(b"ftypavif" | b"ftypavis") => Error::Unsupported("an AVIF file".into()),
        Some(b"ftypheic" | b"ftypheix" | b"ftyphevc" | b"ftypmif1" | b"ftypmsf1") => {
            Error::Unsupported("a HEIC file".into())
        }
        _ if matches!(data, [b'P', b'1'..=b'7', b' ' | b'\n' | b'\r' | b'\t', ..]) => {
            Error::Unsupported("a Netpbm file".into())
        }
        _ => Error::NotAnImage,
    }
}
