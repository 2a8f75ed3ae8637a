//! The part of the Python module that feeds batches: streams, indices, archives, orders.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use numpy::{
    IntoPyArray, PyArray1, PyArray4, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2,
    PyReadonlyArray4,
};
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::decode::{Crop, normalize as normalize_pixels};
use crate::geometry::Target;
use crate::index;
use crate::order::{Order, share};
use crate::python::{
    Call, Decoded, Failures, Outputs, PySource, PyTarget, bare, box_crops, failure, view_crops,
    view_range,
};
use crate::stream::{Absent, Background};
use crate::tar;
use crate::view;

/// How often a wait looks for Ctrl-C.
const TICK: Duration = Duration::from_millis(50);

/// Decodes batches in the background, in order, a bounded number of them ahead.
#[pyclass(module = "promptkd._rust", frozen)]
struct BatchStream {
    background: Mutex<Background<Call, Decoded>>,
    targets: Vec<Target>,
    orient: bool,
    threads: usize,
    max_pixels: u64,
    scaled: bool,
    truncated: bool,
}

#[pymethods]
impl BatchStream {
    #[new]
    #[pyo3(signature = (targets, *, depth = 2, orient = false, threads = 0, max_pixels = 178_956_970, scaled = false, truncated = false))]
    fn new(
        targets: Vec<PyTarget>,
        depth: usize,
        orient: bool,
        threads: usize,
        max_pixels: u64,
        scaled: bool,
        truncated: bool,
    ) -> PyResult<Self> {
        if !(1..=1024).contains(&depth) {
            return Err(PyValueError::new_err(format!("depth must be 1 to 1024, not {depth}")));
        }
        let work = |call: Call, cancel: &AtomicBool| call.run(cancel);
        let background = Mutex::new(Background::new(depth, work));
        Ok(BatchStream {
            background,
            targets: bare(targets),
            orient,
            threads,
            max_pixels,
            scaled,
            truncated,
        })
    }

    /// Batches whose results have not been taken.
    #[getter]
    fn pending(&self) -> usize {
        self.lock().pending()
    }

    /// Hands in a batch of boxes.
    #[pyo3(signature = (sources, *, boxes = None, flips = None))]
    fn submit(
        &self,
        sources: Vec<PySource>,
        boxes: Option<PyReadonlyArray2<'_, i64>>,
        flips: Option<PyReadonlyArray1<'_, bool>>,
    ) -> PyResult<()> {
        let crops = box_crops(sources.len(), boxes, flips)?;
        self.hand_in(sources, crops)
    }

    /// Hands in a batch of random views.
    #[pyo3(signature = (sources, *, seed, keys, views, scale = (0.08, 1.0), ratio = (0.75, 4.0 / 3.0), flip = 0.5), text_signature = "($self, sources, *, seed, keys, views, scale=(0.08, 1.0), ratio=(0.75, 1.3333333333333333), flip=0.5)")]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn submit_views(
        &self,
        sources: Vec<PySource>,
        seed: u64,
        keys: PyReadonlyArray1<'_, u64>,
        views: PyReadonlyArray1<'_, u32>,
        scale: (f64, f64),
        ratio: (f64, f64),
        flip: f64,
    ) -> PyResult<()> {
        let range = view_range(scale, ratio, flip)?;
        let crops = view_crops(sources.len(), range, seed, keys, views)?;
        self.hand_in(sources, crops)
    }

    /// Waits for the oldest batch.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<(Outputs<'py>, Failures)> {
        loop {
            match py.detach(|| self.lock().take(TICK)) {
                Ok(decoded) => return decoded.into_python(py),
                Err(Absent::Pending) => py.check_signals()?,
                Err(Absent::Nothing) => {
                    return Err(PyValueError::new_err("no batch was submitted"));
                }
                Err(Absent::Gone) => return Err(gone()),
            }
        }
    }
}

impl BatchStream {
    fn lock(&self) -> std::sync::MutexGuard<'_, Background<Call, Decoded>> {
        self.background.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn hand_in(&self, sources: Vec<PySource>, crops: Vec<Crop>) -> PyResult<()> {
        let call = Call {
            sources,
            crops,
            targets: self.targets.clone(),
            orient: self.orient,
            threads: self.threads,
            max_pixels: self.max_pixels,
            scaled: self.scaled,
            truncated: self.truncated,
        };
        self.lock().submit(call).map_err(|absent| match absent {
            Absent::Gone => gone(),
            _ => PyValueError::new_err("the stream is full: take a batch first"),
        })
    }
}

fn gone() -> PyErr {
    PyRuntimeError::new_err(
        "the stream's thread is gone: make the stream in the process that uses it",
    )
}

/// A list of names on disk.
#[pyclass(module = "promptkd._rust", frozen)]
struct Index {
    index: index::Index,
    path: PathBuf,
}

fn os_error(path: &std::path::Path, error: &io::Error) -> PyErr {
    let message = format!("'{}': {error}", path.display());
    match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => PyValueError::new_err(message),
        _ => PyOSError::new_err(message),
    }
}

#[cfg(unix)]
fn to_os(bytes: Vec<u8>) -> OsString {
    std::os::unix::ffi::OsStringExt::from_vec(bytes)
}

#[cfg(not(unix))]
fn to_os(bytes: Vec<u8>) -> OsString {
    String::from_utf8_lossy(&bytes).into_owned().into()
}

