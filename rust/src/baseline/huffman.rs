//! Huffman tables for one look-up a symbol, and for several symbols that are skipped.

/// Bits of the look-up that gives one symbol.
pub const FAST: u32 = 11;

/// Bits of the look-up that skips several symbols.
pub const SKIP: u32 = 13;

/// Added to a position by the end of a block.
pub const END: u32 = 128;

/// A symbol: how many bits its code and value have together, how far the position moves, how
/// many bits the value has. All zero where the code is longer than the look-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Symbol(u32);

impl Symbol {
    fn new(total: u32, advance: u32, size: u32) -> Symbol {
        Symbol(total | advance << 8 | size << 16)
    }

    pub fn is_long(self) -> bool {
        self.0 == 0
    }

    /// The number whose lower six bits count the bits: a shift needs no more of it.
    #[inline(always)]
    pub fn shift(self) -> u32 {
        self.0
    }

    #[inline(always)]
    pub fn total(self) -> u32 {
        self.0 & 63
    }

    #[inline(always)]
    pub fn advance(self) -> u32 {
        self.0 >> 8 & 0xff
    }

    #[inline(always)]
    pub fn size(self) -> u32 {
        self.0 >> 16
    }
}

/// Several symbols that are skipped at once, laid out as `bits | advance << 6 | end << 15`;
/// zero where there are none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Chain(u16);

impl Chain {
    fn new(bits: u32, advance: u32, end: bool) -> Chain {
        Chain(bits as u16 | (advance as u16) << 6 | u16::from(end) << 15)
    }

    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    /// As `Symbol::shift`.
    #[inline(always)]
    pub fn shift(self) -> u32 {
        u32::from(self.0)
    }

    #[inline(always)]
    pub fn advance(self) -> u32 {
        u32::from(self.0 >> 6 & 63)
    }

    #[inline(always)]
    pub fn ends(self) -> bool {
        self.0 >> 15 != 0
    }
}

/// One Huffman table.
#[derive(Debug)]
pub struct Table {
    /// The table's bytes in the file, by which it is known again.
    body: Vec<u8>,
    fast: Box<[Symbol; 1 << FAST]>,
    skip: Box<[Chain; 1 << SKIP]>,
    /// By code length: one past the largest code, aligned to 16 bits, and what turns a code
    /// into the index of its symbol.
    limit: [u32; 17],
    offset: [i32; 17],
    symbols: Vec<Symbol>,
}

impl Table {
    pub fn new() -> Table {
        Table {
            body: Vec::new(),
            fast: Box::new([Symbol::default(); 1 << FAST]),
            skip: Box::new([Chain::default(); 1 << SKIP]),
            limit: [0; 17],
            offset: [0; 17],
            symbols: Vec::new(),
        }
    }

    /// Fills in the table of a file, unless it is there already; `dc` tells its kind. `None`
    /// where the table is not sound.
    pub fn fill(&mut self, body: &[u8], dc: bool) -> Option<()> {
        if self.body == body {
            return Some(());
        }
        self.body.clear();
        self.codes(body, dc)?;
        self.fill_fast();
        if !dc {
            self.fill_skip();
        }
        self.body.extend_from_slice(body);
        Some(())
    }

    /// Works out the canonical codes.
    fn codes(&mut self, body: &[u8], dc: bool) -> Option<()> {
        let (counts, symbols) = body.split_at(16);
        self.symbols.clear();
        let (mut code, mut index) = (0u32, 0usize);
        for (length, &count) in (1u32..).zip(counts) {
            let count = usize::from(count);
            self.offset[length as usize] = index as i32 - code as i32;
            for &symbol in &symbols[index..index + count] {
                self.symbols.push(meaning(symbol, length, dc)?);
            }
            code += count as u32;
            index += count;
            // The code of all ones is not allowed.
            if code >= 1 << length && count > 0 {
                return None;
            }
            self.limit[length as usize] = code << (16 - length);
            code <<= 1;
        }
        (index > 0).then_some(())
    }

    fn fill_fast(&mut self) {
        for (i, entry) in self.fast.iter_mut().enumerate() {
            let code = (i as u32) << (16 - FAST);
            let length = (1..=FAST as usize).find(|&l| code < self.limit[l]);
            *entry = length.map_or(Symbol::default(), |l| {
                let at = (code >> (16 - l)) as i32 + self.offset[l];
                self.symbols[at as usize]
            });
        }
    }

