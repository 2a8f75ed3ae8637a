//! Which files the baseline decoder takes, and what their headers say. `None` means that the
//! file is not plain, or not sound, and that libjpeg has to look at it.

use crate::markers::{Markers, segment};

/// Arrays that the kernels read with aligned instructions.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub struct Aligned(pub [i16; 64]);

/// Row, column order of the coefficients in a file; what lies behind 63 is never meant.
pub const ZIGZAG: [u8; 80] = {
    let mut table = [63; 80];
    let (mut row, mut column, mut i) = (0i32, 0i32, 0);
    while i < 64 {
        table[i] = (row * 8 + column) as u8;
        let up = (row + column) % 2 == 0;
        let step = if up { (-1, 1) } else { (1, -1) };
        if up && column == 7 || !up && row == 7 {
            (row, column) = if up { (row + 1, column) } else { (row, column + 1) };
        } else if up && row == 0 || !up && column == 0 {
            (row, column) = if up { (row, column + 1) } else { (row + 1, column) };
        } else {
            (row, column) = (row + step.0, column + step.1);
        }
        i += 1;
    }
    table
};

/// The same where a row holds those of four blocks.
pub const ZIGZAG_OF_FOUR: [u8; 80] = {
    let mut table = ZIGZAG;
    let mut i = 0;
    while i < 80 {
        table[i] = ZIGZAG[i] / 8 * 32 + ZIGZAG[i] % 8;
        i += 1;
    }
    table
};

/// How chroma is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampling {
    Grey,
    S444,
    S422,
    S420,
}

impl Sampling {
    /// Blocks of luma in a minimum coded unit, horizontally and vertically.
    pub fn luma(self) -> (usize, usize) {
        match self {
            Sampling::Grey | Sampling::S444 => (1, 1),
            Sampling::S422 => (2, 1),
            Sampling::S420 => (2, 2),
        }
    }
}

/// How blocks become pixels at 1/`denominator` of the picture's size, by libjpeg's choice: where
/// chroma is halved both ways its blocks stay twice as large, and nothing is upsampled.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    pub denominator: usize,
    /// Sides in pixels of a block of luma and of one of chroma: 8, 4, 2 or 1.
    pub luma: usize,
    pub chroma: usize,
    /// How the planes of chroma relate to that of luma.
    pub sampling: Sampling,
}

impl Scale {
    /// `None` where libjpeg has a way of its own.
    pub fn new(header: &Header, denominator: usize) -> Option<Scale> {
        let luma = 8 / denominator;
        let (chroma, sampling) = match header.sampling {
            Sampling::S420 if denominator > 1 => (2 * luma, Sampling::S444),
            // Too narrow for interpolated chroma.
            Sampling::S422 if denominator == 8 || header.width * luma <= 32 => return None,
            sampling => (luma, sampling),
        };
        Some(Scale { denominator, luma, chroma, sampling })
    }
}

/// One component of the scan.
#[derive(Debug, Clone)]
pub struct Component {
    pub quant: Aligned,
    /// Bodies of the Huffman tables: 16 counts, then the symbols.
    pub dc: Vec<u8>,
    pub ac: Vec<u8>,
}

/// A plain baseline file.
#[derive(Debug, Clone)]
pub struct Header {
    pub width: usize,
    pub height: usize,
    pub sampling: Sampling,
    pub components: Vec<Component>,
    /// Minimum coded units between restart markers, or 0.
    pub restart: usize,
    /// Where the entropy-coded data begin.
    pub data: usize,
}

#[derive(Default)]
struct Tables {
    quant: [Option<Aligned>; 4],
    dc: [Option<Vec<u8>>; 4],
    ac: [Option<Vec<u8>>; 4],
    restart: usize,
    frame: Option<Vec<u8>>,
    jfif: bool,
    adobe: Option<u8>,
}

impl Header {
    pub fn read(markers: &Markers) -> Option<Header> {
        if !matches!(markers.frame, 0xc0 | 0xc1) || markers.precision != 8 || markers.width < 16 {
            return None;
        }
        let mut tables = Tables::default();
        let mut at = 2;
        loop {
            let (marker, body, next) = segment(markers.data, at).ok()?;
            match marker {
                0xc0 | 0xc1 if tables.frame.is_none() => tables.frame = Some(body.to_vec()),
                0xc4 => tables.huffman(body)?,
                0xdb => tables.quantisation(body)?,
                0xdd => tables.restart = usize::from(u16::from_be_bytes(body.try_into().ok()?)),
                0xda => return tables.scan(markers, body, next),
                0xe0 => tables.jfif |= body.len() >= 14 && body.starts_with(b"JFIF\0"),
                0xee if body.len() >= 12 && body.starts_with(b"Adobe") => {
                    tables.adobe = Some(body[11])
                }
                0xe1..=0xef | 0xfe => {}
                _ => return None,
            }
            at = next;
        }
    }
}

