//! The members of a tar archive, found by its headers alone.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::error::{Error, Result};
use crate::index::read_at;

const BLOCK: u64 = 512;
/// Long names and extended headers are small.
const MAX_EXTRA: u64 = 1 << 20;

/// A file in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub name: Vec<u8>,
    pub offset: u64,
    pub size: u64,
}

/// What headers say about the member behind them.
#[derive(Default)]
struct Extra {
    name: Option<Vec<u8>>,
    size: Option<u64>,
}

/// Lists the regular files of an archive, in order.
pub fn members(path: &Path) -> Result<Vec<Member>> {
    let file = File::open(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Error::Missing,
        _ => Error::Unreadable(e.to_string()),
    })?;
    let length = file.metadata().map_err(|e| Error::Unreadable(e.to_string()))?.len();
    if length == 0 {
        return Err(Error::Empty);
    }
    let mut found = Vec::new();
    let (mut at, mut extra) = (0, Extra::default());
    while at < length {
        let mut header = [0u8; BLOCK as usize];
        read(&file, &mut header, at)?;
        if header.iter().all(|b| *b == 0) {
            break;
        }
        check(&header, at)?;
        let kind = header[156];
        let own_size = number(&header[124..136])
            .ok_or_else(|| Error::Corrupt(format!("no size in the tar header at byte {at}")))?;
        let is_file = matches!(kind, b'0' | 0 | b'7');
        let size = extra.size.filter(|_| is_file).unwrap_or(own_size);
        let offset = at + BLOCK;
        let end = offset.checked_add(size).filter(|end| *end <= length).ok_or_else(|| {
            let name = String::from_utf8_lossy(&name(&header)).into_owned();
            Error::Truncated(format!(
                "the archive ends at byte {length}, inside '{name}' that begins at byte {offset}"
            ))
        })?;
        match kind {
            b'L' => extra.name = Some(until_nul(&body(&file, offset, size)?)),
            b'x' => extra.read_pax(&body(&file, offset, size)?),
            _ if is_file => {
                let name = extra.name.take().unwrap_or_else(|| name(&header));
                found.push(Member { name, offset, size });
                extra = Extra::default();
            }
            b'g' => {}
            _ => extra = Extra::default(),
        }
        at = end.next_multiple_of(BLOCK);
    }
    Ok(found)
}

fn read(file: &File, buffer: &mut [u8], at: u64) -> Result<()> {
    read_at(file, buffer, at).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => {
            Error::Truncated(format!("the archive ends in the header at byte {at}"))
        }
        _ => Error::Unreadable(e.to_string()),
    })
}

fn body(file: &File, offset: u64, size: u64) -> Result<Vec<u8>> {
    if size > MAX_EXTRA {
        return Err(Error::Corrupt(format!("an extended header of {size} bytes at byte {offset}")));
    }
    let mut body = vec![0; size as usize];
    read(file, &mut body, offset)?;
    Ok(body)
}

/// The sum of a header's bytes, its own field taken as spaces, must be what it says.
fn check(header: &[u8; BLOCK as usize], at: u64) -> Result<()> {
    let sum: u64 = header.iter().map(|b| u64::from(*b)).sum();
    let field: u64 = header[148..156].iter().map(|b| u64::from(*b)).sum();
    if number(&header[148..156]) == Some(sum - field + 8 * u64::from(b' ')) {
        return Ok(());
    }
    if at == 0 {
        return Err(Error::Corrupt("it is no tar archive".into()));
    }
    Err(Error::Corrupt(format!("no tar header at byte {at}")))
}

/// An octal number, or a binary one where the first bit is set.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let rest =
            field[1..].iter().try_fold(0u64, |n, b| n.checked_mul(256)?.checked_add(u64::from(*b)));
        return rest.filter(|_| field[0] == 0x80);
    }
    let digits = field.iter().skip_while(|b| **b == b' ').take_while(|b| !matches!(**b, 0 | b' '));
    digits.clone().next()?;
    digits.copied().try_fold(0u64, |n, b| {
        (b'0'..=b'7').contains(&b).then(|| n.checked_mul(8)?.checked_add(u64::from(b - b'0')))?
    })
}

fn until_nul(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().copied().take_while(|b| *b != 0).collect()
}

fn name(header: &[u8; BLOCK as usize]) -> Vec<u8> {
    let name = until_nul(&header[..100]);
    let prefix = until_nul(&header[345..500]);
    let has_prefix = header[257..263] == *b"ustar\0" && !prefix.is_empty();
    if has_prefix { [prefix, b"/".to_vec(), name].concat() } else { name }
}

impl Extra {
    /// Records are "length key=value\n".
    fn read_pax(&mut self, mut body: &[u8]) {
        while let Some(space) = body.iter().position(|b| *b == b' ') {
            let text = std::str::from_utf8(&body[..space]).ok();
            let Some(length) = text.and_then(|t| t.parse::<usize>().ok()) else { return };
            if length <= space + 1 || length > body.len() {
                return;
            }
            let record = &body[space + 1..length - 1];
            if let Some(path) = record.strip_prefix(b"path=") {
                self.name = Some(path.to_vec());
            } else if let Some(size) = record.strip_prefix(b"size=") {
                self.size = std::str::from_utf8(size).ok().and_then(|s| s.parse().ok());
            }
            body = &body[length..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_both_kinds() {
        assert_eq!(number(b"0000017\0"), Some(15));
        assert_eq!(number(b"  17 \0\0\0"), Some(15));
        assert_eq!(number(b"\x80\0\0\0\0\0\x01\0"), Some(256));
        assert_eq!(number(b"0000018\0"), None);
        assert_eq!(number(b"        "), None);
        assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xff"), None);
    }
}
