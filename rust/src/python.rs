//! The Python module: types are converted here, the GIL is released, nothing is computed.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use numpy::ndarray::{Array2, ArrayView1, ArrayView2};
use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArray4, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2,
    PyReadonlyArray3,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;

use crate::decode::image_sizes as sizes_of;
use crate::decode::{Crop, Options, Source, decode_batch, place};
use crate::error::Error;
use crate::filter::Filter;
use crate::geometry::{ResizeMode, Target};
use crate::picture::{set_entropy_only, set_libjpeg_only};
use crate::resize::resize_pixels;
use crate::simd::Level;
use crate::view::{self, ViewRange};

pub type Failures = Vec<(usize, &'static str, String)>;
type Views<'py> = (Bound<'py, PyArray2<i64>>, Bound<'py, PyArray1<bool>>);
pub type Outputs<'py> = Vec<Bound<'py, PyArray4<u8>>>;

/// One output of a decode: its size, and how a picture of another shape is fitted to it.
#[pyclass(name = "Target", module = "promptkd._rust", frozen, eq, from_py_object)]
#[derive(Clone, PartialEq)]
pub struct PyTarget(Target);

#[pymethods]
impl PyTarget {
    #[new]
    #[pyo3(signature = (height, width, resize_mode = "squash", interpolation = "bicubic", fill = 0))]
    fn new(
        height: usize,
        width: usize,
        resize_mode: &str,
        interpolation: &str,
        fill: u8,
    ) -> PyResult<Self> {
        const MAX_SIDE: usize = 1 << 14;
        if !(1..=MAX_SIDE).contains(&height) || !(1..=MAX_SIDE).contains(&width) {
            let message =
                format!("a target's sides must be 1 to {MAX_SIDE}, not {height} x {width}");
            return Err(PyValueError::new_err(message));
        }
        let mode = match resize_mode {
            "squash" => ResizeMode::Squash,
            "shortest" => ResizeMode::Shortest,
            "longest" => ResizeMode::Longest,
            _ => return Err(unknown("resize_mode", resize_mode, "squash, shortest or longest")),
        };
        let filter = match interpolation {
            "bicubic" => Filter::Bicubic,
            "bilinear" => Filter::Bilinear,
            _ => return Err(unknown("interpolation", interpolation, "bicubic or bilinear")),
        };
        Ok(PyTarget(Target { height, width, mode, filter, fill }))
    }

    #[getter]
    fn height(&self) -> usize {
        self.0.height
    }

    #[getter]
    fn width(&self) -> usize {
        self.0.width
    }

    #[getter]
    fn resize_mode(&self) -> &'static str {
        match self.0.mode {
            ResizeMode::Squash => "squash",
            ResizeMode::Shortest => "shortest",
            ResizeMode::Longest => "longest",
        }
    }

    #[getter]
    fn interpolation(&self) -> &'static str {
        match self.0.filter {
            Filter::Bicubic => "bicubic",
            Filter::Bilinear => "bilinear",
        }
    }

    #[getter]
    fn fill(&self) -> u8 {
        self.0.fill
    }

    fn __repr__(&self) -> String {
        let Target { height, width, fill, .. } = self.0;
        let (mode, interpolation) = (self.resize_mode(), self.interpolation());
        format!("Target({height}, {width}, '{mode}', '{interpolation}', {fill})")
    }

    fn __getnewargs__(&self) -> (usize, usize, &'static str, &'static str, u8) {
        (self.0.height, self.0.width, self.resize_mode(), self.interpolation(), self.0.fill)
    }
}

fn unknown(name: &str, value: &str, known: &str) -> PyErr {
    PyValueError::new_err(format!("{name} must be {known}, not '{value}'"))
}

/// The bytes of a file, a part of one as (path, offset, size), or a path; owned so that the GIL
/// can be released.
#[derive(FromPyObject)]
pub enum PySource {
    Bytes(PyBackedBytes),
    Slice((PathBuf, u64, u64)),
    Path(PathBuf),
}

impl PySource {
    pub fn borrow(&self) -> Source<'_> {
        match self {
            PySource::Bytes(bytes) => Source::Bytes(bytes),
            PySource::Slice((path, offset, size)) => {
                Source::Slice { path, offset: *offset, size: *size }
            }
            PySource::Path(path) => Source::Path(path),
        }
    }

    pub fn name(&self, row: usize) -> String {
        match self {
            PySource::Bytes(_) => format!("image {row} (bytes)"),
            PySource::Slice((path, offset, _)) => format!("'{}' at byte {offset}", path.display()),
            PySource::Path(path) => format!("'{}'", path.display()),
        }
    }
}

