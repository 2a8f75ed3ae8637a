//! A walk over a JPEG file's marker segments, and the EXIF orientation.

use crate::error::{Error, Result};

/// What the segments before the first scan say.
#[derive(Debug, Clone)]
pub struct Markers<'a> {
    pub data: &'a [u8],
    pub width: usize,
    pub height: usize,
    pub components: usize,
    pub precision: u8,
    /// The frame's marker byte: 0xC0 baseline, 0xC2 progressive, …
    pub frame: u8,
    pub lossless: bool,
    /// Arithmetic coding, where a block may take less than a bit.
    pub arithmetic: bool,
    /// Orientation, 1 to 8, by EXIF and by XMP.
    exif: Option<u8>,
    xmp: Option<u8>,
    /// Where the first scan's header begins.
    pub scan: usize,
}

impl<'a> Markers<'a> {
    /// Walks until the first scan.
    pub fn read(data: &'a [u8]) -> Result<Markers<'a>> {
        let mut markers = Markers {
            data,
            width: 0,
            height: 0,
            components: 0,
            precision: 0,
            frame: 0,
            lossless: false,
            arithmetic: false,
            exif: None,
            xmp: None,
            scan: 0,
        };
        let mut at = 2;
        loop {
            let (marker, body, next) = segment(data, at)?;
            match marker {
                0xc0..=0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => {
                    markers.frame(marker, body)?
                }
                0xe1 => markers.application(body),
                0xda => {
                    if markers.frame == 0 {
                        return Err(Error::Corrupt("a scan comes before the frame header".into()));
                    }
                    markers.scan = at;
                    return Ok(markers);
                }
                0xd9 => return Err(Error::Corrupt("the file holds no scan".into())),
                _ => {}
            }
            at = next;
        }
    }

    fn frame(&mut self, marker: u8, body: &[u8]) -> Result<()> {
        if body.len() < 6 {
            return Err(Error::Corrupt("the frame header is too short".into()));
        }
        let number = |i: usize| usize::from(u16::from_be_bytes([body[i], body[i + 1]]));
        self.precision = body[0];
        (self.height, self.width) = (number(1), number(3));
        self.components = usize::from(body[5]);
        self.frame = marker;
        self.lossless = matches!(marker, 0xc3 | 0xc7 | 0xcb | 0xcf);
        self.arithmetic = marker >= 0xc9;
        if self.width == 0 || self.height == 0 {
            return Err(Error::Corrupt(format!("its size is {} x {}", self.width, self.height)));
        }
        Ok(())
    }

    fn application(&mut self, body: &[u8]) {
        if let Some(tiff) = body.strip_prefix(b"Exif\0\0") {
            self.exif = self.exif.or(orientation(tiff));
        } else if let Some(xmp) = body.strip_prefix(b"http://ns.adobe.com/xap/1.0/\0") {
            self.xmp = self.xmp.or(xmp_orientation(xmp));
        }
    }

    /// The orientation, 1 to 8; XMP counts where EXIF says nothing, as in Pillow.
    pub fn orientation(&self) -> Option<u8> {
        self.exif.or(self.xmp)
    }

    /// Whether an end marker follows the first scan; if not, the file was cut.
    pub fn has_end(&self) -> bool {
        let scans = &self.data[self.scan..];
        scans.windows(2).rev().any(|pair| pair == [0xff, 0xd9])
    }

    /// Refuses files that are too short for their size: a Huffman-coded block takes a bit at
    /// least, so decoding never takes long for a file that holds nearly nothing.
    pub fn check_length(&self) -> Result<()> {
        let blocks = self.width.div_ceil(8) * self.height.div_ceil(8);
        let bits = (self.data.len() - self.scan) * 8;
        if self.lossless || self.arithmetic || bits >= blocks {
            return Ok(());
        }
        let size = (self.width, self.height);
        Err(Error::Truncated(format!(
            "{} bytes can't hold {} x {} pixels",
            bits / 8,
            size.0,
            size.1
        )))
    }
}

/// The segment whose marker is the next one from `at` on: marker, body, where the next begins.
pub fn segment(data: &[u8], at: usize) -> Result<(u8, &[u8], usize)> {
    let cut = || Error::Truncated("the file ends in its header".into());
    let mut at = at;
    // Like libjpeg, skip whatever stands before the marker, and fill bytes.
    while *data.get(at).ok_or_else(cut)? != 0xff {
        at += 1;
    }
    while *data.get(at).ok_or_else(cut)? == 0xff {
        at += 1;
    }
    let marker = data[at];
    at += 1;
    if matches!(marker, 0x00 | 0x01 | 0xd0..=0xd9) {
        return Ok((marker, &[], at));
    }
    let length = data.get(at..at + 2).ok_or_else(cut)?;
    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
    if length < 2 {
        return Err(Error::Corrupt(format!("a segment of length {length} at byte {at}")));
    }
    let body = data.get(at + 2..at + length).ok_or_else(cut)?;
    Ok((marker, body, at + length))
}

/// The orientation in a TIFF block, if there is a valid one.
pub fn orientation(tiff: &[u8]) -> Option<u8> {
    let little = match tiff.get(..4)? {
        b"II*\0" => true,
        b"MM\0*" => false,
        _ => return None,
    };
    let u16_at = |at: usize| {
        let bytes = tiff.get(at..at.checked_add(2)?)?.try_into().ok()?;
        Some(if little { u16::from_le_bytes(bytes) } else { u16::from_be_bytes(bytes) })
    };
    let bytes = tiff.get(4..8)?.try_into().ok()?;
    let directory =
        if little { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) } as usize;
    let entries = usize::from(u16_at(directory)?);
    (0..entries).find_map(|i| {
        let entry = directory + 2 + 12 * i;
        let is_orientation = u16_at(entry)? == 0x0112 && u16_at(entry + 2)? == 3;
        let value = u16_at(entry + 8).filter(|v| is_orientation && (1..=8).contains(v))?;
        u8::try_from(value).ok()
    })
}

