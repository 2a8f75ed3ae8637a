//! Reading one view of the teacher cache: rows from many shards, gathered by threads.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::helpers::share;
use crate::shard::{Result, Shard, ShardError, Tensor};

/// Bytes below which waking one more thread costs more than it saves.
const THREAD_BYTES: usize = 1 << 20;
/// Bytes that a thread takes at a time: none waits long for another one to end.
const PIECE_BYTES: usize = 1 << 17;
/// Rows between the one that is copied and the one whose bytes are fetched ahead.
const AHEAD: usize = 4;
/// Bytes of a row that are fetched ahead; the processor guesses those behind them better.
const FETCH_BYTES: usize = 1 << 8;

/// A tensor whose place in a shard was not looked up yet.
const UNKNOWN: usize = usize::MAX;

/// An error, and the shard that it belongs to.
pub type Located<T> = std::result::Result<T, (Option<PathBuf>, ShardError)>;

/// The shards of a view in the order of their rows; a file is mapped when it is first read.
pub struct Reader {
    files: Vec<(PathBuf, OnceLock<Shard>)>,
    /// First row of each shard, then the number of rows.
    starts: Vec<usize>,
    /// The length of all shards but the last, where it is one and the same.
    stride: Option<usize>,
    expected: BTreeMap<String, String>,
    checks: bool,
    columns: Mutex<Vec<Arc<Column>>>,
}

/// Where the data of a tensor begin in each shard: random rows look it up for every row.
struct Column {
    name: String,
    starts: Vec<AtomicUsize>,
}

impl Reader {
    /// `starts` are the first rows of the shards, then the number of rows; every shard's metadata
    /// must hold `expected`, and `first_row`.
    pub fn new(
        paths: Vec<PathBuf>,
        starts: Vec<usize>,
        expected: BTreeMap<String, String>,
        checks: bool,
    ) -> Result<Reader> {
        let ordered = starts.windows(2).all(|pair| pair[0] < pair[1]);
        if paths.is_empty() || starts.len() != paths.len() + 1 || starts[0] != 0 || !ordered {
            let message = "starts must be the shards' first rows, from 0, and the number of rows";
            return Err(ShardError::Usage(message.into()));
        }
        let stride = starts[1];
        let even = (1..paths.len()).all(|i| starts[i] == i * stride);
        let fits = starts[paths.len()] <= paths.len() * stride;
        let files = paths.into_iter().map(|path| (path, OnceLock::new())).collect();
        let stride = (even && fits).then_some(stride);
        let columns = Mutex::default();
        Ok(Reader { files, starts, stride, expected, checks, columns })
    }

    /// Rows of the view.
    pub fn len(&self) -> usize {
        self.starts[self.files.len()]
    }

    /// Whether the view has no rows; it always has.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Type and shape (without the rows) of a tensor.
    pub fn describe(&self, name: &str) -> Located<(String, Vec<usize>)> {
        let tensor = self.tensor(0, name)?.1;
        Ok((tensor.dtype.clone(), tensor.shape[1..].to_vec()))
    }