/// Everything that the decoding functions share.
pub struct Call {
    pub sources: Vec<PySource>,
    pub crops: Vec<Crop>,
    pub targets: Vec<Target>,
    pub orient: bool,
    pub threads: usize,
    pub max_pixels: u64,
    pub scaled: bool,
    pub truncated: bool,
}

/// What a call gives: the pixels of each target, and the failures.
pub struct Decoded {
    rows: usize,
    targets: Vec<Target>,
    outputs: Vec<Vec<u8>>,
    failures: Failures,
}

impl Call {
    /// Runs without the GIL.
    pub fn run(self, cancel: &AtomicBool) -> Decoded {
        let rows = self.sources.len();
        let sources: Vec<Source> = self.sources.iter().map(PySource::borrow).collect();
        let mut outputs: Vec<Vec<u8>> =
            self.targets.iter().map(|t| vec![0; rows * t.bytes()]).collect();
        let options = Options {
            targets: &self.targets,
            orient: self.orient,
            max_pixels: self.max_pixels,
            scaled: self.scaled,
            truncated: self.truncated,
        };
        let (crops, threads) = (&self.crops, self.threads);
        let failed = decode_batch(&sources, crops, &options, threads, cancel, &mut outputs);
        let name = |row: usize| self.sources[row].name(row);
        let failures = failed.into_iter().map(|(row, e)| failure(row, &e, name(row))).collect();
        Decoded { rows, targets: self.targets, outputs, failures }
    }
}

impl Decoded {
    pub fn into_python(self, py: Python<'_>) -> PyResult<(Outputs<'_>, Failures)> {
        let arrays = self.outputs.into_iter().zip(&self.targets).map(|(output, target)| {
            output.into_pyarray(py).reshape([self.rows, target.height, target.width, 3])
        });
        Ok((arrays.collect::<PyResult<_>>()?, self.failures))
    }
}

pub fn failure(row: usize, error: &Error, name: String) -> (usize, &'static str, String) {
    (row, error.kind(), format!("{name}: {error}"))
}

pub fn bare(targets: Vec<PyTarget>) -> Vec<Target> {
    targets.into_iter().map(|target| target.0).collect()
}

fn check_rows(name: &str, rows: usize, expected: usize) -> PyResult<()> {
    if rows == expected {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("{name} has {rows} rows for {expected} images")))
}

fn sides(boxes: ArrayView2<i64>, row: usize) -> [i64; 4] {
    std::array::from_fn(|i| boxes[[row, i]])
}

fn check_boxes(boxes: ArrayView2<i64>, expected: usize) -> PyResult<()> {
    check_rows("boxes", boxes.nrows(), expected)?;
    if boxes.ncols() != 4 {
        return Err(PyValueError::new_err("boxes must be (B, 4): left, top, right, bottom"));
    }
    Ok(())
}

/// The crops of boxes and flips, each of which may be left out.
pub fn box_crops(
    rows: usize,
    boxes: Option<PyReadonlyArray2<'_, i64>>,
    flips: Option<PyReadonlyArray1<'_, bool>>,
) -> PyResult<Vec<Crop>> {
    let boxes = boxes.as_ref().map(|b| b.as_array());
    let flips = flips.as_ref().map(|f| f.as_array());
    boxes.map_or(Ok(()), |b| check_boxes(b, rows))?;
    flips.map_or(Ok(()), |f| check_rows("flips", f.len(), rows))?;
    let crop = |row: usize| {
        let flip = flips.is_some_and(|f| f[row]);
        match boxes {
            Some(boxes) => Crop::Box { sides: sides(boxes, row), flip },
            None => Crop::Whole { flip },
        }
    };
    Ok((0..rows).map(crop).collect())
}

/// The crops of random views.
pub fn view_crops(
    rows: usize,
    range: ViewRange,
    seed: u64,
    keys: PyReadonlyArray1<'_, u64>,
    views: PyReadonlyArray1<'_, u32>,
) -> PyResult<Vec<Crop>> {
    let (keys, views) = (keys.as_array(), views.as_array());
    check_rows("keys", keys.len(), rows)?;
    check_rows("views", views.len(), rows)?;
    let pairs = keys.iter().zip(views);
    Ok(pairs.map(|(&key, &view)| Crop::View { range, seed, key, view }).collect())
}