    /// Chains symbols as long as they fit wholly.
    fn fill_skip(&mut self) {
        for i in 0..1u32 << SKIP {
            let (mut bits, mut advance, mut end) = (0, 0, false);
            while bits < SKIP && !end {
                let rest = (i << bits) & ((1 << SKIP) - 1);
                let symbol = self.fast[(rest >> (SKIP - FAST)) as usize];
                if symbol.is_long() || bits + symbol.total() > SKIP {
                    break;
                }
                bits += symbol.total();
                end = symbol.advance() == END;
                advance += if end { 0 } else { symbol.advance() };
            }
            // A look-up that would pass the end of any block is of no use.
            let usable = bits > 0 && advance < 64;
            self.skip[i as usize] =
                if usable { Chain::new(bits, advance, end) } else { Chain::default() };
        }
    }

    #[inline(always)]
    pub fn fast(&self, window: u64) -> Symbol {
        self.fast[(window >> (64 - FAST)) as usize]
    }

    #[inline(always)]
    pub fn skip(&self, window: u64) -> Chain {
        self.skip[(window >> (64 - SKIP)) as usize]
    }

    /// The symbol at the top of `window` if its code is longer than the look-up.
    #[cold]
    pub fn slow(&self, window: u64) -> Option<Symbol> {
        let code = (window >> 48) as u32;
        let length = (FAST as usize + 1..=16).find(|&l| code < self.limit[l])?;
        let at = (code >> (16 - length)) as i32 + self.offset[length];
        self.symbols.get(usize::try_from(at).ok()?).copied()
    }
}

/// What a symbol of a code of `length` bits means; `None` for sizes that baseline files of
/// eight bits do not have.
fn meaning(symbol: u8, length: u32, dc: bool) -> Option<Symbol> {
    let (run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
    if dc {
        return (symbol <= 11).then_some(Symbol::new(length + size, 0, size));
    }
    let advance = match (run, size) {
        (15, 0) => 16,
        (_, 0) => END,
        (_, 1..=10) => run + 1,
        _ => return None,
    };
    Some(Symbol::new(length + size, advance, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes 0, 10, 110 … for a few symbols, and one of 12 bits.
    fn body() -> Vec<u8> {
        let mut counts = [0u8; 16];
        counts[0] = 1;
        counts[1] = 1;
        counts[2] = 1;
        counts[11] = 1;
        [counts.as_slice(), &[0x01, 0x00, 0xf0, 0x23]].concat()
    }

    #[test]
    fn symbols_are_found() {
        let mut table = Table::new();
        table.fill(&body(), false).unwrap();
        assert_eq!(table.fast(0), Symbol::new(2, 1, 1));
        assert_eq!(table.fast(0b10 << 62), Symbol::new(2, END, 0));
        assert_eq!(table.fast(0b110 << 61), Symbol::new(3, 16, 0));
        let long = 0b1110_0000_0000 << 52;
        assert!(table.fast(long).is_long());
        assert_eq!(table.slow(long), Some(Symbol::new(15, 3, 3)));
        assert_eq!(table.slow(u64::MAX), None);
    }

    #[test]
    fn skipping_chains_symbols_up_to_the_end() {
        let mut table = Table::new();
        table.fill(&body(), false).unwrap();
        // Three of run 0 with their values, then the end of the block.
        let entry = table.skip(0b00_01_00_10 << 56);
        assert_eq!(entry, Chain::new(8, 3, true));
        assert!(table.skip(u64::MAX).is_none());
    }

    #[test]
    fn unsound_tables_are_refused() {
        let mut counts = [0u8; 16];
        counts[0] = 2;
        let all_ones = [counts.as_slice(), &[1, 2]].concat();
        assert!(Table::new().fill(&all_ones, false).is_none());
        counts[0] = 1;
        let too_large = [counts.as_slice(), &[12]].concat();
        assert!(Table::new().fill(&too_large, true).is_none());
        let too_large = [counts.as_slice(), &[0x0b]].concat();
        assert!(Table::new().fill(&too_large, false).is_none());
        assert!(Table::new().fill(&[0; 16], true).is_none());
    }
}
