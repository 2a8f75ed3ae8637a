//! `promptkd._rust`: image decoding for promptkd. Only the module is put together here.

pub mod baseline;
pub mod decode;
pub mod error;
pub mod filter;
pub mod geometry;
pub mod jpeg;
pub mod markers;
pub mod orient;
pub mod picture;
pub mod png;
mod python;
pub mod raster;
pub mod resize;
pub mod simd;
pub mod view;
pub mod webp;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
fn _rust(module: &Bound<'_, PyModule>) -> PyResult<()> {
    python::register(module)
}