/// Decode JPEG, PNG and WebP files, or a box of each, into arrays of fixed size.
#[pyfunction]
#[pyo3(signature = (sources, targets, *, boxes = None, flips = None, orient = false, threads = 0, max_pixels = 178_956_970, scaled = false, truncated = false))]
#[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
fn decode<'py>(
    py: Python<'py>,
    sources: Vec<PySource>,
    targets: Vec<PyTarget>,
    boxes: Option<PyReadonlyArray2<'py, i64>>,
    flips: Option<PyReadonlyArray1<'py, bool>>,
    orient: bool,
    threads: usize,
    max_pixels: u64,
    scaled: bool,
    truncated: bool,
) -> PyResult<(Outputs<'py>, Failures)> {
    let crops = box_crops(sources.len(), boxes, flips)?;
    let targets = bare(targets);
    let call = Call { sources, crops, targets, orient, threads, max_pixels, scaled, truncated };
    py.detach(|| call.run(&AtomicBool::new(false))).into_python(py)
}

/// Decode the view of each picture that `random_views` gives.
#[pyfunction]
#[pyo3(signature = (sources, targets, *, seed, keys, views, scale = (0.08, 1.0), ratio = (0.75, 4.0 / 3.0), flip = 0.5, orient = false, threads = 0, max_pixels = 178_956_970, scaled = false, truncated = false), text_signature = "(sources, targets, *, seed, keys, views, scale=(0.08, 1.0), ratio=(0.75, 1.3333333333333333), flip=0.5, orient=False, threads=0, max_pixels=178956970, scaled=False, truncated=False)")]
#[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
fn decode_views<'py>(
    py: Python<'py>,
    sources: Vec<PySource>,
    targets: Vec<PyTarget>,
    seed: u64,
    keys: PyReadonlyArray1<'py, u64>,
    views: PyReadonlyArray1<'py, u32>,
    scale: (f64, f64),
    ratio: (f64, f64),
    flip: f64,
    orient: bool,
    threads: usize,
    max_pixels: u64,
    scaled: bool,
    truncated: bool,
) -> PyResult<(Outputs<'py>, Failures)> {
    let crops = view_crops(sources.len(), view_range(scale, ratio, flip)?, seed, keys, views)?;
    let targets = bare(targets);
    let call = Call { sources, crops, targets, orient, threads, max_pixels, scaled, truncated };
    py.detach(|| call.run(&AtomicBool::new(false))).into_python(py)
}

pub fn view_range(scale: (f64, f64), ratio: (f64, f64), flip: f64) -> PyResult<ViewRange> {
    let range = ViewRange { scale, ratio, flip };
    range.check().map_err(PyValueError::new_err)?;
    Ok(range)
}

/// Width and height of pictures, from their headers.
#[pyfunction]
#[pyo3(signature = (sources, *, orient = false, threads = 0))]
fn image_sizes<'py>(
    py: Python<'py>,
    sources: Vec<PySource>,
    orient: bool,
    threads: usize,
) -> (Bound<'py, PyArray2<i64>>, Failures) {
    let results = py.detach(|| {
        let borrowed: Vec<Source> = sources.iter().map(PySource::borrow).collect();
        sizes_of(&borrowed, orient, threads)
    });
    let mut sizes = Array2::zeros((results.len(), 2));
    let mut failures = Vec::new();
    for (row, result) in results.iter().enumerate() {
        match result {
            Ok((width, height)) => {
                sizes[[row, 0]] = *width as i64;
                sizes[[row, 1]] = *height as i64;
            }
            Err(error) => failures.push(failure(row, error, sources[row].name(row))),
        }
    }
    (sizes.into_pyarray(py), failures)
}

/// Random crops and flips, a pure function of (seed, key, view).
#[pyfunction]
#[pyo3(signature = (seed, keys, views, sizes, *, scale = (0.08, 1.0), ratio = (0.75, 4.0 / 3.0), flip = 0.5), text_signature = "(seed, keys, views, sizes, *, scale=(0.08, 1.0), ratio=(0.75, 1.3333333333333333), flip=0.5)")]
#[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
fn random_views<'py>(
    py: Python<'py>,
    seed: u64,
    keys: PyReadonlyArray1<'py, u64>,
    views: PyReadonlyArray1<'py, u32>,
    sizes: PyReadonlyArray2<'py, i64>,
    scale: (f64, f64),
    ratio: (f64, f64),
    flip: f64,
) -> PyResult<Views<'py>> {
    let range = view_range(scale, ratio, flip)?;
    let (keys, views, sizes) = (keys.as_array(), views.as_array(), sizes.as_array());
    check_rows("views", views.len(), keys.len())?;
    check_rows("sizes", sizes.nrows(), keys.len())?;
    let (boxes, flips) = all_views(&range, seed, keys, views, sizes)?;
    Ok((boxes.into_pyarray(py), flips.into_pyarray(py)))
}

