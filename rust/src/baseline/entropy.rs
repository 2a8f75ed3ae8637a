//! Bits to blocks.

use memchr::memchr;

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

/// Reads bits.
///
/// The next bits are the upper ones of `word << shift`. The word of the next step is loaded while
/// this step's table is looked up, so that only the look-up and two shifts follow one another. A
/// word is loaded at a whole byte and used one step later: of its 64 bits up to 7 lie before the
/// position, and up to 27 are taken by the step between, which leaves 30.
pub struct Bits<'a> {
    bytes: &'a [u8],
    /// Bits before the next one.
    position: usize,
    word: u64,
    shift: u32,
}

impl<'a> Bits<'a> {
    pub fn new(clean: &'a Clean, start: usize) -> Bits<'a> {
        assert!(start + PADDING <= clean.bytes.len());
        let mut bits = Bits { bytes: &clean.bytes, position: start * 8, word: 0, shift: 0 };
        bits.word = bits.load();
        bits
    }

    /// Whether another block may be read: a block takes at most 64 x 27 bits, which the padding
    /// holds.
    #[inline(always)]
    pub fn has_room(&self) -> bool {
        self.position / 8 + PADDING / 2 <= self.bytes.len()
    }

    /// Whether exactly the bytes before `end` have been begun.
    pub fn is_at(&self, end: usize) -> bool {
        self.position.div_ceil(8) == end
    }

    /// Whether no byte behind `end` has been begun.
    pub fn is_within(&self, end: usize) -> bool {
        self.position <= end * 8
    }

    /// The word at the byte of the position.
    #[inline(always)]
    fn load(&self) -> u64 {
        let at = self.position / 8;
        debug_assert!(at + 8 <= self.bytes.len());
        // SAFETY: `has_room` is checked before every block, `new` checks the start, and between
        // two checks at most 64 x 27 bits (216 bytes) are taken; the padding is larger.
        u64::from_be_bytes(unsafe { self.bytes.as_ptr().add(at).cast::<[u8; 8]>().read() })
    }

    /// The next bits, 30 at least.
    #[inline(always)]
    fn window(&self) -> u64 {
        self.word << (self.shift & 63)
    }

    /// Takes as many bits as the lower six bits of `shift` say, 27 at most.
    #[inline(always)]
    fn take(&mut self, shift: u32) {
        self.word = self.load();
        self.shift = (self.position as u32 & 7).wrapping_add(shift);
        self.position += (shift & 63) as usize;
    }

    /// The next symbol, taken with its value.
    #[inline(always)]
    fn symbol(&mut self, table: &Table) -> Option<(Symbol, i32)> {
        let window = self.window();
        let mut symbol = table.fast(window);
        if symbol.is_long() {
            symbol = table.slow(window)?;
        }
        self.take(symbol.shift());
        // The `size` bits behind the code; values with a leading 0 count from below.
        let size = symbol.size();
        let tail = window << (symbol.total() - size);
        let raw = ((tail >> 1) >> (63 - size)) as i32;
        let below = !((tail as i64) >> 63) as i32;
        Some((symbol, raw + (below & ((-1 << size) + 1))))
    }

    /// Decodes a block whose coefficients are zero: the mean's difference, and whether any other
    /// coefficient is there. `order` says where each goes.
    #[inline(always)]
    pub fn block(
        &mut self,
        dc: &Table,
        ac: &Table,
        order: &[u8; 80],
        coefficients: &mut [i16; 256],
    ) -> Option<(i32, bool)> {
        let (_, difference) = self.symbol(dc)?;
        let mut at = 0;
        loop {
            let (symbol, value) = self.symbol(ac)?;
            at += symbol.advance();
            if at >= 63 {
                if at == 63 {
                    coefficients[usize::from(order[63])] = value as i16;
                    return Some((difference, true));
                }
                return (at >= END).then_some((difference, at > END));
            }
            coefficients[usize::from(order[at as usize])] = value as i16;
        }
    }

    /// Passes a block; the mean's difference is all that matters.
    #[inline(always)]
    pub fn skip_block(&mut self, dc: &Table, ac: &Table) -> Option<i32> {
        let (_, difference) = self.symbol(dc)?;
        let mut at = 0;
        loop {
            let chain = ac.skip(self.window());
            let next = at + chain.advance();
            if !chain.is_none() && next < 63 {
                self.take(chain.shift());
                if chain.ends() {
                    return Some(difference);
                }
                at = next;
                continue;
            }
            at += self.symbol(ac)?.0.advance();
            if at >= 63 {
                return (at == 63 || at >= END).then_some(difference);
            }
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
        // Codes 0 to 3 of two bits for values of 1, 3, 0 and 11 bits, as of a mean.
        let mut table = Table::new();
        let mut counts = [0u8; 16];
        counts[2] = 4;
        table.fill(&[counts.as_slice(), &[1, 3, 0, 11]].concat(), true).unwrap();
        let mut clean = Clean::default();
        // 000 0, 000 1, 001 000, 001 100, 001 011, 010, 011 then eleven zeros
        clean
            .fill(&[0b0000_0001, 0b0010_0000, 0b1100_0010, 0b1101_0011, 0, 0, 0xff, 0xd9])
            .unwrap();
        let mut bits = Bits::new(&clean, 0);
        for expected in [-1, 1, -7, 4, -4, 0, -2047] {
            assert_eq!(bits.symbol(&table).unwrap().1, expected);
        }
        assert!(bits.is_within(6) && !bits.is_within(4));
    }
}