/// The orientation in an XMP packet, if there is a valid one.
fn xmp_orientation(xmp: &[u8]) -> Option<u8> {
    const NAME: &[u8] = b"tiff:Orientation";
    let found = xmp.windows(NAME.len()).position(|w| w == NAME)?;
    let rest = &xmp[found + NAME.len()..];
    let digit = *rest.strip_prefix(b"=\"").or(rest.strip_prefix(b">"))?.first()?;
    (b'1'..=b'8').contains(&digit).then(|| digit - b'0')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orientation_in_both_byte_orders() {
        let little = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
        let big = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x08\0\0\0\0\0\0";
        assert_eq!((orientation(little), orientation(big)), (Some(6), Some(8)));
        for cut in 0..little.len() - 4 {
            assert!(orientation(&little[..cut]).is_none_or(|v| v == 6));
        }
        assert_eq!(orientation(b"II*\0\xff\xff\xff\xff"), None);
    }

    #[test]
    fn orientation_in_xmp() {
        assert_eq!(xmp_orientation(b"<a tiff:Orientation=\"6\"/>"), Some(6));
        assert_eq!(xmp_orientation(b"<tiff:Orientation>3</tiff:Orientation>"), Some(3));
        assert_eq!(xmp_orientation(b"<a tiff:Orientation=\"9\"/>"), None);
        assert_eq!(xmp_orientation(b"tiff:Orientation"), None);
    }

    #[test]
    fn broken_headers_are_told_apart() {
        let kind = |data: &[u8]| Markers::read(data).unwrap_err().kind();
        assert_eq!(kind(b"\xff\xd8"), "truncated");
        assert_eq!(kind(b"\xff\xd8\xff\xd9"), "corrupt");
        assert_eq!(kind(b"\xff\xd8\xff\xc0\0\x01"), "corrupt");
        assert_eq!(kind(b"\xff\xd8\xff\xda\0\x02"), "corrupt");
        assert_eq!(kind(b"\xff\xd8\xff\xc0\0\x0b\x08\0\0\0\x01\x01\x01\x11\0"), "corrupt");
    }
}
