//! From files to outputs of fixed size: one picture, and many at once on several threads.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::error::{Error, Result};
use crate::geometry::{Target, fit};
use crate::index::read_at;
use crate::orient::Collector;
use crate::picture::{Buffers, Picture};
use crate::resize::{Frame, Rect, Resizer};
use crate::view::{ViewRange, random_view};

/// Files are read into memory whole; larger ones are refused.
const MAX_FILE: u64 = 1 << 31;

/// Where a picture's bytes come from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    Path(&'a Path),
    /// Part of a file, as a member of a tar archive.
    Slice {
        path: &'a Path,
        offset: u64,
        size: u64,
    },
    Bytes(&'a [u8]),
}

/// Which part of a picture is wanted.
#[derive(Debug, Clone, Copy)]
pub enum Crop {
    Whole {
        flip: bool,
    },
    /// Left, top, right and bottom in pixels.
    Box {
        sides: [i64; 4],
        flip: bool,
    },
    View {
        range: ViewRange,
        seed: u64,
        key: u64,
        view: u32,
    },
}

/// What is made of each picture.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    pub targets: &'a [Target],
    pub orient: bool,
    pub max_pixels: u64,
    pub scaled: bool,
    /// JPEG files that were cut are decoded as far as they go.
    pub truncated: bool,
}

/// Buffers of one thread, kept between pictures.
#[derive(Debug, Default)]
pub struct Scratch {
    file: Vec<u8>,
    buffers: Buffers,
    resizer: Resizer,
}

/// Scratches of threads that have ended, for the next call.
static POOL: Mutex<Vec<Scratch>> = Mutex::new(Vec::new());

impl Scratch {
    /// Never waits: a lock that was held while the process forked stays held in the child.
    fn take() -> Scratch {
        POOL.try_lock().ok().and_then(|mut pool| pool.pop()).unwrap_or_default()
    }

    fn give_back(self) {
        if let Ok(mut pool) = POOL.try_lock() {
            pool.push(self);
        }
    }
}

/// Decodes one picture into one output per target.
pub fn decode(
    data: &[u8],
    options: &Options,
    crop: &Crop,
    scratch: &mut Scratch,
    outs: &mut [&mut [u8]],
) -> Result<()> {
    let Scratch { buffers, resizer, .. } = scratch;
    decode_with(data, options, crop, buffers, resizer, outs)
}

fn decode_with(
    data: &[u8],
    options: &Options,
    crop: &Crop,
    buffers: &mut Buffers,
    resizer: &mut Resizer,
    outs: &mut [&mut [u8]],
) -> Result<()> {
    let picture = Picture::open(data, options.orient)?;
    picture.check_pixels(options.max_pixels)?;
    let (rect, flip) = place(crop, picture.size())?;
    let denominator =
        if options.scaled && picture.scales() { denominator(options.targets, rect) } else { 1 };
    let (stored, orientation) = (picture.stored, picture.orientation);
    let grid = (stored.0.div_ceil(denominator), stored.1.div_ceil(denominator));
    let (frame, offset) = frame(rect, denominator, orientation.size(grid), |span| {
        orientation.span(span, stored, denominator)
    });
    let need = resizer.plan(options.targets, &frame, flip);
    let need = Rect { x: need.x + offset.0, y: need.y + offset.1, ..need };
    let region = orientation.stored(need, grid);
    // The borrow checker wants the slices reborrowed for as long as the resize.
    let mut outs: Vec<&mut [u8]> = outs.iter_mut().map(|out| &mut **out).collect();
    let mut resize = resizer.start(options.targets, &mut outs);
    if orientation.is_upright() {
        return picture.decode(region, denominator, options.truncated, buffers, &mut resize);
    }
    let mut collector = Collector::new(region);
    picture.decode(region, denominator, options.truncated, buffers, &mut collector)?;
    collector.replay(orientation, &mut resize);
    Ok(())
}