    /// Copies rows of a tensor into `out`, in the order asked for.
    pub fn gather(&self, name: &str, rows: &[i64], out: &mut [u8], threads: usize) -> Located<()> {
        let usage = |text: String| (None, ShardError::Usage(text));
        let row_bytes = self.tensor(0, name)?.1.row_bytes();
        if out.len() != rows.len() * row_bytes {
            let text = format!("{} bytes for {} rows of {row_bytes}", out.len(), rows.len());
            return Err(usage(text));
        }
        if let Some(row) = rows.iter().find(|&&r| r < 0 || r as usize >= self.len()) {
            return Err(usage(format!("row {row} of a view of {} rows", self.len())));
        }
        if rows.is_empty() || row_bytes == 0 {
            return Ok(());
        }
        let helpers = (out.len() / THREAD_BYTES).clamp(1, threads.max(1)) - 1;
        let column = self.column(name);
        if helpers == 0 {
            return self.copy(&column, rows, out, row_bytes);
        }
        let piece = PIECE_BYTES.div_ceil(row_bytes);
        let pieces = Mutex::new(rows.chunks(piece).zip(out.chunks_mut(piece * row_bytes)));
        let take = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
        let failure = Mutex::new(None);
        share(helpers, &|| {
            while let Some((rows, out)) = take() {
                if let Err(error) = self.copy(&column, rows, out, row_bytes) {
                    *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return;
                }
            }
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn copy(&self, column: &Column, rows: &[i64], out: &mut [u8], row_bytes: usize) -> Located<()> {
        let place = |row: i64| -> Located<&[u8]> {
            let (number, within) = self.locate(row as usize);
            let (shard, first) = self.place(column, number)?;
            let start = first + within * row_bytes;
            let range = start..start + row_bytes;
            if self.checks {
                shard.check(range.clone()).map_err(|e| self.at(number, e))?;
            }
            let place = &shard.data()[range];
            fetch(place);
            Ok(place)
        };
        let mut places: [&[u8]; AHEAD] = [&[]; AHEAD];
        for (slot, &row) in places.iter_mut().zip(rows) {
            *slot = place(row)?;
        }
        for (i, out) in out.chunks_exact_mut(row_bytes).enumerate() {
            out.copy_from_slice(places[i % AHEAD]);
            if let Some(&row) = rows.get(i + AHEAD) {
                places[i % AHEAD] = place(row)?;
            }
        }
        Ok(())
    }

    /// The shard that holds a row, and the row within it.
    fn locate(&self, row: usize) -> (usize, usize) {
        if let Some(stride) = self.stride {
            return (row / stride, row % stride);
        }
        let number = self.starts.partition_point(|&start| start <= row) - 1;
        (number, row - self.starts[number])
    }

    fn column(&self, name: &str) -> Arc<Column> {
        let mut columns = self.columns.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = columns.iter().find(|c| c.name == name) {
            return Arc::clone(known);
        }
        let starts = self.files.iter().map(|_| AtomicUsize::new(UNKNOWN)).collect();
        let column = Arc::new(Column { name: name.to_owned(), starts });
        columns.push(Arc::clone(&column));
        column
    }

    /// A shard, and where a tensor's data begin in it.
    fn place(&self, column: &Column, number: usize) -> Located<(&Shard, usize)> {
        let known = column.starts[number].load(Ordering::Acquire);
        if let (false, Some(shard)) = (known == UNKNOWN, self.files[number].1.get()) {
            return Ok((shard, known));
        }
        let (shard, tensor) = self.tensor(number, &column.name)?;
        column.starts[number].store(tensor.range.start, Ordering::Release);
        Ok((shard, tensor.range.start))
    }

    fn at(&self, number: usize, error: ShardError) -> (Option<PathBuf>, ShardError) {
        (Some(self.files[number].0.clone()), error)
    }

    fn shard(&self, number: usize) -> Located<&Shard> {
        let (path, cell) = &self.files[number];
        if let Some(shard) = cell.get() {
            return Ok(shard);
        }
        let shard = Shard::open(path).map_err(|e| self.at(number, e))?;
        self.check_metadata(number, &shard).map_err(|e| self.at(number, e))?;
        Ok(cell.get_or_init(|| shard))
    }

    /// That the file is what belongs in its place.
    fn check_metadata(&self, number: usize, shard: &Shard) -> Result<()> {
        let first = ("first_row".to_owned(), self.starts[number].to_string());
        for (key, wanted) in self.expected.iter().chain([(&first.0, &first.1)]) {
            let found = shard.metadata.get(key).map_or("missing", String::as_str);
            if found != wanted {
                let text = format!("it belongs elsewhere: its {key} is {found}, not {wanted}");
                return Err(ShardError::Foreign(text));
            }
        }
        Ok(())
    }

    fn tensor(&self, number: usize, name: &str) -> Located<(&Shard, &Tensor)> {
        let shard = self.shard(number)?;
        let tensor = shard.tensor(name).map_err(|e| self.at(number, e))?;
        let rows = self.starts[number + 1] - self.starts[number];
        let same = match &self.files[0].1.get().and_then(|s| s.tensors.get(name)) {
            Some(first) => first.dtype == tensor.dtype && first.shape[1..] == tensor.shape[1..],
            None => true,
        };
        if tensor.shape.first() != Some(&rows) || !same {
            let text = format!("'{name}' is {} {:?}, not {rows} rows", tensor.dtype, tensor.shape);
            return Err(self.at(number, ShardError::Foreign(text)));
        }
        Ok((shard, tensor))
    }

    /// Asks the system to read these rows' shards ahead, or to let their pages go.
    pub fn advise(&self, rows: Range<usize>, wanted: bool) -> Located<()> {
        let rows = rows.start..rows.end.min(self.len());
        if rows.is_empty() {
            return Ok(());
        }
        for number in self.locate(rows.start).0..=self.locate(rows.end - 1).0 {
            if wanted || self.files[number].1.get().is_some() {
                self.shard(number)?.advise(wanted).map_err(|e| self.at(number, e))?;
            }
        }
        Ok(())
    }
}

/// Starts to bring the first bytes of a row into the processor's cache.
fn fetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes[..bytes.len().min(FETCH_BYTES)].chunks(64) {
        // SAFETY: a prefetch reads nothing, and SSE is part of x86-64.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::shard::{Entry, write};

    /// Rows of two bytes, each its own number, in shards of these lengths.
    fn view(folder: &Path, lengths: &[usize]) -> Reader {
        fs::create_dir_all(folder).unwrap();
        let (mut paths, mut starts) = (Vec::new(), vec![0]);
        for (number, &length) in lengths.iter().enumerate() {
            let first = starts[number];
            let bytes: Vec<u8> =
                (first..first + length).flat_map(|r| (r as u16).to_le_bytes()).collect();
            let (name, dtype) = ("x".to_owned(), "U16".to_owned());
            let entries = vec![Entry { name, dtype, shape: vec![length, 1], bytes: &bytes }];
            let path = folder.join(format!("{number}.safetensors"));
            let metadata = [("first_row".to_owned(), first.to_string())];
            write(&path, &folder.join("tmp"), &metadata, entries).unwrap();
            paths.push(path);
            starts.push(first + length);
        }
        Reader::new(paths, starts, BTreeMap::new(), true).unwrap()
    }

    fn folder(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("promptkd-view-{name}-{}", std::process::id()))
    }

    #[test]
    fn rows_come_from_the_right_shards() {
        let folder = folder("rows");
        for lengths in [&[4, 4, 3][..], &[4, 2, 4, 1]] {
            let reader = view(&folder, lengths);
            let rows: Vec<i64> = (0..reader.len() as i64).rev().chain([3, 3, 4]).collect();
            let mut out = vec![0; rows.len() * 2];
            reader.gather("x", &rows, &mut out, 2).unwrap();
            let found: Vec<i64> =
                out.chunks(2).map(|b| i64::from(u16::from_le_bytes([b[0], b[1]]))).collect();
            assert_eq!(found, rows);
        }
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn threads_share_a_large_copy() {
        let folder = folder("threads");
        let reader = view(&folder, &[30_000, 30_000, 5_000]);
        let rows: Vec<i64> = (0..3_000_000_i64).map(|i| i * 7919 % 65_000).collect();
        let mut out = vec![0; rows.len() * 2];
        reader.gather("x", &rows, &mut out, 3).unwrap();
        let right = |(b, &row): (&[u8], &i64)| i64::from(u16::from_le_bytes([b[0], b[1]])) == row;
        assert!(out.chunks(2).zip(&rows).all(right));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn bad_rows_and_misplaced_shards_are_refused() {
        let folder = folder("bad");
        let reader = view(&folder, &[4, 4]);
        for row in [-1, 8] {
            assert!(reader.gather("x", &[row], &mut [0; 2], 1).is_err());
        }
        assert!(reader.gather("x", &[1], &mut [0; 3], 1).is_err());
        assert!(reader.gather("y", &[1], &mut [0; 2], 1).is_err());
        fs::rename(folder.join("0.safetensors"), folder.join("1.safetensors")).unwrap();
        let error = reader.gather("x", &[5], &mut [0; 2], 1).unwrap_err();
        // Shard 1 was not mapped yet, and its first row is that of shard 0.
        assert!(error.1.to_string().contains("first_row is 0, not 4"), "{}", error.1);
        fs::remove_dir_all(folder).unwrap();
    }
}