fn all_views(
    range: &ViewRange,
    seed: u64,
    keys: ArrayView1<u64>,
    views: ArrayView1<u32>,
    sizes: ArrayView2<i64>,
) -> PyResult<(Array2<i64>, Vec<bool>)> {
    let mut boxes = Array2::zeros((keys.len(), 4));
    let mut flips = Vec::with_capacity(keys.len());
    for row in 0..keys.len() {
        let side =
            |i: usize| sizes.get([row, i]).and_then(|s| u32::try_from(*s).ok()).filter(|s| *s > 0);
        let (Some(width), Some(height)) = (side(0), side(1)) else {
            return Err(PyValueError::new_err(format!("sizes[{row}] is not a width and a height")));
        };
        let v = view::random_view(range, seed, keys[row], views[row], width, height);
        let sides = [v.left, v.top, v.left + v.width, v.top + v.height];
        sides.into_iter().enumerate().for_each(|(i, s)| boxes[[row, i]] = i64::from(s));
        flips.push(v.flip);
    }
    Ok((boxes, flips))
}

/// The key of a picture: from the hash of its path relative to its root.
#[pyfunction]
fn image_key(relative_path: std::ffi::OsString) -> u64 {
    let bytes = relative_path.as_encoded_bytes();
    if cfg!(windows) {
        let slashed: Vec<u8> = bytes.iter().map(|&b| if b == b'\\' { b'/' } else { b }).collect();
        return view::image_key(&slashed);
    }
    view::image_key(bytes)
}

/// Cut and resize a picture that is already decoded.
#[pyfunction]
#[pyo3(signature = (pixels, targets, *, r#box = None, flip = false))]
fn resize<'py>(
    py: Python<'py>,
    pixels: PyReadonlyArray3<'py, u8>,
    targets: Vec<PyTarget>,
    r#box: Option<[i64; 4]>,
    flip: bool,
) -> PyResult<Vec<Bound<'py, numpy::PyArray3<u8>>>> {
    let targets = bare(targets);
    let view = pixels.as_array();
    let (height, width, channels) = view.dim();
    if channels != 3 || height == 0 || width == 0 {
        let message = format!("pixels must be (H, W, 3), not {:?}", view.shape());
        return Err(PyValueError::new_err(message));
    }
    let crop = match r#box {
        Some(sides) => Crop::Box { sides, flip },
        None => Crop::Whole { flip },
    };
    let (rect, flip) =
        place(&crop, (width, height)).map_err(|e| PyValueError::new_err(e.to_string()))?;
    let owned: Vec<u8> = match view.as_slice() {
        Some(slice) => slice.to_vec(),
        None => view.iter().copied().collect(),
    };
    let outputs = py.detach(|| resize_pixels(&owned, width, rect, flip, &targets));
    let arrays = outputs.into_iter().zip(&targets);
    arrays.map(|(out, t)| out.into_pyarray(py).reshape([t.height, t.width, 3])).collect()
}

/// The version of the extension.
#[pyfunction]
fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Chooses the code that decodes: for tests and benchmarks, the pixels are the same.
#[pyfunction]
#[pyo3(signature = (*, jpeg = "auto", simd = "auto"))]
fn configure(jpeg: &str, simd: &str) -> PyResult<()> {
    if !matches!(jpeg, "auto" | "libjpeg" | "entropy") {
        return Err(unknown("jpeg", jpeg, "auto, libjpeg or entropy"));
    }
    let level = Level::ALL.into_iter().find(|level| level.name() == simd);
    if level.is_none() && simd != "auto" {
        return Err(unknown("simd", simd, "auto, portable, avx2 or avx512"));
    }
    if !Level::choose(level) {
        return Err(PyValueError::new_err(format!("this processor has no {simd}")));
    }
    set_libjpeg_only(jpeg == "libjpeg");
    set_entropy_only(jpeg == "entropy");
    Ok(())
}

/// Adds every name to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyTarget>()?;
    module.add_function(wrap_pyfunction!(decode, module)?)?;
    module.add_function(wrap_pyfunction!(decode_views, module)?)?;
    module.add_function(wrap_pyfunction!(image_sizes, module)?)?;
    module.add_function(wrap_pyfunction!(random_views, module)?)?;
    module.add_function(wrap_pyfunction!(image_key, module)?)?;
    module.add_function(wrap_pyfunction!(resize, module)?)?;
    module.add_function(wrap_pyfunction!(configure, module)?)?;
    module.add_function(wrap_pyfunction!(version, module)?)
}
