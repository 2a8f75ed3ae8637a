//! Bits to blocks.

use memchr::memchr;

use super::header::ZIGZAG;
use super::huffman::{END, Symbol, Table};

/// Zero bytes behind the data: more than a block can take.
const PADDING: usize = 512;

/// The entropy-coded data without byte stuffing, cut at the restart markers.
#[derive(Debug, Default)]
pub struct Clean {
    bytes: Vec<u8>,
    /// Start and end of each stretch between restart markers.
    pub stretches: Vec<(usize, usize)>,
}

impl Clean {
    /// Copies the data up to the end marker; `None` if anything but restart markers in order
    /// comes before it.
    pub fn fill(&mut self, mut data: &[u8]) -> Option<()> {
        self.bytes.clear();
        self.stretches.clear();
        self.bytes.reserve(data.len() + PADDING);
        let mut start = 0;
        loop {
            let at = memchr(0xff, data)?;
            self.bytes.extend_from_slice(&data[..at]);
            match *data.get(at + 1)? {
                0x00 => self.bytes.push(0xff),
                marker @ 0xd0..=0xd7 => {
                    if usize::from(marker & 7) != self.stretches.len() % 8 {
                        return None;
                    }
                    self.stretches.push((start, self.bytes.len()));
                    start = self.bytes.len();
                }
                0xd9 => break,
                _ => return None,
            }
            data = &data[at + 2..];
        }
        self.stretches.push((start, self.bytes.len()));
        self.bytes.resize(self.bytes.len() + PADDING, 0);
        Some(())
    }
}

/// Reads bits from the top of a 64-bit window.
pub struct Bits<'a> {
    bytes: &'a [u8],
    /// The next byte to load.
    at: usize,
    window: u64,
    /// Valid bits in the window; what lies below them is what `bytes` holds.
    count: u32,
}

impl<'a> Bits<'a> {
    pub fn new(clean: &'a Clean, start: usize) -> Bits<'a> {
        let mut bits = Bits { bytes: &clean.bytes, at: start, window: 0, count: 0 };
        assert!(start + PADDING <= bits.bytes.len());
        bits.refill();
        bits
    }

    /// Whether another block may be read: a block takes at most 64 x 27 bits, which the padding
    /// holds.
    #[inline(always)]
    pub fn has_room(&self) -> bool {
        self.at + PADDING / 2 <= self.bytes.len()
    }

    /// Whether exactly the bytes before `end` have been begun.
    pub fn is_at(&self, end: usize) -> bool {
        let loaded_bits = self.at * 8;
        (loaded_bits - self.count as usize).div_ceil(8) == end
    }

    /// Whether no byte behind `end` has been begun.
    pub fn is_within(&self, end: usize) -> bool {
        self.at * 8 - self.count as usize <= end * 8
    }

    /// Brings the window to at least 56 bits.
    #[inline(always)]
    fn refill(&mut self) {
        debug_assert!(self.at + 8 <= self.bytes.len());
        // SAFETY: `has_room` is checked before every block, `new` checks the start, and between
        // two checks at most 64 x 27 bits (216 bytes) are taken; the padding is larger.
        let word = unsafe { self.bytes.as_ptr().add(self.at).cast::<[u8; 8]>().read() };
        self.window |= u64::from_be_bytes(word) >> self.count;
        self.at += ((63 - self.count) >> 3) as usize;
        self.count |= 56;
    }

    #[inline(always)]
    fn take(&mut self, bits: u32) {
        self.window <<= bits;
        self.count -= bits;
    }

    #[inline(always)]
    fn symbol(&self, table: &Table) -> Option<Symbol> {
        let symbol = table.fast(self.window);
        if symbol.total != 0 { Some(symbol) } else { table.slow(self.window) }
    }

    /// The value behind the code of `symbol`, taken with it.
    #[inline(always)]
    fn value(&mut self, symbol: Symbol) -> i32 {
        let (total, size) = (u32::from(symbol.total), u32::from(symbol.size));
        let tail = self.window << (total - size);
        self.take(total);
        // The upper `size` bits; values with a leading 0 count from below.
        let raw = ((tail >> 1) >> (63 - size)) as i32;
        let below = !((tail as i64) >> 63) as i32;
        raw + (below & ((-1 << size) + 1))
    }

    /// The difference of the block's mean to the last one's.
    #[inline(always)]
    fn difference(&mut self, dc: &Table) -> Option<i32> {
        self.refill();
        let symbol = self.symbol(dc)?;
        Some(self.value(symbol))
    }

    /// Decodes a block whose coefficients are zero: the mean's difference, and whether any other
    /// coefficient is there.
    #[inline(always)]
    pub fn block(
        &mut self,
        dc: &Table,
        ac: &Table,
        coefficients: &mut [i16; 64],
    ) -> Option<(i32, bool)> {
        let difference = self.difference(dc)?;
        let mut at = 0;
        loop {
            // Two symbols of at most 26 bits fit into a full window, but only one behind the
            // mean's 27 bits.
            for _ in 0..2 {
                let symbol = self.symbol(ac)?;
                at += u32::from(symbol.advance);
                let value = self.value(symbol);
                if at >= 63 {
                    if at == 63 {
                        coefficients[63] = value as i16;
                        return Some((difference, true));
                    }
                    return (at >= END).then_some((difference, at > END));
                }
                coefficients[usize::from(ZIGZAG[at as usize])] = value as i16;
                if self.count < 27 {
                    break;
                }
            }
            self.refill();
        }
    }

    /// Passes a block; the mean's difference is all that matters.
    #[inline(always)]
    pub fn skip_block(&mut self, dc: &Table, ac: &Table) -> Option<i32> {
        let difference = self.difference(dc)?;
        self.refill();
        let mut at = 0;
        loop {
            let entry = ac.skip(self.window);
            let next = at + u32::from(entry >> 4 & 0x7ff);
            if entry != 0 && next < 63 {
                self.take(u32::from(entry & 15));
                if entry >> 15 != 0 {
                    return Some(difference);
                }
                at = next;
            } else {
                let symbol = self.symbol(ac)?;
                self.take(u32::from(symbol.total));
                at += u32::from(symbol.advance);
                if at >= 63 {
                    return (at == 63 || at >= END).then_some(difference);
                }
            }
            self.refill();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stuffing_is_taken_out_and_restarts_cut() {
        let mut clean = Clean::default();
        clean.fill(b"ab\xff\0c\xff\xd0d\xff\xd1\xff\xd9rest").unwrap();
        assert_eq!(clean.stretches, [(0, 4), (4, 5), (5, 5)]);
        assert_eq!(clean.bytes[..5], *b"ab\xffcd");
        for bad in
            [&b"a\xff\xd1\xff\xd9"[..], b"ab", b"a\xff", b"a\xff\xff\xd9", b"\xff\xda\xff\xd9"]
        {
            assert!(clean.fill(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn values_have_jpeg_signs() {
        let mut clean = Clean::default();
        clean.fill(b"\x2a\xff\xd9").unwrap();
        for (size, bits, value) in
            [(1, 0b0, -1), (1, 0b1, 1), (3, 0b000, -7), (3, 0b100, 4), (3, 0b011, -4), (0, 0, 0)]
        {
            let mut reader = Bits::new(&clean, 0);
            reader.window = if size == 0 { 1 << 63 } else { bits << (64 - size) };
            let symbol = Symbol { total: size as u8, advance: 1, size: size as u8 };
            assert_eq!(reader.value(symbol), value, "{bits:b} of {size}");
        }
    }
}
