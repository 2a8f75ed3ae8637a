//! A list of names on disk, for a hundred million pictures: opened in no time, read where asked.
//!
//! ```text
//! 8 bytes  "PKDINDEX"
//! u64      version, 1
//! u64      number of names
//! u64      bytes of all names
//! names    one after another
//! u64 …    where each name begins, and where the last ends, counted from the first
//! ```
//!
//! All numbers are little endian. The file is read at a place, not mapped: a file that is cut
//! meanwhile gives an error instead of a signal.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"PKDINDEX";
const HEADER: u64 = 32;
/// Names longer than any file system takes are a sign of damage.
const MAX_NAME: u64 = 1 << 20;

/// Writes an index; it gets its name when it is finished.
pub struct Writer {
    path: PathBuf,
    names: BufWriter<File>,
    places: BufWriter<File>,
    count: u64,
    bytes: u64,
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

impl Writer {
    pub fn create(path: &Path) -> io::Result<Writer> {
        let mut names = BufWriter::new(File::create(beside(path, ".part"))?);
        names.write_all(&[0; HEADER as usize])?;
        let places = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(beside(path, ".places"))?;
        let mut places = BufWriter::new(places);
        places.write_all(&0u64.to_le_bytes())?;
        Ok(Writer { path: path.to_owned(), names, places, count: 0, bytes: 0 })
    }

    pub fn add(&mut self, name: &[u8]) -> io::Result<()> {
        if name.len() as u64 > MAX_NAME {
            return Err(io::Error::other(format!("a name of {} bytes", name.len())));
        }
        self.names.write_all(name)?;
        self.bytes += name.len() as u64;
        self.count += 1;
        self.places.write_all(&self.bytes.to_le_bytes())
    }

    /// Completes the file: the number of names.
    pub fn finish(mut self) -> io::Result<u64> {
        self.places.flush()?;
        let mut places = self.places.into_inner().map_err(io::IntoInnerError::into_error)?;
        places.seek(SeekFrom::Start(0))?;
        io::copy(&mut BufReader::new(places), &mut self.names)?;
        let mut file = self.names.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(MAGIC)?;
        for number in [1, self.count, self.bytes] {
            file.write_all(&number.to_le_bytes())?;
        }
        file.sync_all()?;
        fs::remove_file(beside(&self.path, ".places"))?;
        fs::rename(beside(&self.path, ".part"), &self.path)?;
        Ok(self.count)
    }
}

/// An open index.
#[derive(Debug)]
pub struct Index {
    file: File,
    count: u64,
    bytes: u64,
}

fn damaged(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl Index {
    pub fn open(path: &Path) -> io::Result<Index> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut header = [0u8; HEADER as usize];
        read_at(&file, &mut header, 0).map_err(|_| damaged("it is no index of pictures"))?;
        let number = |i: usize| u64::from_le_bytes(std::array::from_fn(|j| header[8 * i + j]));
        if header[..8] != *MAGIC {
            return Err(damaged("it is no index of pictures"));
        }
        let (version, count, bytes) = (number(1), number(2), number(3));
        if version != 1 {
            return Err(damaged(format!("it is an index of version {version}, not 1")));
        }
        let places = count.checked_add(1).and_then(|n| n.checked_mul(8));
        let expected =
            places.and_then(|n| n.checked_add(bytes)).and_then(|n| n.checked_add(HEADER));
        if expected != Some(length) {
            return Err(damaged(format!(
                "it has {length} bytes where its header calls for another number: it was cut"
            )));
        }
        Ok(Index { file, count, bytes })
    }

    pub fn len(&self) -> u64 {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn name(&self, row: u64) -> io::Result<Vec<u8>> {
        if row >= self.count {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("row {row} of {}", self.count),
            ));
        }
        let mut places = [0u8; 16];
        read_at(&self.file, &mut places, HEADER + self.bytes + 8 * row)?;
        let place = |i: usize| u64::from_le_bytes(std::array::from_fn(|j| places[8 * i + j]));
        let (start, end) = (place(0), place(1));
        if start > end || end > self.bytes || end - start > MAX_NAME {
            return Err(damaged(format!("the place of row {row} is damaged")));
        }
        let mut name = vec![0; (end - start) as usize];
        read_at(&self.file, &mut name, HEADER + start)?;
        Ok(name)
    }
}

#[cfg(unix)]
pub fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
pub fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        let at = offset + done as u64;
        match std::os::windows::fs::FileExt::seek_read(file, &mut buffer[done..], at)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => done += n,
        }
    }
    Ok(())
}