/// The wanted rectangle of an upright picture.
pub fn place(crop: &Crop, (width, height): (usize, usize)) -> Result<(Rect, bool)> {
    match *crop {
        Crop::Whole { flip } => Ok((Rect { x: 0, y: 0, width, height }, flip)),
        Crop::Box { sides: [left, top, right, bottom], flip } => {
            let inside = 0 <= left && left < right && right as u64 <= width as u64;
            if !(inside && 0 <= top && top < bottom && bottom as u64 <= height as u64) {
                return Err(Error::Corrupt(format!(
                    "box ({left}, {top}, {right}, {bottom}) does not lie in {width} x {height} pixels"
                )));
            }
            let (x, y) = (left as usize, top as usize);
            Ok((Rect { x, y, width: right as usize - x, height: bottom as usize - y }, flip))
        }
        Crop::View { range, seed, key, view } => {
            let v = random_view(&range, seed, key, view, width as u32, height as u32);
            let [x, y, width, height] = [v.left, v.top, v.width, v.height].map(|n| n as usize);
            Ok((Rect { x, y, width, height }, v.flip))
        }
    }
}

/// The box on the grid that is decoded, and the grid offset of the frame's own grid. Exactly: a
/// crop, so that no pixel outside the box is used. Scaled: the box's edges lie between grid
/// points, so the frame is the whole grid.
fn frame(
    rect: Rect,
    denominator: usize,
    grid: (usize, usize),
    span: impl Fn([f64; 4]) -> [f64; 4],
) -> (Frame, (usize, usize)) {
    if denominator == 1 {
        return (Frame::whole(rect.width, rect.height), (rect.x, rect.y));
    }
    let (x, y) = (rect.x as f64, rect.y as f64);
    let span = span([x, y, x + rect.width as f64, y + rect.height as f64]);
    (Frame { width: rect.width, height: rect.height, grid, span }, (0, 0))
}

/// The largest reduction of 2, 4 or 8 that leaves at least the pixels of every output.
fn denominator(targets: &[Target], rect: Rect) -> usize {
    let enough = |d: &usize| {
        targets.iter().all(|target| {
            let (fx, fy) = fit(target, rect.width, rect.height);
            rect.width >= d * fx.output && rect.height >= d * fy.output
        })
    };
    [8, 4, 2].into_iter().find(enough).unwrap_or(1)
}

/// Reads a file, or the part of `size` bytes from `offset` on, into `buffer`.
pub fn read_file(path: &Path, part: Option<(u64, u64)>, buffer: &mut Vec<u8>) -> Result<()> {
    let error = |e: std::io::Error| match e.kind() {
        ErrorKind::NotFound => Error::Missing,
        _ => Error::Unreadable(e.to_string()),
    };
    // Looked at first: opening a pipe would wait for somebody to write into it.
    let meta = std::fs::metadata(path).map_err(error)?;
    if meta.is_dir() {
        return Err(Error::Unreadable("it is a folder".into()));
    }
    if !meta.is_file() {
        return Err(Error::Unreadable("it is not a regular file".into()));
    }
    let file = File::open(path).map_err(error)?;
    let meta = file.metadata().map_err(error)?;
    let length = part.map_or(meta.len(), |(_, size)| size);
    if length > MAX_FILE {
        return Err(Error::TooLarge(format!("a file of {length} bytes")));
    }
    buffer.clear();
    let Some((offset, size)) = part else {
        buffer.reserve(length as usize + 1);
        file.take(MAX_FILE).read_to_end(buffer).map_err(error)?;
        return Ok(());
    };
    if offset.checked_add(size).is_none_or(|end| end > meta.len()) {
        return Err(Error::Truncated(format!(
            "the archive has {} bytes, and the picture's {size} begin at byte {offset}",
            meta.len()
        )));
    }
    buffer.resize(size as usize, 0);
    read_at(&file, buffer, offset).map_err(error)
}

/// Runs `work` on the bytes of a source; a panic of a decoder becomes an error.
fn with_data<T>(
    source: Source,
    scratch: &mut Scratch,
    work: impl FnOnce(&[u8], &mut Scratch) -> Result<T>,
) -> Result<T> {
    let mut file = std::mem::take(&mut scratch.file);
    let read = match source {
        Source::Path(path) => read_file(path, None, &mut file),
        Source::Slice { path, offset, size } => read_file(path, Some((offset, size)), &mut file),
        Source::Bytes(_) => Ok(()),
    };
    if let Err(error) = read {
        scratch.file = file;
        return Err(error);
    }
    let data = if let Source::Bytes(bytes) = source { bytes } else { &file };
    let result = catch_unwind(AssertUnwindSafe(|| work(data, scratch)));
    let result = result.unwrap_or_else(|_| {
        *scratch = Scratch::default();
        Err(Error::Corrupt("the decoder gave up on it".into()))
    });
    scratch.file = file;
    result
}