impl Tables {
    fn huffman(&mut self, mut body: &[u8]) -> Option<()> {
        while !body.is_empty() {
            let slot = usize::from(body[0] & 15);
            let counts = body.get(1..17)?;
            let symbols: usize = counts.iter().map(|c| usize::from(*c)).sum();
            let table = body.get(1..17 + symbols).filter(|_| symbols <= 256)?.to_vec();
            let class = match body[0] >> 4 {
                0 => &mut self.dc,
                1 => &mut self.ac,
                _ => return None,
            };
            *class.get_mut(slot)? = Some(table);
            body = &body[17 + symbols..];
        }
        Some(())
    }

    fn quantisation(&mut self, mut body: &[u8]) -> Option<()> {
        while !body.is_empty() {
            let (slot, bytes) = (usize::from(body[0] & 15), usize::from(body[0] >> 4) + 1);
            let values = body.get(1..1 + 64 * bytes).filter(|_| bytes <= 2)?;
            let mut table = Aligned([0; 64]);
            for (value, natural) in values.chunks_exact(bytes).zip(ZIGZAG) {
                let value = value.iter().fold(0u16, |v, byte| v << 8 | u16::from(*byte));
                table.0[usize::from(natural)] = value as i16;
            }
            *self.quant.get_mut(slot)? = Some(table);
            body = &body[1 + 64 * bytes..];
        }
        Some(())
    }

    fn scan(self, markers: &Markers, body: &[u8], data: usize) -> Option<Header> {
        let frame = self.frame.as_deref()?;
        let count = markers.components;
        let in_frame = frame.get(6..6 + 3 * count).filter(|f| frame.len() == 6 + f.len())?;
        let in_scan = body.get(1..1 + 2 * count)?;
        let whole = body[0] as usize == count && body.get(1 + 2 * count..)? == [0, 63, 0];
        let sampling = sampling(in_frame)?;
        if !whole || (count == 3 && !self.is_ycc(in_frame)) {
            return None;
        }
        let mut components = Vec::new();
        for (f, s) in in_frame.chunks_exact(3).zip(in_scan.chunks_exact(2)) {
            let quant = *self.quant.get(usize::from(f[2]))?.as_ref()?;
            let dc = self.dc.get(usize::from(s[1] >> 4))?.clone()?;
            let ac = self.ac.get(usize::from(s[1] & 15))?.clone()?;
            (f[0] == s[0]).then_some(())?;
            components.push(Component { quant, dc, ac });
        }
        let (width, height) = (markers.width, markers.height);
        Some(Header { width, height, sampling, components, restart: self.restart, data })
    }

    /// libjpeg's rule for the colour space of three components.
    fn is_ycc(&self, in_frame: &[u8]) -> bool {
        match (self.jfif, self.adobe) {
            (true, _) => true,
            (false, Some(transform)) => transform == 1,
            (false, None) => [in_frame[0], in_frame[3], in_frame[6]] == [1, 2, 3],
        }
    }
}

fn sampling(in_frame: &[u8]) -> Option<Sampling> {
    let factors: Vec<u8> = in_frame.chunks_exact(3).map(|c| c[1]).collect();
    match factors[..] {
        // Alone, a component has blocks of its own, whatever its factors.
        [f] if (1..=4).contains(&(f >> 4)) && (1..=4).contains(&(f & 15)) => Some(Sampling::Grey),
        [0x11, 0x11, 0x11] => Some(Sampling::S444),
        [0x21, 0x11, 0x11] => Some(Sampling::S422),
        [0x22, 0x11, 0x11] => Some(Sampling::S420),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zigzag_starts_and_ends_as_in_the_standard() {
        assert_eq!(ZIGZAG[..10], [0, 1, 8, 16, 9, 2, 3, 10, 17, 24]);
        assert_eq!(ZIGZAG[58..66], [61, 54, 47, 55, 62, 63, 63, 63]);
        let mut sorted = ZIGZAG[..64].to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..64).collect::<Vec<u8>>());
    }
}