#[pymethods]
impl Index {
    #[new]
    fn new(path: PathBuf) -> PyResult<Self> {
        let index = index::Index::open(&path).map_err(|e| os_error(&path, &e))?;
        Ok(Index { index, path })
    }

    fn __len__(&self) -> usize {
        self.index.len() as usize
    }

    /// The names of these rows.
    fn names(&self, py: Python<'_>, rows: PyReadonlyArray1<'_, u64>) -> PyResult<Vec<OsString>> {
        Ok(self.read(py, rows)?.into_iter().map(to_os).collect())
    }

    /// The keys of these rows, as `image_key` of their names.
    fn keys<'py>(
        &self,
        py: Python<'py>,
        rows: PyReadonlyArray1<'py, u64>,
    ) -> PyResult<Bound<'py, PyArray1<u64>>> {
        let names = self.read(py, rows)?;
        Ok(names.iter().map(|name| view::image_key(name)).collect::<Vec<_>>().into_pyarray(py))
    }
}

impl Index {
    fn read(&self, py: Python<'_>, rows: PyReadonlyArray1<'_, u64>) -> PyResult<Vec<Vec<u8>>> {
        let rows = rows.as_array().to_vec();
        let read = || rows.iter().map(|row| self.index.name(*row)).collect::<io::Result<_>>();
        py.detach(read).map_err(|e| os_error(&self.path, &e))
    }
}

/// Writes an index.
#[pyclass(module = "promptkd._rust", frozen)]
struct IndexWriter {
    writer: Mutex<Option<index::Writer>>,
    path: PathBuf,
}

#[pymethods]
impl IndexWriter {
    #[new]
    fn new(path: PathBuf) -> PyResult<Self> {
        let writer = index::Writer::create(&path).map_err(|e| os_error(&path, &e))?;
        Ok(IndexWriter { writer: Mutex::new(Some(writer)), path })
    }

    /// Appends names.
    fn add(&self, py: Python<'_>, names: Vec<OsString>) -> PyResult<()> {
        let mut writer = self.writer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let writer = writer.as_mut().ok_or_else(finished)?;
        let added =
            py.detach(|| names.iter().try_for_each(|name| writer.add(name.as_encoded_bytes())));
        added.map_err(|e| os_error(&self.path, &e))
    }

    /// Completes the file; returns the number of names.
    fn finish(&self, py: Python<'_>) -> PyResult<u64> {
        let mut writer = self.writer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let writer = writer.take().ok_or_else(finished)?;
        py.detach(|| writer.finish()).map_err(|e| os_error(&self.path, &e))
    }
}

fn finished() -> PyErr {
    PyValueError::new_err("the index is finished")
}

/// The rows at some places of an epoch's order.
#[pyfunction]
#[pyo3(signature = (num_rows, *, seed, epoch, start, count, rank = 0, world = 1))]
#[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
fn epoch_rows(
    py: Python<'_>,
    num_rows: u64,
    seed: u64,
    epoch: u64,
    start: u64,
    count: u64,
    rank: u64,
    world: u64,
) -> PyResult<Bound<'_, PyArray1<u64>>> {
    if rank >= world || num_rows > 1 << 62 {
        let message = format!("rank {rank} of {world} ranks, {num_rows} rows");
        return Err(PyValueError::new_err(message));
    }
    let order = Order::new(num_rows, seed, epoch);
    let end = start.saturating_add(count).min(share(num_rows, rank, world));
    let rows: Vec<u64> = (start..end).map(|place| order.row(place * world + rank)).collect();
    Ok(rows.into_pyarray(py))
}

/// The files in a tar archive: names, and where their bytes lie.
#[pyfunction]
#[expect(clippy::type_complexity, reason = "a list of tuples is plain in Python")]
fn tar_members(
    py: Python<'_>,
    path: PathBuf,
) -> PyResult<(Vec<(OsString, u64, u64)>, Option<(usize, &'static str, String)>)> {
    match py.detach(|| tar::members(&path)) {
        Ok(members) => {
            let members = members.into_iter().map(|m| (to_os(m.name), m.offset, m.size));
            Ok((members.collect(), None))
        }
        Err(error) => {
            let name = format!("'{}'", path.display());
            Ok((Vec::new(), Some(failure(0, &error, name))))
        }
    }
}

/// Pixels to normalised planes of single precision.
#[pyfunction]
#[pyo3(signature = (pixels, mean, std, *, threads = 0))]
fn normalize<'py>(
    py: Python<'py>,
    pixels: PyReadonlyArray4<'py, u8>,
    mean: [f32; 3],
    std: [f32; 3],
    threads: usize,
) -> PyResult<Bound<'py, PyArray4<f32>>> {
    let view = pixels.as_array();
    let (rows, height, width, channels) = view.dim();
    if channels != 3 || height * width == 0 {
        return Err(PyValueError::new_err("pixels must be (B, H, W, 3)"));
    }
    // A slice only where the order in memory is the order of the indices.
    let owned = view.as_slice().map_or_else(|| view.iter().copied().collect(), <[u8]>::to_vec);
    let planes = py.detach(|| normalize_pixels(&owned, height * width, mean, std, threads));
    planes.into_pyarray(py).reshape([rows, 3, height, width])
}

/// Adds every name to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<BatchStream>()?;
    module.add_class::<Index>()?;
    module.add_class::<IndexWriter>()?;
    module.add_function(wrap_pyfunction!(epoch_rows, module)?)?;
    module.add_function(wrap_pyfunction!(tar_members, module)?)?;
    module.add_function(wrap_pyfunction!(normalize, module)?)
}
