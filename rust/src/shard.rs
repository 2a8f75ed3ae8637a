//! One file of the teacher cache: safetensors that anyone can open, with its own checksums.
//!
//! ```text
//! 8 bytes  length of the header, little endian
//! header   {"__metadata__":{"check":"0123456789abcdef", …},"name":{"dtype":…,"shape":…,"data_offsets":…}, …}
//! data     the tensors, widest type first, then by name
//! ```
//!
//! `blocks` in the metadata holds 16 hex digits for each 64 KiB of data, and `check` covers the
//! length and the header (its own digits taken as zeros), so that no byte of the file can change
//! unseen. Checksums are the first eight bytes of BLAKE3. The same content gives the same bytes.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::{Advice, Mmap, UncheckedAdvice};
use serde_json::Value;

use crate::decode::{Source, read_file};

/// Data bytes that one checksum covers.
pub const BLOCK: usize = 1 << 16;
const ALIGN: usize = 64;
const MAX_HEADER: usize = 1 << 28;
const PREFIX: &str = "{\"__metadata__\":{\"check\":\"";
const DIGITS: usize = 16;

/// What can be wrong with a file of the cache. `Display` says it without the file's name.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    #[error("there is no such file")]
    Missing,
    #[error("{0}")]
    Io(io::Error),
    #[error("it is damaged: {0}")]
    Damaged(String),
    #[error("{0}")]
    Foreign(String),
    #[error("{0}")]
    Usage(String),
}

impl From<io::Error> for ShardError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => ShardError::Missing,
            _ => ShardError::Io(error),
        }
    }
}

pub type Result<T> = std::result::Result<T, ShardError>;

fn damaged<T>(what: impl Into<String>) -> Result<T> {
    Err(ShardError::Damaged(what.into()))
}

/// The 64-bit checksum of some bytes.
pub fn checksum(bytes: &[u8]) -> u64 {
    let hash = blake3::hash(bytes);
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes"))
}

/// Bytes of one element of a safetensors type, or None for an unknown one.
pub fn item_bytes(dtype: &str) -> Option<usize> {
    match dtype {
        "BOOL" | "U8" | "I8" => Some(1),
        "F16" | "BF16" | "U16" | "I16" => Some(2),
        "F32" | "U32" | "I32" => Some(4),
        "F64" | "U64" | "I64" => Some(8),
        _ => None,
    }
}

/// A tensor to write.
pub struct Entry<'a> {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: &'a [u8],
}

/// Writes a shard to `temporary`, syncs it, and renames it to `path`: all of it or nothing.
pub fn write(
    path: &Path,
    temporary: &Path,
    metadata: &[(String, String)],
    mut entries: Vec<Entry>,
) -> Result<()> {
    let width = |e: &Entry| item_bytes(&e.dtype).unwrap_or(0);
    entries.sort_by(|a, b| width(b).cmp(&width(a)).then_with(|| a.name.cmp(&b.name)));
    let data: Vec<u8> = entries.iter().flat_map(|e| e.bytes.iter().copied()).collect();
    let header = header(metadata, &entries, &data)?;
    let result = put(path, temporary, &header, &data);
    if result.is_err() {
        // The error that counts is the first one.
        let _ = fs::remove_file(temporary);
    }
    result
}

fn put(path: &Path, temporary: &Path, header: &[u8], data: &[u8]) -> Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(temporary)?;
    file.write_all(header)?;
    file.write_all(data)?;
    file.sync_all()?;
    drop(file);
    fs::rename(temporary, path)?;
    if let Some(folder) = path.parent() {
        // So that the new name outlives a power cut; not every file system can do it.
        if let Ok(folder) = File::open(folder) {
            let _ = folder.sync_all();
        }
    }
    Ok(())
}