/// Decodes many pictures: row i of every output is picture i. Rows that fail are zero and come
/// back with their error, in order. `cancel` makes the rest fail at once.
pub fn decode_batch(
    sources: &[Source],
    crops: &[Crop],
    options: &Options,
    threads: usize,
    cancel: &AtomicBool,
    outputs: &mut [Vec<u8>],
) -> Vec<(usize, Error)> {
    assert_eq!(sources.len(), crops.len());
    let mut rows: Vec<Vec<&mut [u8]>> = sources.iter().map(|_| Vec::new()).collect();
    for (output, target) in outputs.iter_mut().zip(options.targets) {
        for (row, slice) in rows.iter_mut().zip(output.chunks_exact_mut(target.bytes())) {
            row.push(slice);
        }
    }
    let rows: Vec<Mutex<Vec<&mut [u8]>>> = rows.into_iter().map(Mutex::new).collect();
    let results = parallel(sources.len(), threads, |i, scratch| {
        if cancel.load(Ordering::Relaxed) {
            return Some(Error::Unreadable("it was given up".into()));
        }
        let mut outs = rows[i].lock().expect("each row has one owner");
        let result = with_data(sources[i], scratch, |data, scratch| {
            decode(data, options, &crops[i], scratch, &mut outs)
        });
        if result.is_err() {
            outs.iter_mut().for_each(|out| out.fill(0));
        }
        result.err()
    });
    let failed = results.into_iter().enumerate();
    failed.filter_map(|(i, error)| error.map(|error| (i, error))).collect()
}

/// Turns pictures of `pixels` RGB pixels each into planes of (value / 255 - mean) / std, in single
/// precision and in torchvision's order of operations.
pub fn normalize(
    input: &[u8],
    pixels: usize,
    mean: [f32; 3],
    std: [f32; 3],
    threads: usize,
) -> Vec<f32> {
    let tables: [[f32; 256]; 3] = std::array::from_fn(|c| {
        std::array::from_fn(|value| (value as f32 / 255.0 - mean[c]) / std[c])
    });
    let mut output = vec![0.0; input.len()];
    let rows = input.chunks_exact(pixels * 3).zip(output.chunks_exact_mut(pixels * 3));
    let rows: Vec<_> = rows.map(Mutex::new).collect();
    parallel(rows.len(), threads, |i, _| {
        let mut row = rows[i].lock().expect("each row has one owner");
        let (input, output) = &mut *row;
        for ((c, plane), table) in output.chunks_exact_mut(pixels).enumerate().zip(&tables) {
            for (out, pixel) in plane.iter_mut().zip(input.chunks_exact(3)) {
                *out = table[usize::from(pixel[c])];
            }
        }
    });
    output
}

/// Upright width and height of many pictures.
pub fn image_sizes(
    sources: &[Source],
    orient: bool,
    threads: usize,
) -> Vec<Result<(usize, usize)>> {
    parallel(sources.len(), threads, |i, scratch| {
        with_data(sources[i], scratch, |data, _| Ok(Picture::open(data, orient)?.size()))
    })
}

/// The results of `work` for 0 to `count`, in order. Threads are started anew for each call, so
/// that it works in a forked process; 0 threads means one for each processor.
fn parallel<T: Send>(
    count: usize,
    threads: usize,
    work: impl Fn(usize, &mut Scratch) -> T + Sync,
) -> Vec<T> {
    let all = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = if threads == 0 { all() } else { threads }.min(count.max(1));
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut scratch = Scratch::take();
        let mut done = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                scratch.give_back();
                return done;
            }
            done.push((i, work(i, &mut scratch)));
        }
    };
    let mut done = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(worker)).collect();
        let mut done = worker();
        for other in others {
            done.extend(other.join().expect("a worker catches its panics"));
        }
        done
    });
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, result)| result).collect()
}
