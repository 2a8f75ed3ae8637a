//! The Python face of the teacher cache: types are converted here, the GIL is released.

use std::collections::BTreeMap;
use std::path::PathBuf;

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::cache::Reader;
use crate::decode::Source;
use crate::python::PySource;
use crate::shard::{self, Entry, Shard, ShardError};

type Files<'py> = (Vec<Bound<'py, PyBytes>>, Bound<'py, PyArray1<u64>>, Vec<(usize, String)>);
type Described = Vec<(String, String, Vec<usize>)>;

fn raise(path: Option<PathBuf>, error: &ShardError) -> PyErr {
    let text = match &path {
        Some(path) => format!("'{}': {error}", path.display()),
        None => error.to_string(),
    };
    match error {
        ShardError::Missing | ShardError::Io(_) => PyOSError::new_err(text),
        _ => PyValueError::new_err(text),
    }
}

fn thread_count(threads: usize) -> usize {
    match threads {
        0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
        n => n,
    }
}

/// Rows of one view of a teacher cache, from its shards.
#[pyclass(name = "CacheReader", module = "promptkd._rust", frozen)]
pub struct PyCacheReader(Reader);

#[pymethods]
impl PyCacheReader {
    #[new]
    #[pyo3(signature = (paths, starts, expected, *, checks = true))]
    fn new(
        paths: Vec<PathBuf>,
        starts: Vec<usize>,
        expected: BTreeMap<String, String>,
        checks: bool,
    ) -> PyResult<Self> {
        let reader = Reader::new(paths, starts, expected, checks);
        Ok(PyCacheReader(reader.map_err(|e| raise(None, &e))?))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn describe(&self, py: Python<'_>, name: &str) -> PyResult<(String, Vec<usize>)> {
        py.detach(|| self.0.describe(name)).map_err(|(path, e)| raise(path, &e))
    }

    #[pyo3(signature = (name, rows, out, *, threads = 0))]
    fn gather(
        &self,
        py: Python<'_>,
        name: &str,
        rows: PyReadonlyArray1<'_, i64>,
        mut out: PyReadwriteArray1<'_, u8>,
        threads: usize,
    ) -> PyResult<()> {
        let (rows, out) = (rows.as_slice()?, out.as_slice_mut()?);
        let done = py.detach(|| self.0.gather(name, rows, out, thread_count(threads)));
        done.map_err(|(path, e)| raise(path, &e))
    }

    #[pyo3(signature = (start, stop, *, wanted = true))]
    fn advise(&self, py: Python<'_>, start: usize, stop: usize, wanted: bool) -> PyResult<()> {
        py.detach(|| self.0.advise(start..stop, wanted)).map_err(|(path, e)| raise(path, &e))
    }
}

/// Write one shard: to the temporary name, synced, then renamed.
#[pyfunction]
fn write_shard(
    py: Python<'_>,
    path: PathBuf,
    temporary: PathBuf,
    metadata: Vec<(String, String)>,
    tensors: Vec<(String, String, Vec<usize>, PyReadonlyArray1<'_, u8>)>,
) -> PyResult<()> {
    let mut entries = Vec::with_capacity(tensors.len());
    for (name, dtype, shape, bytes) in &tensors {
        let (name, dtype, shape) = (name.clone(), dtype.clone(), shape.clone());
        entries.push(Entry { name, dtype, shape, bytes: bytes.as_slice()? });
    }
    py.detach(|| shard::write(&path, &temporary, &metadata, entries))
        .map_err(|e| raise(Some(path), &e))
}

/// The metadata and the tensors of a shard whose header is sound.
#[pyfunction]
fn inspect_shard(py: Python<'_>, path: PathBuf) -> PyResult<(BTreeMap<String, String>, Described)> {
    let shard = py.detach(|| Shard::open(&path)).map_err(|e| raise(Some(path), &e))?;
    let tensors = shard.tensors.into_iter().map(|(name, t)| (name, t.dtype, t.shape));
    Ok((shard.metadata, tensors.collect()))
}

/// The bytes of one tensor of a shard, checked.
#[pyfunction]
fn read_tensor<'py>(py: Python<'py>, path: PathBuf, name: &str) -> PyResult<Bound<'py, PyBytes>> {
    let bytes = py.detach(|| Shard::open(&path)?.checked(name).map(<[u8]>::to_vec));
    bytes.map(|b| PyBytes::new(py, &b)).map_err(|e| raise(Some(path), &e))
}

/// The damaged blocks of a shard, in words.
#[pyfunction]
fn verify_shard(py: Python<'_>, path: PathBuf) -> PyResult<Vec<String>> {
    py.detach(|| Shard::open(&path).map(|s| s.damage())).map_err(|e| raise(Some(path), &e))
}

/// Read files or parts of them, with the checksum of their bytes.
#[pyfunction]
#[pyo3(signature = (sources, *, threads = 0))]
fn read_files<'py>(py: Python<'py>, sources: Vec<PySource>, threads: usize) -> Files<'py> {
    let found = py.detach(|| {
        let borrowed: Vec<Source> = sources.iter().map(PySource::borrow).collect();
        shard::read_files(&borrowed, thread_count(threads))
    });
    let mut files = Vec::with_capacity(found.len());
    let mut sums = Vec::with_capacity(found.len());
    let mut failures = Vec::new();
    for (row, content) in found.into_iter().enumerate() {
        let (bytes, sum) = content.unwrap_or_else(|error| {
            failures.push((row, format!("{}: {error}", sources[row].name(row))));
            (Vec::new(), 0)
        });
        files.push(PyBytes::new(py, &bytes));
        sums.push(sum);
    }
    (files, sums.into_pyarray(py), failures)
}

/// Adds every name to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyCacheReader>()?;
    module.add_function(wrap_pyfunction!(write_shard, module)?)?;
    module.add_function(wrap_pyfunction!(inspect_shard, module)?)?;
    module.add_function(wrap_pyfunction!(read_tensor, module)?)?;
    module.add_function(wrap_pyfunction!(verify_shard, module)?)?;
    module.add_function(wrap_pyfunction!(read_files, module)?)
}