/// The length and the header, check included, padded so that the data begin aligned.
fn header(metadata: &[(String, String)], entries: &[Entry], data: &[u8]) -> Result<Vec<u8>> {
    let blocks: String = data.chunks(BLOCK).map(|b| format!("{:016x}", checksum(b))).collect();
    let mut text = format!("{PREFIX}{}\"", "0".repeat(DIGITS));
    let own = [("block_bytes", BLOCK.to_string()), ("blocks", blocks)];
    let own = own.iter().map(|(k, v)| (*k, v.as_str()));
    for (key, value) in metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())).chain(own) {
        text += &format!(",{}:{}", Value::from(key), Value::from(value));
    }
    text.push('}');
    let mut start = 0;
    for entry in entries {
        let size = entry.shape.iter().product::<usize>();
        let size = item_bytes(&entry.dtype).map(|item| item * size);
        if size != Some(entry.bytes.len()) {
            let Entry { name, dtype, shape, bytes } = entry;
            let message = format!("'{name}' {dtype} {shape:?} can't have {} bytes", bytes.len());
            return Err(ShardError::Usage(message));
        }
        let end = start + entry.bytes.len();
        let (name, dtype) = (Value::from(entry.name.as_str()), Value::from(entry.dtype.as_str()));
        let shape = Value::from(entry.shape.clone());
        text += &format!(
            ",{name}:{{\"dtype\":{dtype},\"shape\":{shape},\"data_offsets\":[{start},{end}]}}"
        );
        start = end;
    }
    text.push('}');
    let padding = (ALIGN - (8 + text.len()) % ALIGN) % ALIGN;
    text.extend(std::iter::repeat_n(' ', padding));
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    let check = format!("{:016x}", checksum(&bytes));
    bytes[check_place()].copy_from_slice(check.as_bytes());
    Ok(bytes)
}

fn check_place() -> Range<usize> {
    8 + PREFIX.len()..8 + PREFIX.len() + DIGITS
}

/// One tensor of a shard: where it lies in the data.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub dtype: String,
    pub shape: Vec<usize>,
    pub range: Range<usize>,
}

impl Tensor {
    /// Bytes of one row of the first dimension.
    pub fn row_bytes(&self) -> usize {
        match self.shape.first() {
            Some(&rows) if rows > 0 => self.range.len() / rows,
            _ => 0,
        }
    }
}

/// A shard mapped into memory.
#[derive(Debug)]
pub struct Shard {
    map: Mmap,
    data: usize,
    pub metadata: BTreeMap<String, String>,
    pub tensors: BTreeMap<String, Tensor>,
    blocks: Vec<u64>,
    sound: Vec<AtomicBool>,
}

impl Shard {
    /// Maps a file and checks its header and its length, not its data.
    pub fn open(path: &Path) -> Result<Shard> {
        let file = File::open(path)?;
        if file.metadata()?.len() < check_place().end as u64 {
            return damaged("it is cut short");
        }
        // SAFETY: finished shards are never written again, only replaced by renaming; a file
        // that another program cuts short while it is mapped is beyond what can be guarded.
        let map = unsafe { Mmap::map(&file)? };
        let data = checked_header(&map)?;
        let (metadata, tensors) = parse(&map[8..data])?;
        let end = tensors.values().map(|t| t.range.end).max().unwrap_or(0);
        if map.len() != data + end {
            return damaged(format!("it has {} bytes instead of {}", map.len(), data + end));
        }
        let blocks = parse_blocks(&metadata, end)?;
        let sound = blocks.iter().map(|_| AtomicBool::new(false)).collect();
        Ok(Shard { map, data, metadata, tensors, blocks, sound })
    }

    /// The bytes of all tensors.
    pub fn data(&self) -> &[u8] {
        &self.map[self.data..]
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors
            .get(name)
            .ok_or_else(|| ShardError::Foreign(format!("it holds no tensor '{name}'")))
    }

    /// Checks the blocks that a range of the data touches, each at most once.
    pub fn check(&self, range: Range<usize>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        for block in range.start / BLOCK..=(range.end - 1) / BLOCK {
            if !self.sound[block].load(Ordering::Relaxed) {
                if !self.is_sound(block) {
                    return damaged(self.describe(block));
                }
                self.sound[block].store(true, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// The bytes of a tensor, once their blocks are checked.
    pub fn checked(&self, name: &str) -> Result<&[u8]> {
        let range = self.tensor(name)?.range.clone();
        self.check(range.clone())?;
        Ok(&self.data()[range])
    }

    /// Every block that is damaged, in words.
    pub fn damage(&self) -> Vec<String> {
        let bad = (0..self.blocks.len()).filter(|&block| !self.is_sound(block));
        bad.map(|block| self.describe(block)).collect()
    }

    fn is_sound(&self, block: usize) -> bool {
        let data = self.data();
        let bytes = &data[block * BLOCK..data.len().min((block + 1) * BLOCK)];
        checksum(bytes) == self.blocks[block]
    }

    /// What lies in a block: "block 3 (rows 85 to 127 of 'features')".
    fn describe(&self, block: usize) -> String {
        let (start, end) = (block * BLOCK, (block + 1) * BLOCK);
        let mut parts = Vec::new();
        for (name, tensor) in &self.tensors {
            let (low, high) = (start.max(tensor.range.start), end.min(tensor.range.end));
            let row = tensor.row_bytes();
            if low < high && row > 0 {
                let first = (low - tensor.range.start) / row;
                let last = (high - 1 - tensor.range.start) / row;
                parts.push(format!("rows {first} to {last} of '{name}'"));
            }
        }
        format!("block {block} ({})", parts.join(", "))
    }

    /// Asks the system to read the file ahead, or to let its pages go.
    pub fn advise(&self, wanted: bool) -> Result<()> {
        if wanted {
            self.map.advise(Advice::WillNeed)?;
        } else {
            // SAFETY: the map is read-only and backed by a file, so that its pages come back.
            unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed)? };
        }
        Ok(())
    }
}

/// Checks length and checksum of the header; returns where the data begin.
fn checked_header(bytes: &[u8]) -> Result<usize> {
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    let end = usize::try_from(length).ok().filter(|&n| n <= MAX_HEADER).map(|n| n + 8);
    let Some(end) = end.filter(|&end| end <= bytes.len() && end >= check_place().end) else {
        return damaged("its header is not as long as it says");
    };
    let mut header = bytes[..end].to_vec();
    if !header[8..].starts_with(PREFIX.as_bytes()) {
        return damaged("its header has no checksum");
    }
    let written = String::from_utf8_lossy(&header[check_place()]).into_owned();
    header[check_place()].fill(b'0');
    if written != format!("{:016x}", checksum(&header)) {
        return damaged("its header");
    }
    Ok(end)
}

type Parsed = (BTreeMap<String, String>, BTreeMap<String, Tensor>);

fn parse(header: &[u8]) -> Result<Parsed> {
    let broken = || ShardError::Damaged("its header is not that of safetensors".into());
    let value: Value = serde_json::from_slice(header).map_err(|_| broken())?;
    let mut metadata = BTreeMap::new();
    let mut tensors = BTreeMap::new();
    for (name, entry) in value.as_object().ok_or_else(broken)? {
        if name == "__metadata__" {
            for (key, text) in entry.as_object().ok_or_else(broken)? {
                metadata.insert(key.clone(), text.as_str().ok_or_else(broken)?.to_owned());
            }
        } else {
            tensors.insert(name.clone(), parse_tensor(entry).ok_or_else(broken)?);
        }
    }
    Ok((metadata, tensors))
}

fn parse_tensor(entry: &Value) -> Option<Tensor> {
    let number = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
    let dtype = entry.get("dtype")?.as_str()?.to_owned();
    let shape: Vec<usize> =
        entry.get("shape")?.as_array()?.iter().map(number).collect::<Option<_>>()?;
    let offsets = entry.get("data_offsets")?.as_array()?;
    let range = number(offsets.first()?)?..number(offsets.get(1)?)?;
    let bytes = shape.iter().try_fold(item_bytes(&dtype)?, |a, &b| a.checked_mul(b))?;
    (range.start <= range.end && range.len() == bytes).then_some(Tensor { dtype, shape, range })
}

fn parse_blocks(metadata: &BTreeMap<String, String>, data_bytes: usize) -> Result<Vec<u64>> {
    let text = metadata.get("blocks").map_or("", String::as_str);
    if metadata.get("block_bytes") != Some(&BLOCK.to_string()) || !text.is_ascii() {
        return damaged("its header has no checksums of this format");
    }
    let digits = text.as_bytes().chunks(DIGITS).map(|c| std::str::from_utf8(c).unwrap_or(""));
    let blocks =
        digits.map(|d| u64::from_str_radix(d, 16)).collect::<std::result::Result<Vec<_>, _>>();
    match blocks {
        Ok(blocks) if blocks.len() == data_bytes.div_ceil(BLOCK) => Ok(blocks),
        _ => damaged("its header has not one checksum for each block"),
    }
}

/// A file read whole, and the checksum of its bytes.
pub type Content = std::result::Result<(Vec<u8>, u64), String>;

/// Reads files or parts of them by several threads, in the order given.
pub fn read_files(sources: &[Source], threads: usize) -> Vec<Content> {
    let one = |source: &Source| {
        let (path, part) = match *source {
            Source::Path(path) => (path, None),
            Source::Slice { path, offset, size } => (path, Some((offset, size))),
            Source::Bytes(bytes) => return Ok((bytes.to_vec(), checksum(bytes))),
        };
        let mut bytes = Vec::new();
        read_file(path, part, &mut bytes).map_err(|error| error.to_string())?;
        let sum = checksum(&bytes);
        Ok((bytes, sum))
    };
    let share = sources.len().div_ceil(threads.max(1)).max(1);
    let mut found = Vec::with_capacity(sources.len());
    std::thread::scope(|scope| {
        let parts: Vec<_> = sources
            .chunks(share)
            .map(|part| scope.spawn(move || part.iter().map(one).collect::<Vec<_>>()))
            .collect();
        for part in parts {
            found.extend(part.join().expect("reading a file doesn't panic"));
        }
    });
    found
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn sample(folder: &Path, rows: usize) -> PathBuf {
        let features: Vec<u8> = (0..rows * 96).map(|i| (i % 251) as u8).collect();
        let failed = vec![0; rows];
        let entry = |name: &str, dtype: &str, shape: &[usize], bytes| {
            let (name, dtype, shape) = (name.to_owned(), dtype.to_owned(), shape.to_vec());
            Entry { name, dtype, shape, bytes }
        };
        let entries = vec![
            entry("failed", "BOOL", &[rows], &failed),
            entry("features", "F16", &[rows, 48], &features),
        ];
        let path = folder.join("shard.safetensors");
        let metadata = [("quoted \"key\"".to_owned(), "a\\b\n".to_owned())];
        write(&path, &folder.join("shard.tmp"), &metadata, entries).unwrap();
        path
    }

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("promptkd-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn what_was_written_is_read() {
        let folder = folder("roundtrip");
        let shard = Shard::open(&sample(&folder, 2000)).unwrap();
        assert_eq!(shard.metadata["quoted \"key\""], "a\\b\n");
        let features = shard.tensor("features").unwrap();
        assert_eq!((features.shape.as_slice(), features.row_bytes()), (&[2000, 48][..], 96));
        assert_eq!(shard.data()[features.range.start + 252], 1);
        assert_eq!(shard.data % ALIGN, 0);
        shard.check(0..shard.data().len()).unwrap();
        assert!(shard.damage().is_empty());
        assert!(!folder.join("shard.tmp").exists());
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn every_flipped_byte_is_seen() {
        let folder = folder("flips");
        let path = sample(&folder, 3);
        let good = fs::read(&path).unwrap();
        for place in 0..good.len() {
            let mut bad = good.clone();
            bad[place] ^= 1 << (place % 8);
            fs::write(&path, &bad).unwrap();
            let seen = Shard::open(&path).map(|shard| !shard.damage().is_empty());
            assert!(seen.unwrap_or(true), "byte {place}");
        }
        for length in [0, 7, 30, good.len() / 2, good.len() - 1] {
            fs::write(&path, &good[..length]).unwrap();
            assert!(Shard::open(&path).is_err(), "cut to {length} bytes");
        }
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn damage_is_located() {
        let folder = folder("located");
        let path = sample(&folder, 2000);
        let mut bytes = fs::read(&path).unwrap();
        let start = Shard::open(&path).unwrap().data;
        bytes[start + BLOCK + 5] ^= 1;
        fs::write(&path, bytes).unwrap();
        let shard = Shard::open(&path).unwrap();
        assert_eq!(shard.damage(), ["block 1 (rows 682 to 1365 of 'features')"]);
        shard.check(0..BLOCK).unwrap();
        assert!(matches!(shard.check(0..BLOCK + 1), Err(ShardError::Damaged(_))));
        fs::remove_dir_all(folder).unwrap();
    }
}
